"""Masks of keys, (B, 1, 1, N): which tokens are attended to, the same ones for all queries and heads.

A mask holds booleans, True where a token is attended to, or numbers that are added to the logits. A number below -1000
masks its token, since e^-1000 is 0 in every dtype. timm's NaFlex models add 0, and the lowest number of the dtype for
padding.

Landmarks of a masked sequence are means of the unmasked tokens. On a grid of several rows the cells stay where they
are, and each is the mean of its unmasked patches. A grid of one row is a sequence, and its unmasked tokens move up to
fill the gaps: its landmarks are those of a sequence without the masked tokens.

Shapes: B images, N = P + H·W tokens, m cells over the H·W patches.
"""

from typing import NamedTuple, Optional

import torch

from .._checks import InputError
from ._layout import Grid
from ._resample import region_averages


class MaskedPooling(NamedTuple):
    """How landmarks are pooled where tokens are masked.

    ``read`` (B, N): the unmasked tokens; ``keys``, ``values`` (B, g, m, H·W): the weights of the patches in each
    landmark, g = 1 or the number of heads; ``averages`` (B, 1, m, H·W): weights that average each cell's patches;
    ``counts`` (B, g, m): for how many tokens each cell stands, 0 where all are masked.
    """

    read: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    averages: torch.Tensor
    counts: torch.Tensor


def lowest(dtype: torch.dtype) -> float:
    """The number that is added to the logit of a masked key.

    It is far below every logit, but finite: an image of masked keys gives no NaN, and 0 log 0 is 0.
    """
    return -3e4 if dtype == torch.float16 else -1e30


def is_read(added: torch.Tensor) -> torch.Tensor:
    """Whether tokens are attended to, by the numbers that a mask adds to their logits."""
    return added > -1000.0


def mean_of_read(x: torch.Tensor, read: torch.Tensor, dim: int) -> torch.Tensor:
    """The mean of x along an axis, which is kept, over the tokens where ``read`` is True; zeros if there are none."""
    return ((x * read).sum(dim, keepdim=True) / read.sum(dim, keepdim=True).clamp(min=1)).to(x.dtype)


