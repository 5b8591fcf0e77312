"""Softmax attention: the control of every comparison.

    Y = softmax(Q K^T / sqrt(D)) V                     cost in N: quadratic

Vaswani et al. 2017 (arXiv 1706.03762). Where neither keywords, rotary positions nor token merging add to it, a model
keeps its own attention modules, so its outputs are bit-identical. Like those, this mixer supports ``attn_mask`` and
``is_causal``.

With ``merge_keys`` the most similar patch keys of each head become one, their mean, and so do their values:

    Y = softmax(Q K~^T / sqrt(D) + log n) V~           n: how many keys each mean stands for

All queries stay, so the output is on the whole grid. The matching is that of Bolya et al. 2023 (arXiv 2210.09461), who
merge tokens. Masks are refused then, since keys that one query reads and another doesn't may have become one.

Shapes: B images, N tokens, h heads, D head width.
"""

from typing import Optional

import torch
from torch.nn.functional import scaled_dot_product_attention

from .._checks import InputError, is_number
from ._layout import TokenLayout
from ._mechanism import AttentionMechanism, AttentionShape
from ._merging import merge_similar_keys


class SoftmaxAttention(AttentionMechanism):
    """Softmax attention through ``scaled_dot_product_attention``.

    Args:
        merge_keys: the share of the patch keys that is left after the most similar ones merged, from 0.5 to 1.

    Raises:
        ValueError: for another share.
    """

    title = "softmax attention"
    source = "Vaswani et al. 2017, arXiv 1706.03762"
    uses_grid = False
    supports_mask = True
    supports_key_mask = True
    takes_sequences = True
    supports_key_bias = True
    candidates = (dict(merge_keys=0.5), dict(merge_keys=0.75))

    def __init__(self, shape: AttentionShape, merge_keys: float = 1.0) -> None:
        super().__init__(shape)
        if not is_number(merge_keys) or not 0.5 <= merge_keys <= 1:
            raise InputError(
                f"merge_keys={merge_keys!r}: expected the share of the keys that is left, from 0.5 to 1, since "
                "every second key at most merges into another"
            )
        self.merge_keys = float(merge_keys)
        self.supports_mask = self.supports_key_mask = merge_keys == 1

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.merge_keys < 1:
            # channels of ``locality`` are no part of a key's likeness
            k, v, attn_mask = merge_similar_keys(k, v, attn_mask, keys.num_prefix_tokens, self.merge_keys, self.key_dim)
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
