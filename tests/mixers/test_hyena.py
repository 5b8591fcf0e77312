"""Hyena's convolution against loops over offsets in float64, and prefix tokens against softmax attention."""

import math

import pytest
import torch
from conftest import LAYOUTS, check_equal, distance, heads_of, joined, small
from einops import rearrange
from torch.nn.functional import conv2d, scaled_dot_product_attention


def filter_at(core, y, x):
    """h at an offset of y rows and x columns, by the formula: (C,)."""
    y, x = y / core.reference_size, x / core.reference_size
    features = [y, x]
    for k in range(1, (core.emb_dim - 1) // 2 + 1):
        for axis in (y, x):
            features += [math.cos(math.pi * k * axis), math.sin(math.pi * k * axis)]
    hidden = torch.tensor(features, dtype=torch.float64)
    hidden = torch.sin(core.filter_in @ hidden + core.filter_in_bias)
    for weight, bias in zip(core.filter_inner, core.filter_inner_bias):
        hidden = torch.sin(weight @ hidden + bias)
    C = len(core.skip)
    decay = [
        math.exp(-math.hypot(y, x) * math.log(100) * (1 / 1.5 + (1 / 0.3 - 1 / 1.5) * c / (C - 1))) for c in range(C)
    ]
    return (core.filter_out @ hidden) * torch.tensor(decay, dtype=torch.float64)


def by_loop(module, x, grid):
    """The slot's output, (B, N, C) -> (B, N, C)."""
    (H, W), P, core = grid, module.num_prefix_tokens, module.core
    q, k, v = heads_of(module, x)
    prefix = scaled_dot_product_attention(q[:, :, :P], k, v)
    images = [rearrange(t[:, :, P:], "b h (y x) d -> b (h d) y x", y=H) for t in (q, k, v)]
    q, k, v = (
        conv2d(t, w, b, padding="same", groups=len(w))
        for t, w, b in zip(images, core.short_filter.chunk(3), core.short_filter_bias.chunk(3))
    )
    h = {(y, x): filter_at(core, y, x) for y in range(1 - H, H) for x in range(1 - W, W)}
    places = [(i, j) for i in range(H) for j in range(W)]
    out = []
    for i, j in places:
        z = sum(h[i - r, j - c] * (k * v)[:, :, r, c] for r, c in places) + core.skip * (k * v)[:, :, i, j]
        out.append((q[:, :, i, j] * z).unflatten(1, (2, 16)))
    return joined(module, torch.cat([prefix, torch.stack(out, dim=2)], dim=2))


@pytest.mark.parametrize(
    "options", [{}, {"emb_dim": 5, "num_inner_mlps": 1, "short_filter_order": 5, "reference_size": 3}], ids=len
)
@pytest.mark.parametrize("layout", ["class", "no_prefix", "registers"])
@pytest.mark.parametrize("size", [(6, 8), (2, 10), (10, 2), (2, 2)], ids=str)
def test_equals_a_loop(size, layout, options):
    model = small("hyena", img_size=size, depth=1, filter_order=8, **options, **LAYOUTS[layout]).double()
    module = model.blocks[0].attn
    H, W = module.grid
    x = torch.randn(2, module.num_prefix_tokens + H * W, 32, dtype=torch.float64, requires_grad=True)
    expected = by_loop(module, x, (H, W))
    check_equal(module(x), expected, (x, *module.parameters()), 1e-12)


def test_another_grid_has_the_same_filter():
    model = small("hyena", depth=1, filter_order=8, dynamic_img_size=True).double()
    module, seen = model.blocks[0].attn, []
    module.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    for H, W in ((4, 3), (8, 5)):
        model(torch.randn(1, 3, 2 * H, 2 * W, dtype=torch.float64))
        x, y = seen.pop()
        assert distance(y, by_loop(module, x, (H, W))) < 1e-12


@pytest.mark.parametrize(
    "wrong",
    [
        {"filter_order": 0},
        {"num_inner_mlps": 0},
        {"emb_dim": 2},
        {"w": 0},
        {"short_filter_order": 4},
        {"reference_size": 0},
    ],
    ids=str,
)
def test_wrong_keywords_are_named(wrong):
    (name, value), odd = *wrong.items(), ("emb_dim", "short_filter_order")
    with pytest.raises(ValueError, match=f"{name}={value}: expected.*{'odd' if name in odd else 'at least'}"):
        small("hyena", **wrong)


def test_rotary_positions_are_refused():
    with pytest.raises(ValueError, match="rope.*gated long convolution"):
        small("hyena", "axial")
