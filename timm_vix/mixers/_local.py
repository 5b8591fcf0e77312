"""The keywords that all mixers share: a convolution of the values, and for logits a bias that falls with distance.

``conv_residual``: Y + a depthwise 5x5 convolution of V over the patch grid, 0 for prefix tokens. Xiong et al. 2021
(arXiv 2102.03902, section 3.3), there over the sequence.

``locality`` = a subtracts a |p_i - p_j|^2 from the logit of patches i and j, where p is a position in rows and columns
of the key grid. Logits of prefix tokens don't change. The bias is a product of additional channels of queries and keys,
so no N x N bias is stored, and fused kernels can be used:

    -a |p_i - p_j|^2 = (2 a p_i) p_j + 1 (-a |p_j|^2) + (-a |p_i|^2) 1

The right-hand side is a product of four channels. Its terms nearly cancel, so half precision would lose the result.
Each channel is therefore split into two: one holds the leading eight bits, the other the rest. Eight additional
channels also keep the width of a head a multiple of eight, for which fused kernels are made.

Shapes: B images, N = P + H·W tokens, h heads, D width of a head's queries and keys, E of its values.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ._layout import Grid, TokenLayout

KERNEL_SIZE = 5
CHANNELS = 8  # that ``locality`` adds to a head; a default of an argument, since TorchScript reads no global numbers


class DepthwiseResidual(nn.Conv2d):
    """Depthwise 5x5 convolution of the values of the patches; prefix tokens get 0."""

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(
            width, width, KERNEL_SIZE, padding="same", groups=width, bias=False, device=device, dtype=dtype
        )

    def forward(self, v: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """(B, h, N, E) -> (B, h, N, E), or (B, N, C) -> (B, N, C)."""
        P, (height, width) = layout.num_prefix_tokens, layout.grid
        patches = v.transpose(-2, -1)[..., P:]
        image = patches.reshape(v.shape[0], self.weight.shape[0], height, width)
        local = self._conv_forward(image, self.weight, self.bias).reshape(patches.shape)
        return pad(local.transpose(-2, -1), (0, 0, P, 0))


def power_of_two(x: float) -> float:
    """The lowest power of two that is at least x, for x > 0."""
    power = 1.0
    while power < x:
        power *= 2.0
    while power >= 2.0 * x:
        power /= 2.0
    return power


def axis_places(count: int, key_count: int, like: torch.Tensor) -> torch.Tensor:
    """Coordinates of ``count`` tokens along an axis of ``key_count`` keys: 0 is the middle, 1 the distance of two keys.

    With fewer tokens than keys, tokens are at every s-th key, from the first on; with more, keys at every s-th token.
    """
    step = float(-(-key_count // count)) if count < key_count else 1.0 / -(-count // key_count)
    return torch.arange(count, device=like.device).to(like.dtype) * step - 0.5 * (key_count - 1)


def patch_places(grid: Grid, key_grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """Row, column and the sum of their squares, of each patch: (H·W, 3), see ``axis_places``."""
    rows = axis_places(grid[0], key_grid[0], like).reshape(-1, 1).expand(grid[0], grid[1])
    columns = axis_places(grid[1], key_grid[1], like).reshape(1, -1).expand(grid[0], grid[1])
    return torch.stack([rows, columns, rows.square() + columns.square()], dim=2).flatten(0, 1)


def split_bits(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Split x (N, n), of absolute values up to ``limit``, into the leading eight bits and the rest: (N, 2·n)."""
    step = power_of_two(limit) / 128.0
    high = (x / step).round() * step
    return torch.cat([high, x - high], dim=1)


def locality_channels(
    locality: float,
    head_dim: int,
    queries: TokenLayout,
    keys: TokenLayout,
    like: torch.Tensor,
    channels: int = CHANNELS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of queries (1, 1, Nq, 8) and of keys (1, 1, Nk, 8), whose product is the bias times sqrt(D + 8).

    Both have about the same size, which Performer's random features need. A channel that was split is
    multiplied by a number of few bits: a coordinate of a key, or a power of two.
    """
    dtype = like.dtype
    like = torch.empty([0], device=like.device, dtype=torch.promote_types(dtype, torch.float32))
    height, width = keys.grid
    a = locality * (head_dim + channels) ** 0.5
    unit = power_of_two((2.0 * a) ** 0.5)
    one = power_of_two((a * (height * height + width * width) / 12.0) ** 0.5)
    reach = 0.5 * (max(height, width) + 1)
    p, r = patch_places(queries.grid, keys.grid, like), patch_places(keys.grid, keys.grid, like)
    scaled = split_bits(p[:, :2] * (2.0 * a / unit), 2.0 * a / unit * reach)
    squares = [split_bits(x[:, 2:] * (-a / one), 2.0 * a / one * reach * reach) for x in (p, r)]
    ones = [torch.full([x.shape[0], 2], one, device=like.device, dtype=like.dtype) for x in (p, r)]
    of_queries = torch.cat([scaled, ones[0], squares[0]], dim=1)
    of_keys = torch.cat([r[:, :2] * unit, r[:, :2] * unit, squares[1], ones[1]], dim=1)
    of_queries = pad(of_queries, (0, 0, queries.num_prefix_tokens, 0)).reshape(1, 1, -1, channels)
    of_keys = pad(of_keys, (0, 0, keys.num_prefix_tokens, 0)).reshape(1, 1, -1, channels)
    return of_queries.to(dtype), of_keys.to(dtype)


def append_channels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_queries: torch.Tensor, of_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append channels to queries and keys (B, h, N, D), and scale queries, as logits are divided by sqrt(D + 8) now.

    Values that are as wide as keys are padded with zeros to the new width, which fused kernels need.
    """
    B, h, _, D = q.shape
    channels = of_keys.shape[3]
    q = torch.cat([q * (1.0 + channels / D) ** 0.5, of_queries.expand(B, h, -1, -1)], dim=3)
    wide = torch.cat([k, of_keys.expand(B, h, -1, -1)], dim=3)
    return q, wide, pad(v, (0, channels)) if v.shape[3] == D else v
