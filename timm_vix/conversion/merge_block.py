"""The forward pass of one block of a ViT that merges similar tokens between attention and MLP.

Shapes: B images, N tokens of the whole grid, M groups of tokens, h heads, D head width, C channels.
"""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaBlock
from torch import nn

from .._checks import InputError
from ..mixers._layout import TokenLayout, check_sequence
from ..mixers._masks import is_key_mask
from ..mixers._merging import (
    Groups,
    kinds_of,
    match,
    merge_groups,
    merge_mask,
    merge_table,
    merge_tokens,
    propose,
    single_groups,
)
from ..slots.attention_slot import AttentionSlot
from .merge_steps import Step, num_merged


def run_block(
    block: nn.Module, step: Step, num_prefix_tokens: int, x: torch.Tensor, groups: Optional[Groups], **kwargs: Any
) -> tuple[torch.Tensor, Groups]:
    """A block whose tokens merge between attention and MLP: groups x (B, M, C) in, fewer groups out.

    Args:
        groups: of x; None: nothing has merged yet, each token is a group.
        **kwargs: what the host hands to its block, for the whole grid.

    Raises:
        ValueError: for the causal flag, and for a mask that leaves too few tokens to merge.
    """
    if kwargs.get("is_causal"):
        raise InputError("is_causal=True: no two tokens attend to the same tokens, so none can merge")
    slot, attn_mask = block.attn, kwargs.get("attn_mask")
    tokens = block.norm1(x)
    if groups is None:
        groups = single_groups(x)
        attended, keys = slot(tokens, **kwargs), keys_of(slot, tokens, kwargs.get("rope"))
    else:
        attended, keys = attend_groups(slot, tokens, groups, **kwargs)
    x, groups = merge_similar(add_attention(block, x, attended), keys, groups, step, num_prefix_tokens, attn_mask)
    return add_mlp(block, x), groups


def merge_similar(
    x: torch.Tensor,
    keys: torch.Tensor,
    groups: Groups,
    step: Step,
    num_prefix_tokens: int,
    attn_mask: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, Groups]:
    """Merge groups x (B, M, C) by their keys (B, h, M, D); with a mask of the whole grid, those that it treats alike.

    Raises:
        ValueError: if there are too few.
    """
    M = x.shape[1]
    left = M - num_prefix_tokens
    if isinstance(step, Mapping) and torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
        raise InputError(
            f"merge={step!r}: how many tokens merge is known only when the model runs; a model for export takes a "
            "number or a share"
        )
    if isinstance(step, Mapping) and len(x) > 1:
        raise InputError(
            f"merge={step!r}: a threshold merges another number of tokens in each image, and images of a batch need "
            f"the same number: expected a batch of 1, got {len(x)}"
        )
    at_start = groups.place.shape[1] - num_prefix_tokens
    r = left // 2 if isinstance(step, Mapping) else num_merged(step, at_start, left)
    if r == 0:
        return x, groups
    with torch.no_grad():
        # the sum over heads has the cosines of the mean
        kinds: Optional[torch.Tensor] = None
        if attn_mask is not None:
            # the kind of any member: only tokens of one kind merge
            kinds = groups.place.new_zeros(groups.counts.shape)
            kinds = kinds.scatter(1, groups.place, kinds_of(attn_mask).expand_as(groups.place))[:, num_prefix_tokens:]
        similarity, partner = propose(keys[:, :, num_prefix_tokens:].sum(1), kinds)
        if isinstance(step, Mapping):
            r = min(r, int((similarity >= step["threshold"]).sum()))
        elif attn_mask is not None:
            check_pairs((similarity > -2.0).sum(1).amin(), r, attn_mask)
        place = match(similarity, partner, num_prefix_tokens, M, r)
        fewer = merge_groups(groups, place, M - r)
    return merge_tokens(x, groups.counts, place, fewer.counts), fewer


def check_pairs(pairs: torch.Tensor, r: int, attn_mask: torch.Tensor) -> None:
    """Raise ValueError if fewer pairs than r are alike under a mask; RuntimeError where a compiled model runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(
            pairs >= r, f"attn_mask: {r} tokens are to merge, and fewer have another that it treats alike"
        )
    elif not pairs.is_meta and int(pairs) < r:
        raise InputError(
            f"attn_mask of shape {list(attn_mask.shape)}: {r} tokens are to merge, and {int(pairs)} have another that "
            "the mask treats alike; merge fewer, or with a threshold of similarity"
        )


def keys_of(slot: AttentionSlot, x: torch.Tensor, rope: Optional[torch.Tensor]) -> torch.Tensor:
    """The keys (B, h, N, D) of the whole grid x (B, N, C), rotated."""
    layout = TokenLayout(slot.num_prefix_tokens, slot.current_grid(x.shape[1]))
    return slot.rotate(slot.project(x, 1, 2)[0], layout, layout.grid, rope)


def attend_groups(
    slot: AttentionSlot,
    x: torch.Tensor,
    groups: Groups,
    rope: Optional[torch.Tensor] = None,
    attn_mask: Optional[torch.Tensor] = None,
    is_causal: bool = False,  # handed on by the host, refused by ``run_block``
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention among groups x (B, M, C), of the slot's mechanism: (B, M, C), and the rotated keys (B, h, M, D)."""
    grid = TokenLayout(slot.num_prefix_tokens, slot.current_grid(groups.place.shape[1]))
    layout = TokenLayout(slot.num_prefix_tokens, (1, x.shape[1] - slot.num_prefix_tokens))
    supported = slot.supports_mask
    if attn_mask is not None and slot.supports_key_mask:
        supported = supported or is_key_mask(attn_mask, groups.place)
    check_sequence(groups.place, grid, attn_mask, False, supported, False)
    q, k, v = slot.project(x, 0, 3)
    q = slot.scale_queries(q, grid)
    table = slot.rotary_table(grid, grid.grid, rope)
    if table is not None:
        table = merge_table(table, groups)
        q, k = (apply_rot_embed_cat(part, table, half=slot.rotate_half).type_as(v) for part in (q, k))
    bias = merge_mask(attn_mask, groups).to(q.dtype)
    return slot.merge(slot.core(q, k, v, layout, layout, bias), x), k


def add_attention(block: nn.Module, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The first residual connection of a block."""
    if isinstance(block, EvaBlock):
        return x + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    return x + block.drop_path1(block.ls1(attended))


def add_mlp(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The second residual connection of a block."""
    y = block.mlp(block.norm2(x))
    if isinstance(block, EvaBlock):
        return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)
    return x + block.drop_path2(block.ls2(y))
