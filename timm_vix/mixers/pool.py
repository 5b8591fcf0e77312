"""Pooling: each patch is mixed with the mean of its neighbours, without attention; the lower control.

    Y_i = mean of V_j over the 3x3 neighbours j of i that exist, i included, - V_i        cost in N: linear, 9·N

Yu et al. 2022 (arXiv 2111.11418), section 3.2: what MetaFormer keeps of a transformer when attention is taken away.

*Differs:* values are pooled and projected as a ViT's are, so that trained weights around the mixer stay in use; the
paper pools the tokens themselves. Prefix tokens have no neighbours: they keep softmax attention to all tokens.

Shapes: B images, N = P + H·W tokens, h heads, E width of a head's values.
"""

import torch
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention

from ._layout import TokenLayout
from ._mechanism import AttentionMechanism


class Pooling(AttentionMechanism):
    """Mean over 3x3 neighbours, minus the token."""

    title = "pooling"
    source = "Yu et al. 2022, arXiv 2111.11418"
    supports_dropout = False
    has_logits = False
    needs_self_attention = True

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: TokenLayout, keys: TokenLayout
    ) -> torch.Tensor:
        P, (height, width) = keys.num_prefix_tokens, keys.grid
        B, h, _, E = v.shape
        image = v[:, :, P:].transpose(2, 3).reshape(B, h * E, height, width)
        # at the border the mean is over the neighbours that exist
        pooled = avg_pool2d(image, 3, 1, 1, count_include_pad=False) - image
        y = pooled.reshape(B, h, E, height * width).transpose(2, 3)
        if P > 0:
            y = torch.cat([scaled_dot_product_attention(q[:, :, :P], k, v), y], dim=2)
        return y
