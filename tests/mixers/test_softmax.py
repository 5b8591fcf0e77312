"""Softmax with rotary positions against timm's ``AttentionRope``, and in raster order against a loop."""

import math

import pytest
import torch
from conftest import distance, image, rounding, small
from timm.layers import AttentionRope, RotaryEmbeddingCat

from timm_vix.mixers._layout import TokenLayout


def timm_twin(module, rope: bool = True) -> AttentionRope:
    """timm's rotary attention with the same weights."""
    twin = AttentionRope(32, 2, num_prefix_tokens=module.num_prefix_tokens).double()
    twin.load_state_dict(module.state_dict(), strict=False)
    return twin


@pytest.mark.parametrize("img_size", [(14, 10), (8, 8), (2, 18)])
@pytest.mark.parametrize("masked", ["", "bool", "float", "causal"])
@pytest.mark.parametrize("layout", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}], ids=len)
def test_axial_positions_are_those_of_timm(layout, masked, img_size):
    model = small("softmax", "axial", img_size=img_size, **layout).double()
    module = model.blocks[0].attn
    N = module.num_tokens
    mask = {"bool": torch.rand(N, N) < 0.7, "float": torch.randn(N, N, dtype=torch.float64)}.get(masked)
    if mask is not None and mask.dtype == torch.bool:
        mask |= torch.eye(N, dtype=torch.bool)
    kwargs = {"attn_mask": mask, "is_causal": masked == "causal"}
    table = RotaryEmbeddingCat(16, in_pixels=False, temperature=100.0, feat_shape=list(module.grid)).get_embed()
    x = torch.randn(2, N, 32, dtype=torch.float64, requires_grad=True)
    bound = rounding(torch.float32)  # our table was made in float32, as timm's
    ours, theirs = module(x, **kwargs), timm_twin(module)(x, rope=table.double(), **kwargs)
    assert distance(ours, theirs) < bound
    weight = torch.randn_like(ours)
    mine, reference = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs))
    assert distance(mine, reference) < bound


def raster_attention(module, x: torch.Tensor) -> torch.Tensor:
    """softmax(R(q) R(k)^T / sqrt(D)) v, a query and a head at a time; R turns pair i by place · 10000^(-2i / D)."""
    B, N, C = x.shape
    h, P = module.num_heads, module.num_prefix_tokens
    D = C // h
    qkv = (x @ module.qkv.weight.T + module.qkv.bias).reshape(B, N, 3, h, D)

    def turned(vector, token):
        if token < P:
            return vector
        pairs = []
        for i in range(D // 2):
            angle = (token - P) * 10000.0 ** (-2 * i / D)
            a, b = vector[2 * i], vector[2 * i + 1]
            pairs += [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
        return torch.stack(pairs)

    out = torch.zeros(B, N, h, D, dtype=x.dtype)
    for b in range(B):
        for head in range(h):
            keys = torch.stack([turned(qkv[b, t, 1, head], t) for t in range(N)])
            for t in range(N):
                weights = torch.softmax(keys @ turned(qkv[b, t, 0, head], t) / math.sqrt(D), dim=0)
                out[b, t, head] = weights @ qkv[b, :, 2, head]
    return out.reshape(B, N, C) @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("layout", [{}, {"class_token": False, "global_pool": "avg"}], ids=len)
def test_raster_positions_are_those_of_a_loop(layout):
    module = small("softmax", "1d", img_size=(6, 8), **layout).double().blocks[0].attn
    x = torch.randn(1, math.prod(module.grid) + module.num_prefix_tokens, 32, dtype=torch.float64)
    assert distance(module(x), raster_attention(module, x)) < rounding(torch.float32)  # so is the table's


@pytest.mark.parametrize("rope", ["axial", "1d"])
def test_attention_depends_on_relative_positions_only(rope):
    """Rolling query and key by the same offset leaves their product alone."""
    module = small("softmax", rope, class_token=False, global_pool="avg").double().blocks[0].attn
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 1, 35, 16)
    layout = TokenLayout(0, (7, 5))
    q, k = (module.rotate(part, layout, layout.grid) for part in (q, k))
    logits = (q @ k.transpose(2, 3)).reshape(7, 5, 7, 5)
    assert distance(logits[2:, 1:, 2:, 1:], logits[:-2, :-1, :-2, :-1]) < rounding(torch.float32)
    assert distance(logits[2:, 1:, 2:, :-1], logits[:-2, :-1, :-2, 1:]) > 0.1


def test_softmax_model_hands_the_mask_to_every_block():
    model = small("softmax", "axial", global_pool="avg").double()
    x = image(model).double()
    mask = torch.ones(36, 36, dtype=torch.bool).tril()
    assert distance(model(x, attn_mask=mask), model(x, is_causal=True)) < rounding(torch.float64)
    assert distance(model(x), model(x, is_causal=True)) > 1e-3
