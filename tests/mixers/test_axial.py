"""Axial attention against its formula in a loop, and against softmax attention where it is exact."""

import pytest
import torch
from conftest import LAYOUTS, check_equal, distance, gradients, heads_of, image, joined, small

from timm_vix.mixers._layout import TokenLayout


def head_by_loop(q, k, v, P, grid, w):
    """One head by the formula: q, k, v (N, D) -> (N, D), with strips of w columns."""
    (H, W), scale = grid, q.shape[1] ** -0.5
    place = [[P + i * W + j for j in range(W)] for i in range(H)]
    out = [(k @ q[n] * scale).softmax(0) @ v for n in range(P)]
    for i in range(H):
        for j in range(W):
            query = q[place[i][j]]
            strip = [c for c in range(W) if c // w == j // w]
            exact = [*range(P), *(place[r][c] for r in range(H) for c in strip)]
            logits, values = [query @ k[n] * scale for n in exact], [v[n] for n in exact]
            for r in range(H):
                rest = [place[r][c] for c in range(W) if c not in strip]
                if rest:
                    there = q[place[r][j]]  # the row's mass, and its slope, at the row's own query
                    at = k[rest] @ there * scale
                    key = at.softmax(0) @ k[rest]
                    logits.append(at.logsumexp(0) + (query - there) @ key * scale)
                    values.append(at.softmax(0) @ v[rest])
            out.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    return torch.stack(out)


def by_loop(module, x, first):
    """The slot's output, (B, N, C) -> (B, N, C)."""
    (H, W), P = module.grid, module.num_prefix_tokens
    q, k, v = heads_of(module, x)
    order = torch.arange(P + H * W)
    if first == "columns":  # the same on the transposed grid
        order[P:] = order[P:].reshape(H, W).T.flatten()
        H, W = W, H
    q, k, v = q[:, :, order], k[:, :, order], v[:, :, order]
    w = module.core.strip_width
    heads = [[head_by_loop(q[b, a], k[b, a], v[b, a], P, (H, W), w) for a in (0, 1)] for b in range(len(x))]
    y = torch.stack([torch.stack(each) for each in heads])[:, :, order.argsort()]
    return joined(module, y)


@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("strip_width", [1, 2, 3])
@pytest.mark.parametrize("layout", ["class", "no_prefix", "registers"])
def test_equals_a_loop(layout, strip_width, first):
    model = small("axial", img_size=(8, 10), strip_width=strip_width, first=first, **LAYOUTS[layout])
    module = model.double().blocks[0].attn
    N = module.num_prefix_tokens + 20
    x = torch.randn(2, N, 32, dtype=torch.float64, requires_grad=True)
    expected = by_loop(module, x, first)
    check_equal(module(x), expected, x, 1e-12)
    softmax = small("softmax", img_size=(8, 10), **LAYOUTS[layout]).double()
    softmax.load_state_dict(model.state_dict())
    assert distance(softmax.blocks[0].attn(x), expected) > 1e-4, "where softmax attention isn't it"


@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("size", [(2, 16), (16, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("rope", [None, "axial", "1d"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_softmax_attention_on_one_row_or_column(layout, rope, size, first):
    model = small("axial", rope, img_size=size, first=first, **LAYOUTS[layout]).double()
    softmax = small("softmax", rope, img_size=size, **LAYOUTS[layout]).double()
    softmax.load_state_dict(model.state_dict())
    x = image(model).double()
    assert distance(model(x), softmax(x)) < 1e-12
    assert distance(gradients(model, x), gradients(softmax, x)) < 1e-12


def test_is_softmax_attention_in_a_strip_of_the_whole_width():
    model = small("axial", img_size=(12, 6), strip_width=3).double()
    softmax = small("softmax", img_size=(12, 6)).double()
    softmax.load_state_dict(model.state_dict())
    x = image(model).double()
    assert distance(model(x), softmax(x)) < 1e-12


@pytest.mark.parametrize("wrong", [{"strip_width": 0}, {"strip_width": 1.5}, {"first": "row"}], ids=str)
def test_wrong_keywords_are_named(wrong):
    (name, value), allowed = *wrong.items(), {"strip_width": "at least 1", "first": "columns"}
    with pytest.raises(ValueError, match=f"{name}={value!r}.*{allowed[name]}"):
        small("axial", **wrong)


def test_large_values_in_float16():
    """Weights are divided by their sum after the product with the values, which float16 couldn't hold."""
    module = small("axial", depth=1, img_size=(64, 64)).blocks[0].attn
    layout = TokenLayout(module.num_prefix_tokens, module.grid)
    q = torch.zeros(1, 2, module.num_tokens, 16, dtype=torch.float16)
    y = module.core(q, q, torch.full_like(q, 1000), layout, layout)
    assert distance(y, torch.full_like(y, 1000)) < 1e-3
