"""Weights that are tied to a patch grid, moved to another grid.

A weight that reads tokens (rows of functionals over the grid) meets new tokens averaged onto the grid that it knows:
its sums are kept exactly, and averaging stays averaging. A weight that writes tokens is interpolated bilinearly.
Both are products of one small matrix an axis. A rotary table turns a cell by the mean direction of its patches.
"""

from typing import Optional

import torch
from timm.layers import register_notrace_function
from torch.nn import functional as F

Grid = tuple[int, int]


@torch.fx.wrap
@register_notrace_function
def resample_reading(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(..., H, W) that is summed with tokens over H x W -> (..., *grid)."""
    if weight.shape[-2] == grid[0] and weight.shape[-1] == grid[1]:
        return weight
    eye_h = torch.eye(grid[0], device=weight.device, dtype=weight.dtype)
    eye_w = torch.eye(grid[1], device=weight.device, dtype=weight.dtype)
    # column i of the pooled identity holds the share of each new row in old row i
    pool_h = F.adaptive_avg_pool1d(eye_h.unsqueeze(0), weight.shape[-2])[0]
    pool_w = F.adaptive_avg_pool1d(eye_w.unsqueeze(0), weight.shape[-1])[0]
    return pool_h @ weight @ pool_w.transpose(0, 1)


@torch.fx.wrap
@register_notrace_function
def resample_writing(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(n, H, W) that gives a value to each token of H x W -> (n, *grid)."""
    if weight.shape[-2] == grid[0] and weight.shape[-1] == grid[1]:
        return weight
    return F.interpolate(weight.unsqueeze(0), size=list(grid), mode="bilinear", align_corners=False)[0]


# A leaf for torch.fx: a tensor is made here on the device of ``table``.
@torch.fx.wrap
@register_notrace_function
def table_of_cells(table: torch.Tensor, num_prefix_tokens: int, grid: Grid, cells: Optional[Grid]) -> torch.Tensor:
    """A host's rotary table (.., H·W, 2·D) for prefix tokens, which are not turned, and patches or cells.

    Evenly spaced angles have the cell's centre for their mean direction, whatever the frequencies, as long as the cell
    is shorter than a wave; beyond that an average of the patches means little anyhow.
    """
    width = table.shape[-1]
    if cells is not None and cells != grid:
        shape = list(table.shape[:-2])
        shape += [cells[0] * cells[1], width]  # TorchScript unpacks no list
        waves = table.reshape(-1, grid[0] * grid[1], width).transpose(1, 2).reshape(-1, width, grid[0], grid[1])
        waves = F.adaptive_avg_pool2d(waves, cells).flatten(2).transpose(1, 2)
        sine, cosine = waves.chunk(2, dim=2)
        length = torch.sqrt(sine.square() + cosine.square()).clamp(min=1e-6)
        table = torch.cat([sine / length, cosine / length], dim=2).reshape(shape)
    unturned = torch.zeros_like(table[..., :1, :]).repeat_interleave(num_prefix_tokens, dim=-2)
    unturned[..., width // 2 :] = 1.0
    return torch.cat([unturned, table], dim=-2)