def is_key_mask(mask: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a mask is one of the keys x (B, N, C), and not of pairs of queries and keys."""
    same = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == 1 and mask.shape[3] == x.shape[1]
    return same and (mask.shape[0] == 1 or mask.shape[0] == x.shape[0])


def added_to_logits(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of either form as what is added to logits: finite, in ``dtype``."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest(dtype))
    return mask.to(dtype).masked_fill(~is_read(mask), lowest(dtype))


def added_in_both_dtypes(
    mask: Optional[torch.Tensor], dtype: torch.dtype
) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """``added_to_logits`` in float32 at least, for sums and logarithms, and in ``dtype``; None where nothing is."""
    if mask is None:
        return None, None
    return added_to_logits(mask, torch.promote_types(dtype, torch.float32)), added_to_logits(mask, dtype)


def tokens_read(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """Which tokens are attended to, booleans (B, N), for a mixer that supports no other weights of keys.

    Raises:
        ValueError: for a mask with numbers other than 0 and those below -1000, except in scripted or compiled models.
    """
    if mask.dtype == torch.bool:
        return mask.expand(batch, 1, 1, mask.shape[3]).flatten(1)
    read = is_read(mask)
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
        check_all_or_nothing(mask, read)
    return read.expand(batch, 1, 1, mask.shape[3]).flatten(1)


def check_all_or_nothing(mask: torch.Tensor, read: torch.Tensor) -> None:
    """Raise ValueError for a mask that adds another number than 0 to the logit of an unmasked token."""
    try:
        other = bool((read & (mask != 0)).any())
    except RuntimeError:  # a tensor of torch.func or of the meta device, whose values can't be looked at
        return
    if other:
        raise InputError(
            f"attn_mask adds {float(mask[read & (mask != 0)][0]):g} to a logit: this token mixer attends to a token or "
            "doesn't; allowed are booleans, or 0 and numbers below -1000. softmax, performer, axial, latent and "
            "retention take any numbers"
        )


def pieces(read: torch.Tensor, count: int, at_most_one_each: bool, like: torch.Tensor) -> torch.Tensor:
    """The unmasked tokens (B, n) of a sequence, averaged over equal pieces: (B, count, n), as adaptive pooling does.

    Args:
        at_most_one_each: no more pieces than unmasked tokens; the last rows are 0 then. Otherwise pieces share tokens.
    """
    total = read.sum(1).reshape(-1, 1, 1)
    place = (read.cumsum(1) - 1).unsqueeze(1)
    piece = torch.arange(count, device=read.device).reshape(1, count, 1)
    taken = total.clamp(min=1, max=count) if at_most_one_each else torch.full_like(total, count)
    first = torch.div(piece * total, taken, rounding_mode="floor")
    last = torch.div((piece + 1) * total + taken - 1, taken, rounding_mode="floor")
    inside = (place >= first) & (place < last) & read.unsqueeze(1) & (piece < taken)
    return inside.to(like.dtype) / (last - first).clamp(min=1).to(like.dtype)


def share_read(weight: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (.., m, H·W) of the unmasked patches (B, .., 1, H·W), and their share of all weights.

    The weights are scaled up to their former absolute sum: means stay means.
    """
    left = weight * read.to(weight.dtype)
    share = left.abs().sum(-1) / weight.abs().sum(-1).clamp(min=1e-12)
    # without a patch the weights are 0; a quotient of small numbers would have gradients beyond float16
    return left / torch.where(share > 2e-5, share, 1.0).unsqueeze(-1), share


def cell_averages(
    read: torch.Tensor, grid: Grid, cells: Grid, at_most_one_each: bool, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages of the unmasked patches (B, H·W) over each cell, (B, m, H·W), and how many a cell has, (B, m)."""
    count = cells[0] * cells[1]
    if grid[0] == 1:
        weight = pieces(read, count, at_most_one_each, like)
        total = read.sum(1, keepdim=True).to(like.dtype)
        used = total.clamp(min=1, max=count) if at_most_one_each else torch.full_like(total, count)
        return weight, (weight.sum(2) > 0).to(like.dtype) * (total / used)
    weight, share = share_read(region_averages(cells, grid, like), read.unsqueeze(1))
    return weight, share * (float(grid[0] * grid[1]) / float(count))


def pool_by(weight: torch.Tensor, x: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Sums of the patches by weights (B, g, m, H·W), after prefix tokens: (.., N, C) -> (.., P + m, C).

    x is of tokens (B, N, C), with g = 1, or of heads (B, h, N, C).
    """
    P = num_prefix_tokens
    weight = weight.to(x.dtype)
    if x.dim() == 3:
        return torch.cat([x[:, :P], torch.bmm(weight[:, 0], x[:, P:])], dim=1)
    pooled = torch.matmul(weight, x[:, :, P:])
    return torch.cat([x[:, :, :P].expand(pooled.shape[0], pooled.shape[1], -1, -1), pooled], dim=2)


def landmark_bias(masked: MaskedPooling, num_prefix_tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Log of the number of tokens that each landmark stands for, (B, g, 1, P + m), in the dtype of ``like``.

    A cell whose patches are all masked is masked itself.
    """
    counts = masked.counts
    prefix = masked.read[:, :num_prefix_tokens].unsqueeze(1).to(counts.dtype).expand(-1, counts.shape[1], -1)
    return log_counts(torch.cat([prefix, counts], dim=2), like).unsqueeze(2)


def log_counts(counts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The log of numbers of tokens in the dtype of ``like``; what stands for none is masked."""
    return torch.where(counts > 1e-4, counts.clamp(min=1e-4).log(), lowest(like.dtype)).to(like.dtype)
