"""Weights that are tied to a patch grid, moved to another grid.

A weight that reads tokens (rows of functionals over the grid) meets new tokens averaged onto the grid that it knows:
its sums are kept exactly, and averaging stays averaging. A weight that writes tokens is interpolated bilinearly.
Both are products of one small matrix an axis.
"""

import torch
from timm.layers import register_notrace_function
from torch.nn import functional as F

from ._slot import Grid


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
