"""Rotary positions of a patch grid, for tokens and for the cells that a mixer pools.

    angle(token, i) = position · theta^(-i / F)          F frequencies per axis

``axial``: half of a head's channels are rotated by the row, half by the column (Heo et al. 2024, arXiv 2403.13298,
theta 100). ``1d``: all channels are rotated by the position in raster order, as in Vision X-formers (Jeevan & Sethi,
arXiv 2107.02239, theta 10000). Prefix tokens are not rotated. A pooled token has the mean position of its patches: the
patches are pooled first, and the result is rotated. In the other order channels of high frequency cancel between
patches, and the product of a query and a pooled key no longer depends on their relative position alone.
"""

from typing import Optional

import torch
from timm.layers import freq_bands, register_notrace_module
from torch import nn

from .._checks import InputError
from ._layout import Grid
from ._resample import averages

THETA = {"axial": 100.0, "1d": 10000.0}


def mean_places(grid: Grid, cells: Grid, device: torch.device) -> list[torch.Tensor]:
    """Mean row and mean column of the patches of each of ``cells`` over a ``grid``, (cells, 1) each.

    Where cells don't divide the grid, a patch at their border belongs to two of them, as in the pooling of tokens.
    """
    rows = torch.arange(grid[0], device=device, dtype=torch.float32)
    columns = torch.arange(grid[1], device=device, dtype=torch.float32)
    if cells != grid:
        rows = torch.mv(averages(grid[0], cells[0], rows), rows)
        columns = torch.mv(averages(grid[1], cells[1], columns), columns)
    row = rows.reshape(-1, 1).expand(cells[0], cells[1]).reshape(-1, 1)
    column = columns.reshape(1, -1).expand(cells[0], cells[1]).reshape(-1, 1)
    return [row, column]


def rotary_table(
    like: torch.Tensor, row: torch.Tensor, column: torch.Tensor, num_columns: int, num_prefix_tokens: int,
    head_dim: int, theta: float, raster: bool,
) -> torch.Tensor:  # fmt: skip
    """Sine and cosine at places (.., n, 1) of a grid, after P rows of angle 0: (.., P + n, 2·D), as timm's."""
    device = like.device
    if raster:
        angles = (row * num_columns + column) * freq_bands(head_dim // 2, theta, 1, device)
    else:
        bands = freq_bands(head_dim // 4, theta, 1, device)
        angles = torch.cat([row * bands, column * bands], dim=-1)
    angles = torch.nn.functional.pad(angles, [0, 0, num_prefix_tokens, 0]).repeat_interleave(2, dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


@register_notrace_module
class RotaryPositions(nn.Module):
    """Sine and cosine for the patches of a grid, and for the cells of a coarser grid over them.

    Args:
        kind: "axial" or "1d".
        head_dim: D, a multiple of 4 for axial and of 2 for 1d.
        grid: (H, W).
        num_prefix_tokens: P.

    Raises:
        ValueError: for a head width that can't be split.
    """

    def __init__(
        self,
        kind: str,
        head_dim: int,
        grid: Grid,
        num_prefix_tokens: int,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        divisor = 2 if kind == "1d" else 4
        if head_dim % divisor:
            raise InputError(f"rope={kind!r} needs a head width that is a multiple of {divisor}, got {head_dim}")
        self.raster = kind == "1d"
        self.theta = THETA[kind]
        self.head_dim = head_dim
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        num_tokens = num_prefix_tokens + grid[0] * grid[1]
        self.register_buffer(
            "table", torch.empty(num_tokens, 2 * head_dim, device=device, dtype=dtype), persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill the table, which no checkpoint holds: timm's protocol for a model that was built on the meta device."""
        self.table.copy_(self.build(self.grid, self.grid))

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Move to another grid permanently."""
        if grid != self.grid:
            self.grid = grid
            self.table = self.build(grid, grid)

    def build(self, grid: Grid, cells: Grid, weight: Optional[torch.Tensor] = None) -> torch.Tensor:
        row, column = mean_places(grid, cells if weight is None else grid, self.table.device)
        if weight is not None:
            share = weight.to(row.dtype)
            row, column = torch.matmul(share, row), torch.matmul(share, column)
        P, D = self.num_prefix_tokens, self.head_dim
        return rotary_table(self.table, row, column, grid[1], P, D, self.theta, self.raster)

    def forward(self, grid: Grid, cells: Grid, weight: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Sine and cosine at the mean places of ``cells`` over the tokens' ``grid``: (P + cells, 2·D).

        ``weight`` (B, 1, cells, H·W): of the patches in each cell, where some of them are masked; then the places are
        the means of these patches, and the result is (B, 1, P + cells, 2·D).

        Nothing is kept of a grid other than the model's own: it belongs to one call.
        """
        if weight is not None:
            return self.build(grid, cells, weight)
        if torch.jit.is_scripting():
            is_own = grid == self.grid and cells == self.grid
        else:
            # the comparison would fix a side that is free in an export
            is_free = any(isinstance(side, torch.SymInt) for side in (*grid, *cells))
            is_own = not is_free and grid == self.grid and cells == self.grid
        return self.table if is_own else self.build(grid, cells)
