"""Exact attention inside a window beside pooled tokens, against loops and against softmax."""

import pytest
import torch
from conftest import LAYOUTS, check_equal, distance, image, rounding, small
from torch.nn.functional import adaptive_avg_pool2d

from timm_vix.mixers._dilated import from_windows, to_windows
from timm_vix.mixers._masks import MaskedPooling, cell_averages
from timm_vix.mixers._windows import axes, landmarks_and_windows, masked_biases, window_biases


@pytest.mark.parametrize("grid, w", [((6, 4), 2), ((7, 5), 3), ((2, 3), 4), ((5, 1), 2)])
def test_windows_hold_neighbours_and_give_them_back(grid, w):
    H, W = grid
    x = torch.arange(H * W).float().reshape(1, H * W, 1) + 1
    cut = to_windows(x, grid, *axes(grid, w))
    across = -(-W // w)
    for row in range(H):
        for column in range(W):
            window, inside = (row // w) * across + column // w, (row % w) * w + column % w
            assert cut[0, window, inside, 0] == row * W + column + 1
    assert cut.sum() == x.sum()
    assert torch.equal(from_windows(cut, grid, *axes(grid, w)), x)


def naive(q, k, v, keys, values, grid, cells, P, w, read=None, counts=None):
    """Query by query: prefix tokens, what of each cell lies outside the window, each token inside it.

    With ``read`` (P + H·W) masked tokens are left out. The part of a cell that lies in a window is that of its unmasked
    patches, or of all of its patches where none is unmasked. ``counts`` (h, cells): how many tokens a cell stands for.
    """
    H, W = grid
    read = torch.ones(P + H * W, dtype=torch.bool) if read is None else read
    share = adaptive_avg_pool2d(torch.eye(H * W, dtype=q.dtype).reshape(H * W, H, W), cells).flatten(1).T  # (cells, HW)
    counts = torch.full((1, len(share)), H * W / len(share), dtype=q.dtype) if counts is None else counts
    for j in range(len(share)):
        unmasked = share[j] * read[P:]
        if unmasked.any():
            share[j] = unmasked / unmasked.sum()
    y = torch.empty_like(v)
    for i in range(H * W):
        row, column = divmod(i, W)
        window = [r * W + c for r in range(H) for c in range(W) if r // w == row // w and c // w == column // w]
        scale = q.shape[-1] ** -0.5
        logits = [(keys[:, :, j] * q[:, :, i]).sum(-1) * scale for j in range(P) if read[j]]
        sources = [values[:, :, j] for j in range(P) if read[j]]
        for j in range(len(share)):
            left = counts[:, j] * (1 - float(share[j, window].sum()))
            if left.max() > 1e-6:
                logits.append((keys[:, :, P + j] * q[:, :, i]).sum(-1) * scale + left.log())
                sources.append(values[:, :, P + j])
        for j in (token for token in window if read[P + token]):
            logits.append((k[:, :, j] * q[:, :, i]).sum(-1) * scale)
            sources.append(v[:, :, j])
        weights = torch.stack(logits, dim=-1).softmax(-1)
        y[:, :, i] = (weights.unsqueeze(-1) * torch.stack(sources, dim=2)).sum(2)
    return y


@pytest.mark.parametrize("P, E", [(0, 4), (1, 4), (5, 4), (1, 6)])
@pytest.mark.parametrize(
    "grid, cells, w", [((6, 4), (3, 2), 2), ((7, 5), (3, 2), 3), ((7, 5), (7, 5), 2), ((5, 8), (2, 4), 1)]
)
def test_against_a_loop(grid, cells, w, P, E):
    n, m = grid[0] * grid[1], P + cells[0] * cells[1]
    q, k, v = (torch.randn(2, 3, n, width, dtype=torch.float64, requires_grad=True) for width in (4, 4, E))
    keys, values = (torch.randn(2, 3, m, width, dtype=torch.float64, requires_grad=True) for width in (4, E))
    y = landmarks_and_windows(q, k, v, keys, values, window_biases(q, P, grid, cells, w), grid, w)
    expected = naive(q, k, v, keys, values, grid, cells, P, w)
    check_equal(y, expected, (q, k, v, keys, values), rounding(torch.float64))


@pytest.mark.parametrize("mixer", ["linformer", "nystrom"])
@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("grid, cells, w", [((6, 4), (3, 2), 2), ((7, 5), (3, 2), 3), ((5, 8), (2, 4), 1)])
def test_with_masked_tokens_against_a_loop(grid, cells, w, P, mixer):
    """Among them a whole cell, and in another image every second token.

    Each head of Linformer has landmarks of its own, whose counts follow from its weights: a cell with masked patches
    alone may count, too.
    """
    n, m = grid[0] * grid[1], P + cells[0] * cells[1]
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keys, values = (torch.randn(2, 3, m, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    read = torch.rand(2, P + n) < 0.7
    read[0, P : P + n // 2], read[1, ::2], read[:, -1] = False, True, True
    averages, counts = (part.unsqueeze(1) for part in cell_averages(read[:, P:], grid, cells, True, q))
    assert (counts[0] == 0).any()
    if mixer == "linformer":
        counts = 0.5 + torch.rand(2, 3, m - P, dtype=torch.float64)
    pooling = MaskedPooling(read, averages, averages, averages, counts)
    y = landmarks_and_windows(q, k, v, keys, values, masked_biases(pooling, q, P, grid, cells, w), grid, w)
    one = [[part[i : i + 1] for part in (q, k, v, keys, values)] for i in (0, 1)]
    expected = torch.cat([naive(*one[i], grid, cells, P, w, read[i], counts[i]) for i in (0, 1)])
    check_equal(y, expected, (q, k, v, keys, values), rounding(torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [None, "axial"])
@pytest.mark.parametrize("mixer", ["linformer", "nystrom"])
def test_a_window_over_the_whole_grid_is_softmax_for_the_patches(mixer, rope, layout):
    # Nyström fits its landmarks' values, prefix tokens among them; a ridge without end leaves them as they are
    ridge = {"ridge": 1e9} if mixer == "nystrom" else {}
    model = small(mixer, rope, window_size=7, **ridge, **LAYOUTS[layout]).double()
    softmax = small("softmax", rope, **LAYOUTS[layout]).double()
    softmax.load_state_dict({k: v for k, v in model.state_dict().items() if k in softmax.state_dict()})
    if rope is None:
        softmax.blocks[0].attn.fused_attn = False
    x = torch.randn(2, 35 + model.num_prefix_tokens, 32, dtype=torch.float64)
    P = model.num_prefix_tokens
    read = torch.rand(2, 1, 1, P + 35) < 0.6
    read[..., -1] = True
    for mask in (None, read):
        ours, theirs = (each.blocks[0].attn(x, attn_mask=mask) for each in (model, softmax))
        assert distance(ours[:, P:], theirs[:, P:]) < rounding(torch.float32)  # and a fit of a billionth is left


@pytest.mark.parametrize("mixer", ["nystrom", "linformer"])
def test_a_window_larger_than_the_grid_is_the_grid(mixer):
    whole, larger = (small(mixer, window_size=size, depth=1) for size in (8, 10**6))
    larger.load_state_dict(whole.state_dict())
    x = image(whole)
    assert max(whole.patch_embed.grid_size) <= 8
    assert torch.equal(larger(x), whole(x))
