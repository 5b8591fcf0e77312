"""MLP-Mixer: tokens mixed by a two-layer perceptron over the token axis.

    Y = (W2 GELU(W1 X + b1) + b2)                      W1: (S, N), W2: (N, S); cost in N: N·S, S hidden units

Tolstikhin et al. 2021 (arXiv 2105.01601), equation 1, first line.

*Names:* ``tokens_mlp_ratio`` = S / C (0.5 in Mixer-S/B; timm's first ``mlp_ratio``).

*Differs:* the columns of W1 and rows of W2 that belong to patches live on the patch grid, so another resolution
resamples them; those of prefix tokens are kept apart.

*Speed:* a whole ViT-Ti is 1.34, 1.91, 2.04 and 5.60 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 1.37, 2.02, 2.43 and 7.52 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, C channels, S hidden units.
"""

import torch
from timm.layers import trunc_normal_
from torch import nn
from torch.nn import functional as F

from .._checks import check_number
from ._layout import TokenLayout
from ._mechanism import AttentionShape, TokenMixing
from ._resample import resample_input_weight, resample_output_weight


class TokenMlp(TokenMixing):
    """The token-mixing perceptron.

    Args:
        tokens_mlp_ratio: hidden units for each channel.

    Raises:
        ValueError: for a ratio that gives no hidden unit, or with rotary positions.
    """

    title = "a token MLP"
    source = "Tolstikhin et al. 2021, arXiv 2105.01601"
    exports_one_grid = True
    grid_parameters = {
        "read_patches": resample_input_weight,
        "write_patches": resample_output_weight,
        "patch_bias": resample_output_weight,
    }

    def __init__(self, shape: AttentionShape, tokens_mlp_ratio: float = 0.5) -> None:
        super().__init__(shape)
        check_number("tokens_mlp_ratio", tokens_mlp_ratio, 1 / shape.dim)
        self.tokens_mlp_ratio = float(tokens_mlp_ratio)
        hidden, (P, grid) = int(tokens_mlp_ratio * shape.dim + 1e-6), shape.queries  # 1/49 * 49 is below 1

        self.read_patches = shape.parameter(hidden, *grid)
        self.read_prefix = shape.parameter(hidden, P) if P else None
        self.hidden_bias = shape.parameter(hidden)
        self.write_patches = shape.parameter(hidden, *grid)
        self.write_prefix = shape.parameter(hidden, P) if P else None
        self.patch_bias = shape.parameter(1, *grid)
        self.prefix_bias = shape.parameter(1, P) if P else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):  # not those of the residual convolution
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                trunc_normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        read = resample_input_weight(self.read_patches, layout.grid).flatten(1)
        write = resample_output_weight(self.write_patches, layout.grid).flatten(1)
        bias = resample_output_weight(self.patch_bias, layout.grid).flatten(1)
        if self.read_prefix is not None and self.write_prefix is not None and self.prefix_bias is not None:
            read = torch.cat([self.read_prefix, read], dim=1)
            write = torch.cat([self.write_prefix, write], dim=1)
            bias = torch.cat([self.prefix_bias, bias], dim=1)
        hidden = F.gelu(F.linear(x.transpose(1, 2), read, self.hidden_bias))
        return F.linear(hidden, write.transpose(0, 1), bias[0]).transpose(1, 2)
