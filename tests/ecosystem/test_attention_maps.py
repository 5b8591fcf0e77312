"""What tools that read attention maps get from mixers, which compute none: an error of timm, or no entry.

timm is always installed, so these tests aren't slow.
"""

import pytest
import timm
import torch
from small_models import KEYWORDS, KINDS, SIZE, build
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

import timm_vix


@pytest.fixture(autouse=True)
def unfused_attention():
    """timm's own attention has maps only where it isn't fused."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.mark.parametrize("method", ["fx", "hook"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "softmax"])
def test_no_maps_are_an_error(kind, method):
    with pytest.raises(RuntimeError, match=r"No (node|module) names found"):
        AttentionExtract(build(kind), method=method)


@torch.no_grad()
@pytest.mark.parametrize("method", ["fx", "hook"])
def test_layers_that_keep_softmax_have_theirs(method):
    model = timm.create_model("vit_tiny_patch16_224", **SIZE).eval()
    timm_vix.convert(model, "nystrom", layers=[1], **KEYWORDS["nystrom"])
    x = torch.randn(2, 3, 32, 32)
    maps = AttentionExtract(model, method=method)(x)
    (name,) = maps
    attn = model.blocks[0].attn
    tokens = model.blocks[0].norm1(model._pos_embed(model.patch_embed(x)))
    q, k, _ = attn.qkv(tokens).reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(2, 3) / 4).softmax(3)
    assert name.startswith("blocks.0.attn.")
    assert torch.allclose(maps[name], expected, atol=1e-6)


def test_a_slot_hands_its_dropout_on():
    """Rotary positions give softmax attention a slot, which a conversion replaces by another one."""
    model = timm.create_model("vix_softmax_tiny_rope", **SIZE, attn_drop_rate=0.3)
    timm_vix.convert(model, "nystrom", num_landmarks=4)
    assert [block.attn.core.dropout for block in model.blocks] == [0.3, 0.3]
