"""Softmax attention with rotary positions: the control of every comparison.

    Y = softmax(R(Q) R(K)^T / sqrt(D)) V               cost in N: quadratic

Vaswani et al. 2017 (arXiv 1706.03762) with the rotary positions R of ``_rotary.py``. Without rotary positions the slot
keeps timm's own attention, to the last bit. As timm's, it honours masks and the causal flag.

Shapes: B images, N tokens, h heads, D head width.
"""

from typing import Optional

import torch
from torch.nn.functional import scaled_dot_product_attention

from ._slot import AttentionMixer, admit


class SoftmaxAttention(AttentionMixer):
    """timm's attention, with queries and keys turned by their positions."""

    uses_grid = False

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        q, k, v = self.project(admit(x, None, False, self.num_tokens), 0, 3)
        y = scaled_dot_product_attention(
            self.rotate(q, rope),
            self.rotate(k, rope),
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.merge(y, x)
