"""Pooling against a loop over neighbours, and prefix tokens against softmax attention."""

import pytest
import torch
from conftest import LAYOUTS, check_equal, heads_of, joined, small
from torch.nn.functional import scaled_dot_product_attention


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(14, 10), (2, 10), (4, 4)], ids=str)
def test_equals_a_loop(size, layout):
    module = small("pool", img_size=size, **LAYOUTS[layout]).double().blocks[0].attn
    (H, W), P = module.grid, module.num_prefix_tokens
    x = torch.randn(2, P + H * W, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = heads_of(module, x)
    rows = [scaled_dot_product_attention(q[:, :, :P], k, v)[:, :, i] for i in range(P)]
    for r in range(H):
        for c in range(W):
            near = [(i, j) for i in range(r - 1, r + 2) for j in range(c - 1, c + 2) if 0 <= i < H and 0 <= j < W]
            mean = sum(v[:, :, P + i * W + j] for i, j in near) / len(near)
            rows.append(mean - v[:, :, P + r * W + c])
    check_equal(module(x), joined(module, torch.stack(rows, dim=2)), x, 1e-12)
