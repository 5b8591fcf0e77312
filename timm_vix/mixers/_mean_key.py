"""Keys of windows: patches, prefix tokens, and the mean key, whose attention weight gives the window's normaliser.

The mean of the keys that a window attends to has a logit between theirs, so that its share of the attention is neither
nearly 0 nor nearly 1, unless logits are far apart.

Shapes: A images and heads, D head width, G windows of L patches, P prefix tokens.
"""

import math
from typing import Optional

import torch
from torch.nn.functional import pad

from ._masks import lowest, mean_of_read


def mean_key(
    keys: torch.Tensor, inside: torch.Tensor, prefix: torch.Tensor, read: Optional[torch.Tensor]
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The mean key of each window, (A, G, 1, D), and with a mask which windows have no key at all, (A, G, 1, 1).

    A window without an unmasked patch has the mean of the unmasked prefix tokens. A key of zeros in its place would
    take nearly all of the attention where logits are far below 0.

    Args:
        keys: (A, G, L, D).
        inside: (1 or A, G, L, 1), 1 for what a window attends to.
        prefix: the keys of the prefix tokens, (A, P, D).
        read: 1 for the tokens that are attended to, (A, N, 1); None: all.
    """
    count = inside.sum(2, keepdim=True)
    if read is None:
        return keys.sum(2, keepdim=True) / count.clamp(min=1.0), None
    empty, of_prefix = count == 0, read[:, : prefix.shape[1]]
    instead = mean_of_read(prefix, of_prefix, 1).unsqueeze(1)
    nothing = empty & (of_prefix.sum(1, keepdim=True) == 0).unsqueeze(1)
    return torch.where(empty, instead, mean_of_read(keys, inside, 2)), nothing


def append_prefix_and_mean(windows: torch.Tensor, prefix: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Append the prefix (A, P, D) and a window's own token (A, G or 1, 1, D): (A, G, L, D) -> (A, G, L + P + 1, D)."""
    G = windows.shape[1]
    return torch.cat([windows, prefix.unsqueeze(1).expand(-1, G, -1, -1), mean.expand(-1, G, -1, -1)], dim=2)


def window_bias(
    inside: torch.Tensor, num_prefix_tokens: int, num_branches: int, padded: bool, read: Optional[torch.Tensor]
) -> torch.Tensor:
    """What is added to logits, (1 or A, G or 1, L, L + P + 1).

    ``inside`` (1 or A, G, L, 1) is 1 for what a window attends to, 0 for masked patches and beyond the grid.
    """
    L = inside.shape[2]
    once = -math.log(num_branches)
    own = once * torch.eye(L, device=inside.device, dtype=inside.dtype)
    bias = pad(pad(own, (0, num_prefix_tokens), value=once), (0, 1)).reshape(1, 1, L, L + num_prefix_tokens + 1)
    if padded:
        bias = bias + pad(lowest(inside.dtype) * (1.0 - inside).transpose(2, 3), (0, num_prefix_tokens + 1))
    if read is not None:
        prefix = lowest(inside.dtype) * (1.0 - read[:, :num_prefix_tokens]).unsqueeze(1).transpose(2, 3)
        bias = bias + pad(prefix, (L, 1))
    return bias
