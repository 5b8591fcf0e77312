"""Retention against its formula: dense biased attention of each row, then of each column."""

import math

import pytest
import torch
from conftest import LAYOUTS, distance, small


def head_by_loop(q, k, v, P, grid, gamma, locality=0.0):
    """One head by the formula: q, k, v (N, D) -> (N, D)."""
    (H, W), scale = grid, q.shape[1] ** -0.5
    place = [[P + i * W + j for j in range(W)] for i in range(H)]
    out = [(k @ q[n] * scale).softmax(0) @ v for n in range(P)]
    row_v = {}
    for i in range(H):
        for j in range(W):
            decay = torch.tensor(
                [math.log(gamma) * abs(j - c) - locality * (j - c) ** 2 for c in range(W)], dtype=q.dtype
            )
            row_v[i, j] = (k[place[i]] @ q[place[i][j]] * scale + decay).softmax(0) @ v[place[i]]
    for i in range(H):
        for j in range(W):
            count = sum(gamma ** abs(j - c) * math.exp(-locality * (j - c) ** 2) for c in range(W))
            weights = [torch.exp(q[place[i][j]] @ k[n] * scale) for n in range(P)]
            weights += [
                count
                * gamma ** abs(i - r)
                * math.exp(-locality * (i - r) ** 2)
                * torch.exp(q[place[i][j]] @ k[place[r][j]] * scale)
                for r in range(H)
            ]
            values = [v[n] for n in range(P)] + [row_v[r, j] for r in range(H)]
            out.append(sum(w * value for w, value in zip(weights, values)) / sum(weights))
    return torch.stack(out)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"decay_start": 2, "decay_range": 6.0}, {"locality": 0.3}],
    ids=["gentle", "published", "local"],
)
@pytest.mark.parametrize("size", [(10, 6), (2, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("layout", ["class", "no_prefix", "registers"])
def test_equals_a_loop(layout, size, keywords):
    module = small("retention", img_size=size, **keywords, **LAYOUTS[layout]).double().blocks[0].attn
    (H, W), P = module.grid, module.num_prefix_tokens
    x = torch.randn(2, P + H * W, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    a, b = keywords.get("decay_start", 6), keywords.get("decay_range", 4)
    gammas = [1 - 2 ** -(a + b * head / 2) for head in (0, 1)]
    local = keywords.get("locality", 0.0)
    heads = [[head_by_loop(q[i, t], k[i, t], v[i, t], P, (H, W), gammas[t], local) for t in (0, 1)] for i in (0, 1)]
    y = torch.stack([torch.stack(each) for each in heads])
    expected = y.transpose(1, 2).flatten(2) @ module.proj.weight.T + module.proj.bias
    assert distance(module(x), expected) < 1e-12
    weight = torch.randn_like(expected)
    mine, right = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (module(x), expected))
    assert distance(mine, right) < 1e-12


@pytest.mark.parametrize("wrong", [{"decay_start": 0.5}, {"decay_start": "6"}, {"decay_range": -1}], ids=str)
def test_wrong_keywords_are_named(wrong):
    (name, value), allowed = *wrong.items(), {"decay_start": "at least 1", "decay_range": "at least 0"}
    with pytest.raises(ValueError, match=f"{name}={value!r}.*{allowed[name]}"):
        small("retention", **wrong)
