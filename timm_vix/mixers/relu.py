"""ReLU attention: linear attention whose queries and keys are rectified, with learned positions of the keys.

    Q' = ReLU(Q),   K' = ReLU(K + p)                   p: one vector for each patch, the same for all images
    Y = Q' (K'^T V) / (Q' K'^T 1 + eps)                cost in N: linear, N·D^2

Guo et al. 2024, arXiv 2405.11582 (SLAB), section 3.2, "simplified linear attention".

*Names:* ``key_positions`` = p, which starts at zero; ``conv_residual``, on by default: the paper's depthwise 5x5
convolution of the values, added to Y.

*Differs:* p lives on the patch grid and is resampled for another one. Prefix tokens, which the official code drops, are
tokens like all others, without p. The convolution has a filter for each channel of all heads and not one that the heads
share. Sums are taken in float32 at least. A query that is negative everywhere, or meets no key, gives 0.

Without the convolution masks of keys are supported: a masked key is 0.

In place of trained softmax attention it keeps little of a model's accuracy, so train it from random weights. Rotary
positions rotate queries and keys before they are rectified, and p is added to rotated keys.

*Speed:* a whole ViT-Ti is 0.83, 1.19, 1.50 and 3.22 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.84, 1.10, 1.42 and 3.75 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D width of a head's queries and keys, E of its values.
"""

from typing import Optional

import torch
from torch import nn
from torch.nn.functional import pad, relu

from ._layout import TokenLayout
from ._masks import tokens_read
from ._mechanism import AttentionMechanism, AttentionShape
from ._precision import outside_autocast
from ._resample import resample_output_weight

# Added to the sum of a query's weights, which may be 0. A default of an argument below, since TorchScript reads no
# global numbers.
EPSILON = 1e-6


def relu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Y of rectified queries and keys (B, h, N, D) and values (B, h, Nk, E), in the dtype of the values."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    # one product gives the sums of K'^T V and of K'
    sums = torch.matmul(k.to(dtype).transpose(2, 3), pad(v.to(dtype), (0, 1), value=1.0))
    y, total = torch.matmul(q.to(dtype), sums).split([v.shape[3], 1], dim=3)
    # a query without weights gets 0, and no gradient
    return (y / torch.where(total > 0.0, total + epsilon, 1.0)).to(v.dtype)


class ReluAttention(AttentionMechanism):
    """ReLU attention."""

    title = "ReLU attention"
    source = "Guo et al. 2024, arXiv 2405.11582"
    supports_dropout = False
    supports_key_mask = True
    # there are no logits to which a bias could be added
    has_logits = False
    conv_residual = True
    exports_one_grid = True
    grid_parameters = {"key_positions": resample_output_weight}

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__(shape)
        self.key_positions = shape.parameter(shape.num_heads * shape.head_dim, *shape.keys.grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.key_positions)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        positions = resample_output_weight(self.key_positions, keys.grid).unflatten(0, (k.shape[1], k.shape[3]))
        positions = pad(positions.flatten(2).transpose(1, 2), (0, 0, keys.num_prefix_tokens, 0))
        q, k = relu(q), relu(k + positions)
        if attn_mask is not None:
            k = k * tokens_read(attn_mask, k.shape[0]).unsqueeze(1).unsqueeze(3).to(k.dtype)
        if torch.jit.is_scripting():
            return relu_attention(q, k, v)
        else:
            with outside_autocast(q.device):
                return relu_attention(q, k, v)
