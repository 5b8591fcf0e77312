"""Softmax attention: the control of every comparison.

    Y = softmax(Q K^T / sqrt(D)) V                     cost in N: quadratic

Vaswani et al. 2017 (arXiv 1706.03762). Where nothing is added to a host's own attention, it stays as it is, to the last
bit. As that, this one honours masks and the causal flag.

Shapes: B images, N tokens, h heads, D head width.
"""

from typing import Optional

import torch
from torch.nn.functional import scaled_dot_product_attention

from ._layout import TokenLayout
from ._mechanism import AttentionMechanism


class SoftmaxAttention(AttentionMechanism):
    """Softmax attention through ``scaled_dot_product_attention``."""

    title = "softmax attention"
    source = "Vaswani et al. 2017, arXiv 1706.03762"
    uses_grid = False
    supports_mask = True
    supports_key_bias = True

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
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
