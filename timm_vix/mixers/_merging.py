"""Token merging: the most similar patch tokens become one, which stands for all of their patches.

    similarity(i, j) = cosine(k_i, k_j), keys averaged over heads           i even, j odd places in the sequence
    x_G = sum_{i in G} n_i x_i / sum_{i in G} n_i                           n_i: patches that token i stands for
    Y = softmax(Q K^T / sqrt(D) + log n) V                                  every key counts as often as it has patches

Bolya et al. 2023 (arXiv 2210.09461), section 3: bipartite soft matching, proportional attention. Each even patch token
proposes its most similar odd one, and the r most similar of these pairs merge; several may share an odd token.

*Differs:* the tokens that are left stay in raster order. Rotary positions of a group are the mean direction of its
patches. With a mask of the whole grid, two tokens merge only if they attend to the same tokens and the same tokens
attend to them. So no masked token becomes part of an unmasked one. Tokens that no query attends to merge first, so
they don't decide which other tokens merge. The mask is merged as well.

In float32 the result doesn't depend on the rest of the batch. In half precision a product may be rounded otherwise in a
batch of another size, and where similarities are nearly equal, other pairs merge then. On CUDA sums over groups of
three and more tokens have a fixed order only with ``torch.use_deterministic_algorithms(True)``.

Shapes: B images, N tokens of the whole grid with P prefix tokens, M tokens that are left, h heads, D head width,
C channels.
"""

import math
from typing import NamedTuple, Optional

import torch
from torch.nn import functional as F

from ._masks import is_read
from ._precision import outside_autocast
from ._resample import mean_direction


class Groups(NamedTuple):
    """Which tokens of the whole grid have become one.

    ``place`` (B, N): the group of each token, from 0; ``counts`` (B, M): how many tokens each group has, in float32.
    """

    place: torch.Tensor
    counts: torch.Tensor


def single_groups(x: torch.Tensor) -> Groups:
    """Each token of x (B, N, C) for itself."""
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    return Groups(place, torch.ones(place.shape, device=x.device))


