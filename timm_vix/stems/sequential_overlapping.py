"""Sequential overlapping patch embedding (SOPE): normalised 3x3 convolutions between two affine maps of the channels.

    x -> a x + b -> [Conv3x3 of stride 2, batch norm, GELU] ... Conv3x3 of stride 2, batch norm -> a' x + b'

One convolution for each halving, of widths C/8, C/4, C/2 and C at patch 16; GELU stands between convolutions, and after
the only one at patch 2.

Lu et al. 2022, "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets"
(DHVT, arXiv 2210.05958), section 3.2. The affine maps start as the identity.

*Differs:* patch 1, which the paper doesn't have, is as patch 2 with a stride of 1. Convolutions have no bias, which
batch normalisation would take away. In training, batch normalisation takes its statistics over patches and images.

Shapes: (B, 3, height, width) -> (B, N, C), N = height/patch · width/patch.
"""

import itertools
from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import nn

from ._sequential import SequentialStem


class ChannelAffine(nn.Module):
    """a x + b with a number of each for every channel of a map (B, C, H, W)."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class SequentialOverlappingStem(SequentialStem):
    """Affine map, convolutions with batch normalisation, affine map, as the projection of a patch embedding."""

    kind = "a sequential overlapping"

    def build(self, in_chans: int, embed_dim: int, bias: bool, dd: dict[str, Any]) -> None:
        halvings = self.patch_size[0].bit_length() - 1
        count, stride = max(halvings, 1), 2 if halvings else 1
        self.check_width(embed_dim, 1 << (count - 1))
        widths = [in_chans, *(embed_dim >> (count - 1 - i) for i in range(count))]
        layers: list[nn.Module] = [ChannelAffine(in_chans, **dd)]
        for i, (before, width) in enumerate(itertools.pairwise(widths)):
            act = i < count - 1 or count == 1
            layers.append(ConvNormAct(before, width, 3, stride, apply_act=act, act_layer=nn.GELU, **dd))
        self.proj = nn.Sequential(*layers, ChannelAffine(embed_dim, **dd))
