"""Layout of a token sequence: prefix tokens, then the patches of a grid in raster order.

Shapes: B images, N = P + H·W tokens (P prefix tokens: class and registers), C channels.
"""

import math
import threading
from typing import Any, NamedTuple, Optional

import torch

from .._checks import InputError

Grid = tuple[int, int]


class TokenLayout(NamedTuple):
    """P prefix tokens, then the patches of an H x W grid in raster order."""

    num_prefix_tokens: int
    grid: tuple[int, int]


def num_patches(layout: TokenLayout) -> int:
    """H·W."""
    return layout.grid[0] * layout.grid[1]


def num_tokens(layout: TokenLayout) -> int:
    """N = P + H·W."""
    return layout.num_prefix_tokens + num_patches(layout)


def check_sequence(
    x: torch.Tensor,
    layout: TokenLayout,
    attn_mask: Optional[torch.Tensor],
    is_causal: bool,
    supports_mask: bool,
    uses_grid: bool,
) -> None:
    """Raise ValueError for a mask that isn't supported, or if x (B, N, C) must be the whole layout and isn't."""
    if (attn_mask is not None or is_causal) and not supports_mask:
        given = "is_causal=True" if attn_mask is None else f"attn_mask of shape {list(attn_mask.shape)}"
        raise InputError(
            f"{given}: this token mixer does not support it. softmax takes any attn_mask and is_causal, with "
            f"merge_keys=1 and without conv_residual; a mask of keys, (B, 1, 1, N) with B={x.shape[0]} or 1 and "
            f"N={x.shape[1]}, is taken by linformer, performer, nystrom, axial, atrous, latent, retention, gpsa, pool, "
            "glu and relu too, without conv_residual"
        )
    if attn_mask is not None and not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        raise InputError(
            f"attn_mask has dtype {attn_mask.dtype}: expected booleans, or floating-point numbers that are added to "
            "logits; attn_mask.bool() is one of 1 and 0"
        )
    expected = num_tokens(layout)
    if uses_grid and x.shape[1] != expected:
        raise InputError(f"a sequence of {x.shape[1]} tokens doesn't match the layout, which has {expected} tokens")


def cell_grid(num_cells: int, grid: Grid) -> Grid:
    """Return (rows, columns) of the largest number of cells, at most ``num_cells``, that lie evenly over ``grid``.

    Evenly: on a square grid a cell is at most 2.5 times as long as wide. There 49 gives 7x7, 50 and 53 give 10x5.
    """
    height, width = grid
    if num_cells >= height * width:
        return grid
    limit = 2.5 * max(height, width) / min(height, width)
    for cells in range(num_cells, 0, -1):
        best, stretch = grid, limit
        for rows in range(1, min(cells, height) + 1):
            columns = cells // rows
            if rows * columns == cells and columns <= width:
                ratio = float(height * columns) / float(width * rows)
                ratio = max(ratio, 1.0 / ratio)
                if ratio <= stretch:
                    best, stretch = (rows, columns), ratio
        if best != grid:
            return best
    return 1, 1


def count_bias(like: torch.Tensor, layout: TokenLayout, num_cells: int) -> torch.Tensor:
    """Log of the number of tokens that each key stands for: 0 for prefix tokens, log(H·W/m) for m cells.

    Shape (1, 1, 1, P + m), in the dtype of ``like``.
    """
    bias = torch.zeros([1, 1, 1, layout.num_prefix_tokens + num_cells], device=like.device, dtype=like.dtype)
    bias[..., layout.num_prefix_tokens :] = math.log(num_patches(layout) / num_cells)
    return bias


# The grid of the images at hand, for hosts that take several sizes. timm hands the tokens alone to its blocks, and
# their number doesn't tell 10x20 from 20x10. Each thread has its own, so that replicas and concurrent requests don't
# meet.
_images = threading.local()


def grid_of_images() -> Optional[Grid]:
    """The patch grid of the forward pass that this thread is in; None before the first one."""
    return getattr(_images, "grid", None)


class RecordGrid:
    """Forward hook of a patch embedding with ``dynamic_img_size``, which gives (B, H, W, C): notes the grid."""

    def __call__(self, patch_embed: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        _images.grid = (output.shape[1], output.shape[2])


class CarryGrid:
    """Forward pre-hook of a block: the grid stays with the tokens that gradient checkpointing keeps.

    A checkpoint keeps the input of its first block and calls the blocks again in the backward pass, when this thread
    may have seen images of another size. The storage of the tokens outlives that; a new tensor has a new one.
    """

    def __call__(self, block: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not args:
            return
        try:
            storage = args[0].untyped_storage()
        except (RuntimeError, NotImplementedError):  # a tensor of torch.func, which isn't checkpointed
            return
        grid = getattr(storage, "patch_grid", None)
        if grid is None:
            storage.patch_grid = grid_of_images()
        else:
            _images.grid = grid
