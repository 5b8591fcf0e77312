"""MLP-Mixer: tokens mixed by a two-layer perceptron over the token axis.

    Y = (W2 GELU(W1 X + b1) + b2)                      W1: (S, N), W2: (N, S); cost in N: N·S, S hidden units

Tolstikhin et al. 2021 (arXiv 2105.01601), equation 1, first line.

*Names:* ``tokens_mlp_ratio`` = S / C (0.5 in Mixer-S/B; timm's first ``mlp_ratio``).

*Differs:* the columns of W1 and rows of W2 that belong to patches live on the patch grid, so another resolution
resamples them; those of prefix tokens are kept apart.

*Pays:* with default keywords on two CPU cores, 5 times as fast as softmax through SDPA at 197 tokens, 35
times at 4,097 (``examples/results/mixers.csv``).

Shapes: B images, N = P + H·W tokens, C channels, S hidden units.
"""

from typing import Optional

import torch
from timm.layers import trunc_normal_
from torch import nn
from torch.nn import functional as F

from .._checks import check_number
from ._resample import resample_reading, resample_writing
from ._slot import Grid, TokenMixer, admit, refuse_attention_dropout


class TokenMlp(TokenMixer):
    """The token-mixing perceptron; of the attention that it replaces it keeps the output dropout.

    Args:
        tokens_mlp_ratio: hidden units for each channel.

    Raises:
        ValueError: for a ratio that gives no hidden unit, or with rotary positions.
    """

    grid_parameters = {
        "read_patches": resample_reading,
        "write_patches": resample_writing,
        "patch_bias": resample_writing,
    }

    def __init__(
        self,
        attn: nn.Module,
        grid: Grid,
        num_prefix_tokens: int,
        rope: Optional[nn.Module] = None,
        tokens_mlp_ratio: float = 0.5,
    ) -> None:
        if rope is not None:
            raise ValueError("rope: a token MLP has no queries and keys to rotate")
        refuse_attention_dropout(attn, "a token MLP")
        super().__init__(grid, num_prefix_tokens)
        weight = attn.proj.weight
        check_number("tokens_mlp_ratio", tokens_mlp_ratio, 1 / weight.shape[0])
        hidden = int(tokens_mlp_ratio * weight.shape[0])
        self.read_patches = nn.Parameter(weight.new_empty(hidden, *grid))
        self.read_prefix = nn.Parameter(weight.new_empty(hidden, num_prefix_tokens)) if num_prefix_tokens else None
        self.hidden_bias = nn.Parameter(weight.new_empty(hidden))
        self.write_patches = nn.Parameter(weight.new_empty(hidden, *grid))
        self.write_prefix = nn.Parameter(weight.new_empty(hidden, num_prefix_tokens)) if num_prefix_tokens else None
        self.patch_bias = nn.Parameter(weight.new_empty(1, *grid))
        self.prefix_bias = nn.Parameter(weight.new_empty(1, num_prefix_tokens)) if num_prefix_tokens else None
        self.drop = attn.proj_drop
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                trunc_normal_(parameter, std=0.02)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        x = admit(x, attn_mask, is_causal, self.num_tokens)
        read = resample_reading(self.read_patches, self.grid).flatten(1)
        write = resample_writing(self.write_patches, self.grid).flatten(1)
        bias = resample_writing(self.patch_bias, self.grid).flatten(1)
        if self.read_prefix is not None and self.write_prefix is not None and self.prefix_bias is not None:
            read = torch.cat([self.read_prefix, read], dim=1)
            write = torch.cat([self.write_prefix, write], dim=1)
            bias = torch.cat([self.prefix_bias, bias], dim=1)
        hidden = F.gelu(F.linear(x.transpose(1, 2), read, self.hidden_bias))
        return self.drop(F.linear(hidden, write.transpose(0, 1), bias[0]).transpose(1, 2))
