"""Token merging: the most similar patch tokens become one, which stands for all of their patches.

    similarity(i, j) = cosine(k_i, k_j), keys averaged over heads           i even, j odd places in the sequence
    x_G = sum_{i in G} n_i x_i / sum_{i in G} n_i                           n_i: patches that token i stands for
    Y = softmax(Q K^T / sqrt(D) + log n) V                                  every key counts as often as it has patches

Bolya et al. 2023 (arXiv 2210.09461), section 3: bipartite soft matching, proportional attention. Each even patch token
proposes its most similar odd one, and the r most similar of these pairs merge; several may share an odd token.

*Differs:* the tokens that are left stay in raster order. Rotary positions of a group are the mean direction of its
patches. Masks are merged as well, so that a mask of the whole grid acts as before on groups of equal tokens.

Shapes: B images, N tokens of the whole grid with P prefix tokens, M tokens that are left, h heads, D head width,
C channels.
"""

import math
from typing import NamedTuple, Optional

import torch
from torch.nn import functional as F

from ._precision import outside_autocast


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


def propose(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each even one of n keys (B, n, D): its largest cosine to an odd one, and that one's number; (B, n - n//2).

    In float32 at least: half precision would have many ties.
    """
    if torch.jit.is_scripting():
        return most_similar(keys)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
        with outside_autocast(keys.device):
            return most_similar(keys)


def most_similar(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The work of ``propose``, outside of autocast."""
    unit = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=2)
    similarity, partner = torch.matmul(unit[:, ::2], unit[:, 1::2].transpose(1, 2)).max(2)
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
    k: torch.Tensor, v: torch.Tensor, key_bias: Optional[torch.Tensor], num_prefix_tokens: int, share: float
) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """In each head the most similar patch keys become one, with their values; a share of at least one half is left.

    Args:
        k: (B, h, N, D), prefix tokens first; these never merge.
        v: (B, h, N, E).
        key_bias: (B, 1, 1, N), log of how many tokens each key stands for already; None: one each.
        share: of the patch keys, how many are left.

    Returns:
        Keys (B, h, M, D), values (B, h, M, E), and what is added to the logits of the keys, (B, h, 1, M): the log of
        how many tokens each stands for.
    """
    B, h, N, D = k.shape
    num_patches = N - num_prefix_tokens
    r = min(num_patches // 2, num_patches - math.ceil(share * num_patches - 1e-6))
    if r == 0:
        return k, v, key_bias
    rows = torch.cat([k, v], dim=3).flatten(0, 1)
    counts = torch.ones([B * h, N], device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))
    if key_bias is not None:
        counts = counts * key_bias.to(counts.dtype).exp().expand(B, h, 1, N).reshape(B * h, N)
    similarity, partner = propose(rows[:, num_prefix_tokens:, :D].detach())
    place = match(similarity, partner, num_prefix_tokens, N, r)
    merged = counts.new_zeros([B * h, N - r]).scatter_add_(1, place, counts)
    means = merge_tokens(rows, counts, place, merged).unflatten(0, [B, h])
    return means[..., :D], means[..., D:], merged.log().to(k.dtype).reshape(B, h, 1, N - r)


def merge_table(table: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sine and cosine of each group's mean direction: (N, 2·D), (h, N, 2·D) or (B, h, N, 2·D) -> (B, h, M, 2·D)."""
    B, M = groups.counts.shape
    table = table.reshape((1,) * (4 - table.ndim) + table.shape)
    table = table.expand(B, -1, -1, -1)
    sums = add_rows(table.transpose(1, 2).flatten(2), groups.place, M)
    sine, cosine = sums.reshape(B, M, table.shape[1], table.shape[3]).transpose(1, 2).chunk(2, dim=3)
    length = torch.sqrt(sine.square() + cosine.square()).clamp(min=1e-6)
    return torch.cat([sine / length, cosine / length], dim=3)


def merge_mask(mask: Optional[torch.Tensor], is_causal: bool, groups: Groups) -> torch.Tensor:
    """What is added to the logits of the groups: (B, 1, 1, M), or (B, h, M, M) with a mask of the whole grid.

    Without a mask, the log of the counts. A mask m (.., N, N), of booleans or added to the logits, gives
    log (1/|I| sum_{i in I} sum_{j in J} exp(m_ij - max_n m_in)) for the groups I and J: what is added to all logits of
    a query changes nothing, so large negative numbers don't vanish together.
    """
    counts = groups.counts
    if mask is None and not is_causal:
        return counts.log()[:, None, None, :]
    N, M = groups.place.shape[1], counts.shape[1]
    if mask is None:
        mask = torch.ones(N, N, dtype=torch.bool, device=counts.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    with outside_autocast(mask.device):
        mask = mask.to(torch.promote_types(mask.dtype, counts.dtype)).expand(*mask.shape[:-2], N, N)
        top = mask.amax(-1, keepdim=True).clamp(min=torch.finfo(mask.dtype).min)  # -inf: nothing is to be read
        members = F.one_hot(groups.place, M).to(mask.dtype).unsqueeze(1)
        sums = torch.matmul(members.transpose(2, 3), torch.matmul((mask - top).exp(), members))
        return (sums / counts[:, None, :, None]).log()
