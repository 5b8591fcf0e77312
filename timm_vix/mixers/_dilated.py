"""Windows of a patch grid at a dilation: every d-th row and column makes a grid of its own, which is cut into windows.

By reshapes alone; a grid that windows or dilation don't divide is padded at the bottom and on the right.

Shapes: A images and heads, (A, H·W, D) tokens, (A, G, L, D) in G windows of L tokens.
"""

import ast
from typing import Any, Union

import torch
from torch.nn.functional import pad

from .._checks import InputError
from ._layout import Grid

DEFAULT_DILATIONS = (1, 2, 4)
Axis = tuple[int, int, int]  # windows along an axis, rows in each, dilation


def check_dilations(dilations: Union[int, str, tuple[int, ...], None]) -> list[int]:
    """The dilations as a list, from a list, a tuple, an integer or a string such as "1,2,4".

    Raises:
        ValueError: unless they are different positive integers.
    """
    values: Any = DEFAULT_DILATIONS if dilations is None else dilations
    if isinstance(values, str):
        try:
            values = ast.literal_eval(values)
        except (ValueError, SyntaxError):
            values = ()
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    if not values or not all(type(d) is int and d > 0 for d in values) or len(set(values)) < len(values):
        raise InputError(f"dilations={dilations!r}: expected different integers of at least 1, such as (1, 2, 4)")
    return values


def axis_layout(length: int, dilation: int, window_size: int) -> Axis:
    """Windows along an axis, rows in each, and dilation: the fewest equal windows of at most ``window_size`` rows."""
    dilation = min(dilation, length)  # every row is alone from here on
    windows = -(-length // (dilation * window_size))
    return windows, -(-length // (windows * dilation)), dilation


def to_windows(x: torch.Tensor, grid: Grid, rows: Axis, columns: Axis) -> torch.Tensor:
    """(A, H·W, D) -> (A, G, L, D), padded with zeros at the bottom and on the right."""
    A, _, D = x.shape
    (n, s, d), (m, t, e) = rows, columns
    below, right = n * s * d - grid[0], m * t * e - grid[1]
    x = x.reshape(A, grid[0], grid[1], D)
    if below > 0 or right > 0:  # torch copies also where there is nothing to add
        x = pad(x, (0, 0, 0, right, 0, below))
    return x.reshape(A, n, s, d, m, t, e, D).permute(0, 1, 3, 4, 6, 2, 5, 7).reshape(A, n * d * m * e, s * t, D)


def from_windows(y: torch.Tensor, grid: Grid, rows: Axis, columns: Axis) -> torch.Tensor:
    """The way back: (A, G, L, D) -> (A, H·W, D)."""
    A, _, _, D = y.shape
    (n, s, d), (m, t, e) = rows, columns
    y = y.reshape(A, n, d, m, e, s, t, D).permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(A, n * s * d, m * t * e, D)
    return y[:, : grid[0], : grid[1]].reshape(A, grid[0] * grid[1], D)