def flat(index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows (B, n) of each image, which has ``num_rows``, as rows of all images in a row: (B·n)."""
    if index.shape[0] == 1:
        return index.flatten()
    return (index + torch.arange(index.shape[0], device=index.device).unsqueeze(1) * num_rows).flatten()


def copy_back(x: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The value of each token's group: (B, M, C) -> (B, N, C). Whole rows are copied, which ``gather`` is slow at."""
    return x.flatten(0, 1).index_select(0, flat(groups.place, x.shape[1])).unflatten(0, groups.place.shape)


def take_one(x: torch.Tensor, groups: Groups) -> torch.Tensor:
    """A token of each group, for groups of equal tokens: (B, N, C) -> (B, M, C)."""
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    member = places.new_zeros(groups.counts.shape).scatter_reduce(1, groups.place, places, "amax")
    return x.flatten(0, 1).index_select(0, flat(member, x.shape[1])).unflatten(0, member.shape)


def add_rows(x: torch.Tensor, place: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The sums of x (B, N, C) over groups: (B, M, C)."""
    sums = x.new_zeros(x.shape[0] * num_groups, x.shape[2])
    return sums.index_add_(0, flat(place, num_groups), x.flatten(0, 1)).unflatten(0, (x.shape[0], num_groups))


def num_left(share: float, num_tokens: int) -> int:
    """A share of some tokens, rounded up, but not for rounding errors: 1 - (1 - 0.3) is a little more than 0.3."""
    return math.ceil(share * num_tokens - 1e-6)


def propose(keys: torch.Tensor, kinds: Optional[torch.Tensor] = None) -> tuple[torch.Tensor, torch.Tensor]:
    """For each even one of n keys (B, n, D): its largest cosine to an odd one, and that one's number; (B, n - n//2).

    In float32 at least: half precision would have many ties.

    Args:
        kinds: (B, n), see ``kinds_of``; keys of two kinds are no pair, and have a similarity of -2, below every cosine.
            Pairs that no query reads have 2, above every cosine.
    """
    if torch.jit.is_scripting():
        return most_similar(keys, kinds)
    else:
        with outside_autocast(keys.device):
            return most_similar(keys, kinds)


def most_similar(keys: torch.Tensor, kinds: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The work of ``propose``, outside of autocast."""
    unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=2)
    cosines = torch.matmul(unit[:, ::2], unit[:, 1::2].transpose(1, 2))
    if kinds is not None:
        cosines = cosines.masked_fill(kinds[:, ::2].unsqueeze(2) != kinds[:, 1::2].unsqueeze(1), -2.0)
    similarity, partner = cosines.max(2)
    if kinds is not None:
        unread = (kinds[:, ::2] % 2 == 1) & (similarity > -2.0)
        similarity = similarity.masked_fill(unread, 2.0)
    return similarity, partner


def match(similarity: torch.Tensor, partner: torch.Tensor, num_prefix_tokens: int, M: int, r: int) -> torch.Tensor:
    """The places (B, M) that M tokens have after the r most similar of the proposed pairs merged; the order stays."""
    merged = similarity.topk(r, dim=1).indices
    even = num_prefix_tokens + 2 * merged
    odd = num_prefix_tokens + 1 + 2 * partner.gather(1, merged)
    stays = torch.ones(merged.shape[0], M, dtype=torch.int64, device=merged.device).scatter_(1, even, 0)
    place = stays.cumsum(1) - 1
    return place.scatter_(1, even, place.gather(1, odd))


def merge_groups(groups: Groups, place: torch.Tensor, num_groups: int) -> Groups:
    """The groups after the M present ones moved to ``place`` (B, M) among fewer."""
    counts = groups.counts.new_zeros(place.shape[0], num_groups).scatter_add_(1, place, groups.counts)
    return Groups(place.gather(1, groups.place), counts)


def merge_tokens(x: torch.Tensor, counts: torch.Tensor, place: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """The means of x (B, M, C), weighted by ``counts`` (B, M), at ``place`` (B, M) among those of counts ``merged``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = add_rows(x.to(dtype) * counts.unsqueeze(2), place, merged.shape[1])
    return (sums / merged.unsqueeze(2)).to(x.dtype)


def merge_similar_keys(
    k: torch.Tensor, v: torch.Tensor, key_bias: Optional[torch.Tensor], num_prefix_tokens: int, share: float, width: int
) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """In each head the most similar patch keys become one, with their values; a share of at least one half is left.

    Args:
        k: (B, h, N, D), prefix tokens first; these never merge.
        v: (B, h, N, E).
        key_bias: (B, 1, 1, N), log of how many tokens each key stands for already; None: one each.
        share: of the patch keys, how many are left.
        width: of a key itself; further channels of k don't count for the similarity.

    Returns:
        Keys (B, h, M, D), values (B, h, M, E), and what is added to the logits of the keys, (B, h, 1, M): the log of
        how many tokens each stands for.
    """
    B, h, N, D = k.shape
    num_patches = N - num_prefix_tokens
    r = min(num_patches // 2, num_patches - num_left(share, num_patches))
    if r == 0:
        return k, v, key_bias
    rows = torch.cat([k, v], dim=3).flatten(0, 1)
    counts = torch.ones([B * h, N], device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))
    if key_bias is not None:
        counts = counts * key_bias.to(counts.dtype).exp().expand(B, h, 1, N).reshape(B * h, N)
    similarity, partner = propose(rows[:, num_prefix_tokens:, : min(width, D)].detach())
    place = match(similarity, partner, num_prefix_tokens, N, r)
    merged = counts.new_zeros([B * h, N - r]).scatter_add_(1, place, counts)
    means = merge_tokens(rows, counts, place, merged).unflatten(0, [B, h])
    return means[..., :D], means[..., D:], merged.log().to(k.dtype).reshape(B, h, 1, N - r)


def merge_table(table: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sine and cosine of each group's mean direction: (N, 2·D), (h, N, 2·D) or (B, h, N, 2·D) -> (B, h, M, 2·D)."""
    B, M = groups.counts.shape
    # in half precision a sum of 256 numbers near 1 takes no further one
    waves = table.to(torch.promote_types(table.dtype, torch.float32))
    waves = waves.reshape((1,) * (4 - table.ndim) + table.shape).expand(B, -1, -1, -1)
    sums = add_rows(waves.transpose(1, 2).flatten(2), groups.place, M)
    sums = sums.reshape(B, M, waves.shape[1], waves.shape[3]).transpose(1, 2)
    return mean_direction(sums / groups.counts[:, None, :, None]).to(table.dtype)


def merge_mask(mask: Optional[torch.Tensor], groups: Groups) -> torch.Tensor:
    """What is added to the logits of the groups: (B, 1, 1, M), or (B, h, M, M) with a mask of all pairs of tokens.

    Without a mask, the log of the counts. A mask m (.., N, N), of booleans or added to the logits, gives
    log (1/|I| sum_{i in I} sum_{j in J} exp(m_ij - max_n m_in)) for the groups I and J: what is added to all logits of
    a query changes nothing, so large negative numbers don't vanish together. One of the keys alone, (.., 1, N), has no
    mean over queries.
    """
    counts = groups.counts
    if mask is None:
        return counts.log()[:, None, None, :]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    with outside_autocast(mask.device):
        mask = mask.to(torch.promote_types(mask.dtype, counts.dtype))
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape).expand(-1, -1, -1, groups.place.shape[1])
        top = mask.amax(-1, keepdim=True).clamp(min=torch.finfo(mask.dtype).min)  # -inf: nothing is to be read
        members = F.one_hot(groups.place, counts.shape[1]).to(mask.dtype).unsqueeze(1)
        sums = torch.matmul((mask - top).exp(), members)
        if mask.shape[-2] > 1:
            sums = torch.matmul(members.transpose(2, 3), sums) / counts[:, None, :, None]
        return sums.log()


def mixed_bits(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers of 64 bits whose bits depend on many of those of ``x``, after the last steps of SplitMix64."""
    x = (x ^ (x >> 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31)


def kinds_of(mask: torch.Tensor) -> torch.Tensor:
    """A whole number for each token, (B or 1, N), equal where a mask (.., N or 1, N) treats two tokens alike.

    Tokens are alike if all queries read both or neither, and both read the same keys; of a mask that is added to the
    logits, if its numbers are the same. They are compared by a hash of 63 bits, without looking at all pairs. The
    number is odd for tokens that no query reads.
    """
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # (B or 1, h or 1, N or 1, N)
    if mask.dtype == torch.bool:
        bits = mask.long()
    elif mask.dtype == torch.float64:
        bits = (mask + 0.0).view(torch.int64)  # -0.0 is 0.0
    else:
        bits = (mask.float() + 0.0).view(torch.int32).long()
    bits = mixed_bits(bits)
    unread = ~(mask if mask.dtype == torch.bool else is_read(mask)).any(2).any(1)
    heads, queries, keys = (torch.arange(size, device=mask.device) for size in bits.shape[1:])
    heads = heads[:, None, None] * 0x5DEECE66D
    read_by = mixed_bits(bits ^ mixed_bits(heads + queries[:, None] + 1)).sum((1, 2))
    if mask.shape[2] > 1:
        read_by = mixed_bits(read_by) + mixed_bits(bits ^ mixed_bits(heads - keys - 1)).sum((1, 3))
    return 2 * read_by + unread
