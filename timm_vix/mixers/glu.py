"""Gated linear unit in place of attention: a baseline without token mixing.

    Y = W3 (LN(GELU(W1 X + b1)) * LN(W2 X + b2)) + b3            cost in N: linear, 3·N·C·S

W1, W2: (S, C); W3: (C, S); both layer norms are one module (Abdullah & Aydin 2024, arXiv 2405.15953, Activator).

No token sees another one. So a model with this mixer alone can only be read from its patches, by ``global_pool="avg"``:
a class token would give the same answer for every image, and a warning is logged where one is pooled. ``vix_glu_*``
pool their patches. They have a class token, so that they compare with other models and the weights of a ViT fit, and
leave it aside.

*Names:* ``ffn_ratio`` = S / C, d_ffn / d_model of the official code, which has 512 / 256.

*Differs:* the paper's smaller model leaves out the feed-forward layer that follows; here it is the host's, and stays.

*Speed:* a whole ViT-Ti is 0.99, 1.31, 1.74 and 3.50 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 1.00, 1.41, 1.78 and 4.74 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N tokens (prefix tokens are tokens like all others), C channels, S hidden units.
"""

import torch
from timm.layers import trunc_normal_
from torch import nn
from torch.nn.functional import gelu

from .._checks import check_number
from ._layout import TokenLayout
from ._mechanism import AttentionShape, TokenMixing


class GatedLinearUnit(TokenMixing):
    """Activator's gated linear unit.

    Args:
        ffn_ratio: hidden units for each channel.

    Raises:
        ValueError: for a ratio that gives fewer than two hidden units, or with rotary positions.
    """

    title = "a gated linear unit without token mixing"
    source = "Abdullah & Aydin 2024, arXiv 2405.15953"
    uses_grid = False
    # no token reads another one, masked or not
    supports_key_mask = True
    takes_sequences = True
    mixes_tokens = False

    def __init__(self, shape: AttentionShape, ffn_ratio: float = 2.0) -> None:
        super().__init__(shape)
        check_number("ffn_ratio", ffn_ratio, 2 / shape.dim)  # the norm of a single unit is constant
        self.ffn_ratio = float(ffn_ratio)
        hidden, dd = int(ffn_ratio * shape.dim + 1e-6), {"device": shape.device, "dtype": shape.dtype}
        self.gate = nn.Linear(shape.dim, hidden, **dd)
        self.value = nn.Linear(shape.dim, hidden, **dd)
        self.hidden_norm = nn.LayerNorm(hidden, **dd)
        self.out = nn.Linear(hidden, shape.dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.gate, self.value, self.out):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.hidden_norm.reset_parameters()

    def forward(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return self.out(self.hidden_norm(gelu(self.gate(x))) * self.hidden_norm(self.value(x)))
