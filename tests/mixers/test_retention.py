"""Retention against its formula: dense biased attention of each row, then of each column."""

import math

import pytest
import torch
from conftest import LAYOUTS, check_equal, heads_of, joined, small


def head_by_loop(q, k, v, P, grid, gamma, locality=0.0, added=None):
    """One head by the formula: q, k, v (N, D) -> (N, D); ``added`` (N) to the logits of the keys."""
    (H, W), scale = grid, q.shape[1] ** -0.5
    added = torch.zeros(len(q), dtype=q.dtype) if added is None else added
    place = [[P + i * W + j for j in range(W)] for i in range(H)]
    out = [(k @ q[n] * scale + added).softmax(0) @ v for n in range(P)]
    asks, own = list(q), list(k)
    for row in place:
        left = [n for n in row if added[n] > -1000]
        for n in row:
            if added[n] <= -1000 and left:
                asks[n], own[n] = q[left].mean(0), k[left].mean(0)
    row_v = {}
    for i in range(H):
        for j in range(W):
            decay = torch.tensor(
                [math.log(gamma) * abs(j - c) - locality * (j - c) ** 2 for c in range(W)], dtype=q.dtype
            )
            row_v[i, j] = (k[place[i]] @ asks[place[i][j]] * scale + decay + added[place[i]]).softmax(0) @ v[place[i]]
    for i in range(H):
        for j in range(W):
            weights = [torch.exp(q[place[i][j]] @ k[n] * scale + added[n]) for n in range(P)]
            for r in range(H):
                here = [gamma ** abs(j - c) * math.exp(-locality * (j - c) ** 2 + added[place[r][c]]) for c in range(W)]
                decay = gamma ** abs(i - r) * math.exp(-locality * (i - r) ** 2)
                weights.append(sum(here) * decay * torch.exp(q[place[i][j]] @ own[place[r][j]] * scale))
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
    q, k, v = heads_of(module, x)
    a, b = keywords.get("decay_start", 6), keywords.get("decay_range", 4)
    gammas = [1 - 2 ** -(a + b * head / 2) for head in (0, 1)]
    local = keywords.get("locality", 0.0)
    heads = [[head_by_loop(q[i, t], k[i, t], v[i, t], P, (H, W), gammas[t], local) for t in (0, 1)] for i in (0, 1)]
    y = torch.stack([torch.stack(each) for each in heads])
    check_equal(module(x), joined(module, y), x, 1e-12)


@pytest.mark.parametrize("layout", ["class", "no_prefix"])
def test_masked_tokens_are_left_out(layout):
    """Masked ones, others that count more or less, and a whole row."""
    module = small("retention", img_size=(8, 6), locality=0.1, **LAYOUTS[layout]).double().blocks[0].attn
    (H, W), P = module.grid, module.num_prefix_tokens
    x = torch.randn(1, P + H * W, 32, dtype=torch.float64, requires_grad=True)
    added = torch.randn(P + H * W, dtype=torch.float64)
    added[P + 1] = added[P + 2 * W : P + 3 * W] = -1e4
    q, k, v = heads_of(module, x)
    gammas = [1 - 2 ** -(6 + 4 * head / 2) for head in (0, 1)]
    heads = [head_by_loop(q[0, t], k[0, t], v[0, t], P, (H, W), gammas[t], 0.1, added) for t in (0, 1)]
    y = torch.stack(heads).unsqueeze(0)
    check_equal(module(x, attn_mask=added[None, None, None, :]), joined(module, y), x, 1e-12)


@pytest.mark.parametrize("wrong", [{"decay_start": 0.5}, {"decay_start": "6"}, {"decay_range": -1}], ids=str)
def test_wrong_keywords_are_named(wrong):
    (name, value), allowed = *wrong.items(), {"decay_start": "at least 1", "decay_range": "at least 0"}
    with pytest.raises(ValueError, match=f"{name}={value!r}.*{allowed[name]}"):
        small("retention", **wrong)
