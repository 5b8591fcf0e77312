"""Rotary positions of a patch grid, for tokens and for the cells into which a mixer pools them.

    angle(token, i) = position · theta^(-i / F)          F frequencies per axis

``axial``: half of a head's channels turn with the row, half with the column (Heo et al. 2024, arXiv 2403.13298, theta
100). ``1d``: all channels turn with the place in raster order, as in Vision X-formers (Jeevan & Sethi, arXiv
2107.02239, theta 10000). Prefix tokens are not turned. A pooled token stands at the mean position of its patches: it is
pooled first and turned afterwards. The other way round, fast channels of different patches cancel, and what is left of
a key no longer depends on relative position.
"""

import torch
from timm.layers import freq_bands, register_notrace_function
from torch import nn

from ._resample import Grid

THETA = {"axial": 100.0, "1d": 10000.0}


# A leaf for torch.fx: tensors are made here on the device of ``like``.
@torch.fx.wrap
@register_notrace_function
def rotary_table(
    like: torch.Tensor, grid: Grid, cells: Grid, num_prefix_tokens: int, head_dim: int, theta: float, raster: bool
) -> torch.Tensor:
    """Sine and cosine at the centres of ``cells`` of ``grid``, after P unturned rows: (P + cells, 2·D), as timm's."""
    device = like.device
    rows = (torch.arange(cells[0], device=device) + 0.5) * (grid[0] / cells[0]) - 0.5
    columns = (torch.arange(cells[1], device=device) + 0.5) * (grid[1] / cells[1]) - 0.5
    row = rows.reshape(-1, 1).expand(cells[0], cells[1]).reshape(-1, 1)
    column = columns.reshape(1, -1).expand(cells[0], cells[1]).reshape(-1, 1)
    if raster:
        angles = (row * grid[1] + column) * freq_bands(head_dim // 2, theta, 1, device)
    else:
        bands = freq_bands(head_dim // 4, theta, 1, device)
        angles = torch.cat([row * bands, column * bands], dim=1)
    angles = torch.cat([angles.new_zeros(num_prefix_tokens, head_dim // 2), angles]).repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


class RotaryPositions(nn.Module):
    """The table of a grid, kept, and that of any coarser grid over it, computed when asked for.

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
            raise ValueError(f"rope={kind!r} needs a head width that is a multiple of {divisor}, got {head_dim}")
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
        self.table.copy_(self.build(self.grid))

    def set_grid(self, grid: Grid) -> None:
        """Move to another grid."""
        if grid != self.grid:
            self.grid = grid
            self.table = self.build(grid)

    def build(self, cells: Grid) -> torch.Tensor:
        return rotary_table(
            self.table, self.grid, cells, self.num_prefix_tokens, self.head_dim, self.theta, self.raster
        )

    def forward(self, cells: Grid) -> torch.Tensor:
        """Sine and cosine for the cells of a grid over the tokens' own: (P + cells, 2·D)."""
        return self.table if cells == self.grid else self.build(cells)
