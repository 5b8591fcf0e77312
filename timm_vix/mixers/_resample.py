"""Weights that are tied to a patch grid, moved to another grid.

An input weight is multiplied with the tokens and summed over the grid. It is resampled so that it gives for the new
tokens what the old weight gives for their averages over the old grid. So its sum stays the same, and a weight that
averages tokens still averages them. An output weight has a value for each token, and is interpolated bilinearly. The
rotary angle of a cell is the mean direction of its patches' angles.
"""

from typing import Optional

import torch
from torch.nn import functional as F

from ._layout import Grid


def averages(length: int, cells: int, like: torch.Tensor) -> torch.Tensor:
    """The weights that average an axis of ``length`` tokens over each of ``cells``: (cells, length)."""
    identity = torch.eye(length, device=like.device, dtype=like.dtype)
    return F.adaptive_avg_pool1d(identity.unsqueeze(0), cells)[0].transpose(0, 1)


def region_averages(cells: Grid, grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """The (m, H·W) weights that average the patches of ``grid`` over each of ``cells``."""
    rows, columns = averages(grid[0], cells[0], like), averages(grid[1], cells[1], like)
    return torch.einsum("ih,jw->ijhw", rows, columns).flatten(2).flatten(0, 1)


def pool_patches(x: torch.Tensor, num_prefix_tokens: int, grid: Grid, cells: Grid) -> torch.Tensor:
    """Average the patch tokens over a coarser grid, prefix tokens apart: (B, P + H·W, C) -> (B, P + m, C).

    It is a product with one small matrix for each axis. torch's pooling takes channels first and keeps a copy of all
    tokens in that order for its gradient, which is several times as slow.
    """
    if cells == grid:
        return x
    B, _, C = x.shape
    rows = averages(grid[0], cells[0], x)
    columns = rows if (grid[0], cells[0]) == (grid[1], cells[1]) else averages(grid[1], cells[1], x)
    patches = x[:, num_prefix_tokens:].reshape(B, grid[0], grid[1] * C)
    pooled = torch.bmm(rows.expand(B, -1, -1), patches).reshape(B * cells[0], grid[1], C)
    pooled = torch.bmm(columns.expand(B * cells[0], -1, -1), pooled).reshape(B, cells[0] * cells[1], C)
    return torch.cat([x[:, :num_prefix_tokens], pooled], dim=1)


def resample_input_weight(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Resample a weight that is multiplied with tokens and summed over H x W: (..., H, W) -> (..., *grid)."""
    if weight.shape[-2] == grid[0] and weight.shape[-1] == grid[1]:
        return weight
    # row i of the averages holds the share of each new row in old row i
    rows, columns = averages(grid[0], weight.shape[-2], weight), averages(grid[1], weight.shape[-1], weight)
    return rows.transpose(0, 1) @ weight @ columns


def resample_output_weight(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Resample a weight that has a value for each token of H x W: (n, H, W) -> (n, *grid)."""
    if weight.shape[-2] == grid[0] and weight.shape[-1] == grid[1]:
        return weight
    return F.interpolate(weight.unsqueeze(0), size=list(grid), mode="bilinear", align_corners=False)[0]


def mean_direction(waves: torch.Tensor) -> torch.Tensor:
    """Scale means of sines and cosines (.., 2·D) to the sine and cosine of their mean direction.

    Opposite angles have none. Where the mean is shorter than a hundredth, rounding errors would decide it, so that it
    isn't scaled to length 1 but by 100, and is 0 where there are no patches.
    """
    # half precision would round the squares
    sine, cosine = waves.to(torch.promote_types(waves.dtype, torch.float32)).chunk(2, dim=-1)
    length = torch.sqrt((sine.square() + cosine.square()).clamp(min=1e-4))
    return torch.cat([sine / length, cosine / length], dim=-1).to(waves.dtype)


def table_of_cells(
    table: torch.Tensor,
    num_prefix_tokens: int,
    grid: Grid,
    cells: Optional[Grid],
    weight: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """A host's rotary table (.., H·W, 2·D) for prefix tokens, which are not rotated, and patches or cells.

    Evenly spaced angles have the cell's centre for their mean direction, whatever the frequencies, as long as the cell
    is shorter than a wave; beyond that an average of the patches is not meaningful.

    ``weight`` (B, 1, m, H·W): of the patches in each cell, where some of them are masked.
    """
    width = table.shape[-1]
    if weight is not None:
        table = mean_direction(torch.matmul(weight.to(table.dtype), table))
    elif cells is not None and cells != grid:
        shape = list(table.shape[:-2])
        shape += [cells[0] * cells[1], width]  # TorchScript unpacks no list
        waves = table.reshape(-1, grid[0] * grid[1], width).transpose(1, 2).reshape(-1, width, grid[0], grid[1])
        waves = F.adaptive_avg_pool2d(waves, cells).flatten(2).transpose(1, 2)
        table = mean_direction(waves).reshape(shape)
    unrotated = torch.zeros_like(table[..., :1, :]).repeat_interleave(num_prefix_tokens, dim=-2)
    unrotated[..., width // 2 :] = 1.0
    return torch.cat([unrotated, table], dim=-2)
