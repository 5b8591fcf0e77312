"""Landmarks and windows in one softmax: each patch attends to the tokens of its window, and to landmarks for the rest.

    P_i = softmax(Q_i K~^T / sqrt(D) + c_i  |  Q_i K_w^T / sqrt(D))        landmarks | tokens of the window of i
    Y_i = P_i [X | V_w]

The patch grid is cut into windows of w x w tokens; the last ones are smaller. c_i is the log of the number of tokens
that a landmark stands for outside of the window. So no token counts twice, and a cell inside the window is left out.
For a long sequence attention weights are computed again in the backward pass, see ``_fused.py``.

Shapes: B images, h heads, D head width, m landmarks (P prefix tokens, then cells), n windows.
"""

import torch
from torch.nn import functional as F

from ._dilated import Axis, from_windows, to_windows
from ._fused import checkpoint_if_long
from ._layout import Grid
from ._resample import averages

# As in ``_fused.py``, but earlier: windows keep copies of queries, keys and values besides.
LONG = 512


def axes(grid: Grid, w: int) -> tuple[Axis, Axis]:
    """Windows of w x w tokens over a grid, without dilation."""
    return (-(-grid[0] // w), w, 1), (-(-grid[1] // w), w, 1)


def shares(length: int, cells: int, w: int, like: torch.Tensor) -> torch.Tensor:
    """What share of each cell lies in each window, along one axis: (windows, cells)."""
    pooled = averages(length, cells, like).transpose(0, 1)
    return F.pad(pooled, [0, 0, 0, -length % w]).reshape(-1, w, cells).sum(1)


def window_biases(like: torch.Tensor, num_prefix_tokens: int, grid: Grid, cells: Grid, w: int) -> torch.Tensor:
    """c for landmarks and the mask of each window's tokens, (n, 1, P + m + w·w)."""
    full = torch.empty([0], device=like.device)  # logarithms are computed in float32 for every dtype of the tokens
    rows, columns = shares(grid[0], cells[0], w, full), shares(grid[1], cells[1], w, full)
    inside = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)
    beside = (1.0 - inside).clamp(min=0.0) * (grid[0] * grid[1] / (cells[0] * cells[1]))
    beside = torch.where(beside < 1e-4, 0.0, beside).log()
    window_rows, window_columns = axes(grid, w)
    ones = torch.ones([1, grid[0] * grid[1], 1], device=like.device)
    here = to_windows(ones, grid, window_rows, window_columns)[0, :, :, 0].log()
    biases = torch.cat([torch.zeros([here.shape[0], num_prefix_tokens], device=like.device), beside, here], dim=1)
    return biases.unsqueeze(1).to(like.dtype)


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

    Queries and keys are D wide, values E.
    """
    if torch.jit.is_scripting():
        return attend_to_both(q, k, v, landmark_keys, landmark_values, biases, grid, w, dropout)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
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
    weights = F.dropout((torch.cat([far, near], dim=3) + biases).softmax(3), dropout, dropout > 0.0)
    y = torch.matmul(weights[..., :m].flatten(1, 2), landmark_values.flatten(0, 1)).unflatten(1, q.shape[1:3])
    y = from_windows(y + torch.matmul(weights[..., m:], v), grid, rows, columns)
    return y.reshape(B, h, y.shape[1], y.shape[2])
