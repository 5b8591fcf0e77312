"""ConViT with our mixers: timm's ConViT where the two coincide."""

import logging

import pytest
import timm
import torch
from conftest import distance, lively
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from timm.models.convit import GPSA

from timm_vix.mixers import MIXERS
from timm_vix.mixers.gpsa import GatedPositionalAttention

SHAPE = dict(img_size=48, depth=3, local_up_to_layer=2, embed_dim=8, num_heads=4, num_classes=5)


def pretrained(tmp_path, reference, **options):
    """Ours, with the weights of timm's through timm's own loading."""
    save_file(reference.state_dict(), tmp_path / "convit.safetensors")
    overlay = {"file": str(tmp_path / "convit.safetensors"), "num_classes": reference.num_classes}
    return timm.create_model("convix_gpsa_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_timms_weights_give_timms_outputs_and_gradients(tmp_path, bias, caplog):
    reference = lively(timm.create_model("convit_tiny", **SHAPE, qkv_bias=bias).eval())
    with caplog.at_level(logging.WARNING):
        model = pretrained(tmp_path, reference, **SHAPE, qkv_bias=bias)
    assert "fine-tuning" not in caplog.text
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    mine, right = (m.double()(i) for m, i in zip((model, reference), inputs))
    assert distance(mine, right) < 1e-12
    mine.square().sum().backward()
    right.square().sum().backward()
    assert distance(inputs[0].grad, inputs[1].grad) < 1e-11
    gates = [core for core in model.modules() if isinstance(core, GatedPositionalAttention)]
    theirs = [attn for attn in reference.modules() if isinstance(attn, GPSA)]
    for ours, attn in zip(gates, theirs, strict=True):
        assert distance(ours.gating_param.grad, attn.gating_param.grad) < 1e-10
        assert distance(ours.pos_proj.grad, attn.pos_proj.weight.grad) < 1e-10


def test_the_published_layers_are_timms(tmp_path):
    options = dict(img_size=32, embed_dim=12, num_classes=5)
    reference = lively(timm.create_model("convit_tiny", **options).eval())
    model = pretrained(tmp_path, reference, **options).double()
    assert [type(block.attn).__name__ for block in model.blocks] == ["AttentionSlot"] * 10 + ["Attention"] * 2
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert distance(model(x), reference.double()(x)) < 1e-12
    taken = [m.forward_intermediates(x, indices=[3, 10], intermediates_only=True) for m in (model, reference)]
    assert all(distance(mine, right) < 1e-12 for mine, right in zip(*taken, strict=True))


def test_weights_go_to_another_grid(tmp_path):
    reference = lively(timm.create_model("convit_tiny", **SHAPE).eval())
    model = pretrained(tmp_path, reference, **{**SHAPE, "img_size": (32, 80)})
    same = pretrained(tmp_path, reference, **SHAPE)
    for key, value in model.state_dict().items():
        assert key == "pos_embed" or torch.equal(value, same.state_dict()[key]), key
    positions = resample_abs_pos_embed(reference.pos_embed, (2, 5), (3, 3), num_prefix_tokens=0)
    assert torch.equal(model.pos_embed, positions)


@pytest.mark.parametrize(
    "old, new", [((2, 8), (4, 4)), ((4, 4), (2, 8)), ((2, 8), (4, 8)), ((3, 5), (4, 8)), ((3, 5), (3, 5))], ids=str
)
def test_positions_of_a_saved_model_move_to_another_grid(old, new, tmp_path):
    before, after = (tuple(16 * side for side in grid) for grid in (old, new))
    saved = timm.create_model("convix_gpsa_tiny", **{**SHAPE, "img_size": before})
    save_for_hf(saved, tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=after)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(saved.pos_embed, new, old, num_prefix_tokens=0))


def test_starts_as_timms():
    model, reference = (timm.create_model(name, **SHAPE) for name in ("convix_gpsa_tiny", "convit_tiny"))
    for block, theirs in zip(model.blocks[:2], reference.blocks[:2]):
        assert torch.equal(block.attn.qkv.weight[64:], theirs.attn.v.weight)
        assert torch.equal(block.attn.core.pos_proj, theirs.attn.pos_proj.weight)
        assert torch.equal(block.attn.core.gating_param, theirs.attn.gating_param)
    for ours in (model.blocks[0].attn.qkv.weight[:64], model.blocks[2].attn.qkv.weight):
        assert 0.015 < ours.std() < 0.025


@pytest.mark.parametrize("mixer", ["softmax", "nystrom", "mixer", "retention"])
def test_another_mixer_takes_the_weights_without_the_positions(mixer, tmp_path, caplog):
    reference = timm.create_model("convit_tiny", **SHAPE)
    with caplog.at_level(logging.WARNING):
        model = pretrained(tmp_path, reference, mixer=mixer, **SHAPE)
    assert "Unused: " in caplog.text and "blocks.*.attn.core.gating_param" in caplog.text
    assert torch.equal(model.blocks[0].mlp.fc1.weight, reference.blocks[0].mlp.fc1.weight)
    if mixer != "mixer":
        attn = reference.blocks[0].attn
        assert torch.equal(model.blocks[0].attn.qkv.weight, torch.cat([attn.qk.weight, attn.v.weight]))


def test_some_layers_may_have_another_mixer(tmp_path, caplog):
    reference = lively(timm.create_model("convit_tiny", **SHAPE).eval())
    with caplog.at_level(logging.WARNING):
        model = pretrained(tmp_path, reference, layers={0: "gpsa", 2: "axial"}, **SHAPE)
    assert "the model needs fine-tuning" in caplog.text
    assert [type(getattr(block.attn, "core", None)) for block in model.blocks] == [
        GatedPositionalAttention,
        type(None),
        MIXERS["axial"],
    ]
    assert torch.equal(model.blocks[0].attn.core.gating_param, reference.blocks[0].attn.gating_param)
    assert model.blocks[2].attn.num_prefix_tokens == 1


def test_is_scripted():
    model = lively(timm.create_model("convix_gpsa_tiny", **{**SHAPE, "depth": 2, "local_up_to_layer": 1}).eval())
    x = torch.randn(2, 3, 48, 48)
    assert distance(torch.jit.script(model)(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"local_up_to_layer": 3}, "local_up_to_layer=3: expected an integer from 1 to 2"),
        ({"local_up_to_layer": 0}, "local_up_to_layer=0.*from 1 to 2"),
        ({"img_size": 40}, "img_size=40 is no multiple of patch_size=16"),
        ({"mixer": "convit"}, "mixer='convit'.*gpsa"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model("convix_gpsa_tiny", **{**SHAPE, **wrong})
