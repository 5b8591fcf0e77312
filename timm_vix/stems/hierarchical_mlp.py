"""Hierarchical MLP stem: a patch embedding of three layers in which no patch sees another.

    patch 16: 4x4 pixels -> C/4, batch norm, GELU; 2x2 of these -> C/4, batch norm, GELU; 2x2 of these -> C, batch norm

Touvron et al. 2022, "Three things everyone should know about Vision Transformers" (arXiv 2203.09795), section 5 (hMLP).
Kernels do not overlap, so masking a patch before or after the stem is the same, unlike with a convolutional stem.

*Differs:* the paper has patch 16 only; smaller patches take smaller kernels, down to three layers on a pixel.

*Cost:* it adds 0.8 % to the operations of a ViT-B with a linear stem; the convolutional stem adds 9.1 %.

In training, batch normalisation takes its statistics over patches and images, as everywhere.

Shapes: (B, 3, height, width) -> (B, N, C), N = height/patch · width/patch.
"""

from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import nn

from ._sequential import SequentialStem

KERNELS = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (4, 2, 2)}


class ChannelsLastBatchNorm(nn.Module):
    """Batch normalisation of channels that come last."""

    # as a BatchNorm2d before tokens are flattened, torch 2.15 gives wrong gradients for one image on a CPU

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x.flatten(0, -2)).reshape(x.shape)


class HierarchicalMlpStem(SequentialStem):
    """Layers that join the pieces of a patch, as the projection of a patch embedding."""

    kind = "a hierarchical MLP"

    def build(self, in_chans: int, embed_dim: int, bias: bool, dd: dict[str, Any]) -> None:
        first, second, third = KERNELS[self.patch_size[0]]
        self.check_width(embed_dim, 4)
        width = embed_dim // 4
        # batch normalisation has the biases
        self.proj = nn.Sequential(
            ConvNormAct(in_chans, width, first, first, padding=0, act_layer=nn.GELU, **dd),
            ConvNormAct(width, width, second, second, padding=0, act_layer=nn.GELU, **dd),
            nn.Conv2d(width, embed_dim, third, third, bias=False, **dd),
        )
        self.norm = ChannelsLastBatchNorm(embed_dim, **dd)
