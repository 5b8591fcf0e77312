"""Pooling: each patch is mixed with the mean of its neighbours, a baseline without attention.

    Y_i = mean of V_j over the 3x3 neighbours j of i that exist, i included, - V_i        cost in N: linear, 9·N

Yu et al. 2022 (arXiv 2111.11418), section 3.2: what MetaFormer keeps of a transformer when attention is taken away.

*Differs:* values are pooled and projected as a ViT's are, so that trained weights around the mixer stay in use; the
paper pools the tokens themselves. Prefix tokens have no neighbours: they keep softmax attention to all tokens. A masked
neighbour counts as one that doesn't exist.

*Speed:* a whole ViT-Ti is 0.97, 1.26, 1.62 and 3.66 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 1.04, 1.42, 1.85 and 4.87 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, E width of a head's values.
"""

from typing import Optional

import torch
from torch.nn.functional import avg_pool2d

from ._layout import TokenLayout
from ._masks import added_to_logits, tokens_read
from ._mechanism import AttentionMechanism, with_prefix_rows


class Pooling(AttentionMechanism):
    """Mean over 3x3 neighbours, minus the token."""

    title = "pooling"
    source = "Yu et al. 2022, arXiv 2111.11418"
    supports_dropout = False
    has_logits = False
    needs_self_attention = True
    uses_values_only = True
    supports_key_mask = True

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        P, (height, width) = keys.num_prefix_tokens, keys.grid
        B, h, _, E = v.shape
        image = v[:, :, P:].transpose(2, 3).reshape(B, h * E, height, width)
        # at the border the mean is over the neighbours that exist
        if attn_mask is None:
            means = avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        else:
            read = tokens_read(attn_mask, B)[:, P:].reshape(B, 1, height, width).to(v.dtype)
            means = avg_pool2d(image * read, 3, 1, 1, count_include_pad=False)
            # what share of the neighbours is read, a ninth at least; 0 for a token that reads none
            means = means / avg_pool2d(read, 3, 1, 1, count_include_pad=False).clamp(min=0.1)
            attn_mask = added_to_logits(attn_mask, q.dtype)
        pooled = means - image
        y = pooled.reshape(B, h, E, height * width).transpose(2, 3)
        return with_prefix_rows(y, q, k, v, P, attn_mask)
