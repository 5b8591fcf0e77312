"""Landmarks and windows in one softmax: each patch attends to the tokens of its window, and to landmarks for the rest.

    P_i = softmax(Q_i K~^T / sqrt(D) + c_i  |  Q_i K_w^T / sqrt(D))        landmarks | tokens of the window of i
    Y_i = P_i [X | V_w]

The patch grid is cut into windows of w x w tokens; the last ones are smaller. c_i is the log of the number of tokens
that a landmark stands for outside of the window. So no token counts twice, and a cell inside the window is left out.
With a mask of keys, landmarks and windows consist of the unmasked tokens only. For a long sequence attention weights
are computed again in the backward pass, see ``_fused.py``.

Shapes: B images, h heads, D head width, m landmarks (P prefix tokens, then cells), n windows.
"""

import torch
from torch.nn import functional as F

from ._dilated import Axis, from_windows, to_windows
from ._gradients import checkpoint_if_long
from ._layout import Grid
from ._masks import MaskedPooling, log_counts
from ._resample import averages

# As in ``_fused.py``, but earlier: windows keep copies of queries, keys and values besides.
LONG = 512


def axes(grid: Grid, w: int) -> tuple[Axis, Axis]:
    """Windows of w x w tokens over a grid, without dilation."""
    return (-(-grid[0] // w), w, 1), (-(-grid[1] // w), w, 1)


def shares_of_axis(length: int, cells: int, w: int, like: torch.Tensor) -> torch.Tensor:
    """What share of each cell lies in each window, along one axis: (windows, cells)."""
    pooled = averages(length, cells, like).transpose(0, 1)
    return F.pad(pooled, [0, 0, 0, -length % w]).reshape(-1, w, cells).sum(1)


def shares(grid: Grid, cells: Grid, w: int, like: torch.Tensor) -> torch.Tensor:
    """What share of each cell lies in each window, (n, m)."""
    rows, columns = shares_of_axis(grid[0], cells[0], w, like), shares_of_axis(grid[1], cells[1], w, like)
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)


def window_biases(like: torch.Tensor, num_prefix_tokens: int, grid: Grid, cells: Grid, w: int) -> torch.Tensor:
    """c for landmarks and the mask of each window's tokens, (n, 1, P + m + w·w)."""
    # logarithms are computed in float32 at least
    full = torch.empty([0], device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    beside = (1.0 - shares(grid, cells, w, full)).clamp(min=0.0) * (grid[0] * grid[1] / (cells[0] * cells[1]))
    beside = torch.where(beside < 1e-4, 0.0, beside).log()
    window_rows, window_columns = axes(grid, w)
    ones = torch.ones([1, grid[0] * grid[1], 1], device=like.device, dtype=full.dtype)
    here = to_windows(ones, grid, window_rows, window_columns)[0, :, :, 0].log()
    prefix = torch.zeros([here.shape[0], num_prefix_tokens], device=like.device, dtype=full.dtype)
    biases = torch.cat([prefix, beside, here], dim=1)
    return biases.unsqueeze(1).to(like.dtype)


def masked_biases(
    masked: MaskedPooling, like: torch.Tensor, num_prefix_tokens: int, grid: Grid, cells: Grid, w: int
) -> torch.Tensor:
    """``window_biases`` where tokens are masked, (B, g, n, 1, P + m + w·w), with g = 1 or the number of heads."""
    rows, columns = axes(grid, w)
    counts, P = masked.counts.unsqueeze(2), num_prefix_tokens
    # What share of each cell's unmasked patches lies in each window, (B, 1, n, m). A cell may have none and count all
    # the same: the weights of Linformer's landmarks lie anywhere.
    averages_of = masked.averages[:, 0].transpose(1, 2)
    inside = to_windows(averages_of, grid, rows, columns).sum(2).unsqueeze(1)
    empty = averages_of.sum(1)[:, None, None] < 0.5
    inside = torch.where(empty, shares(grid, cells, w, inside), inside)
    beside = counts * (1.0 - inside).clamp(min=0.0).to(counts.dtype)
    read = masked.read.to(counts.dtype).unsqueeze(2)
    here = to_windows(read[:, P:], grid, rows, columns)[..., 0].unsqueeze(1)
    prefix = read[:, :P].transpose(1, 2).unsqueeze(1)
    g, n = beside.shape[1], beside.shape[2]
    tokens = torch.cat([prefix.expand(-1, g, n, -1), beside, here.expand(-1, g, -1, -1)], dim=3)
    return log_counts(tokens, like).unsqueeze(3)


def landmarks_and_windows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    landmark_keys: torch.Tensor,
    landmark_values: torch.Tensor,
    biases: torch.Tensor,
    grid: Grid,
    w: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Y of the module's docstring: q, k, v of the patches (B, h, H·W, ·), landmarks (B, h, m, ·) -> (B, h, H·W, E).

    Queries and keys are D wide, values E. ``biases`` are those of ``window_biases`` or ``masked_biases``.
    """
    if torch.jit.is_scripting():
        return attend_to_both(q, k, v, landmark_keys, landmark_values, biases, grid, w, dropout)
    else:
        return checkpoint_if_long(
            attend_to_both, q.shape[2] >= LONG, q, k, v, landmark_keys, landmark_values, biases, grid, w, dropout
        )


def attend_to_both(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    landmark_keys: torch.Tensor,
    landmark_values: torch.Tensor,
    biases: torch.Tensor,
    grid: Grid,
    w: int,
    dropout: float,
) -> torch.Tensor:
    """``landmarks_and_windows`` without checkpointing."""
    B, h, _, D = q.shape
    m = landmark_keys.shape[2]
    rows, columns = axes(grid, w)
    q = to_windows(q.flatten(0, 1) * D**-0.5, grid, rows, columns)
    k, v = to_windows(k.flatten(0, 1), grid, rows, columns), to_windows(v.flatten(0, 1), grid, rows, columns)
    far = torch.matmul(q.flatten(1, 2), landmark_keys.flatten(0, 1).transpose(1, 2)).unflatten(1, q.shape[1:3])
    near = torch.matmul(q, k.transpose(2, 3))
    if biases.dim() == 5:
        biases = biases.expand(-1, h, -1, -1, -1).flatten(0, 1)
    weights = F.dropout((torch.cat([far, near], dim=3) + biases).softmax(3), dropout, dropout > 0.0)
    y = torch.matmul(weights[..., :m].flatten(1, 2), landmark_values.flatten(0, 1)).unflatten(1, q.shape[1:3])
    y = from_windows(y + torch.matmul(weights[..., m:], v), grid, rows, columns)
    return y.reshape(B, h, y.shape[1], y.shape[2])
