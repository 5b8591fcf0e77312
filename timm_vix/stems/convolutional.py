"""Convolutional stem: 3x3 convolutions in place of the linear patch embedding.

Jeevan & Sethi 2022 (arXiv 2107.02239, "Hybrid" models) for small images: three 3x3 convolutions 3-32-64-C, here strided
if a patch is larger than a pixel. Xiao et al. 2021 (arXiv 2106.14881, section 4) for patches of 8 and 16: a stride-2
3x3 convolution for each halving, widths C/8, C/4, C/2, C, then a 1x1; at patch 16 it costs 1.3 transformer blocks of
ViT-Ti.

*Differs:* the official code of the first paper has neither normalisation nor activation between its convolutions, so
they fold into one linear 7x7 convolution. ``conv`` has batch normalisation and GELU between them, ``conv_linear`` is
theirs.

Shapes: (B, 3, height, width) -> (B, N, C), N = height/patch · width/patch.
"""

from typing import Any

from timm.layers import ConvNormAct
from torch import nn

from ._sequential import SequentialStem


class ConvolutionalStem(SequentialStem):
    """Convolutions as the projection of a patch embedding."""

    kind = "a convolutional"
    # batch normalisation and GELU between the convolutions
    activation = True

    def build(self, in_chans: int, embed_dim: int, bias: bool, dd: dict[str, Any]) -> None:
        halvings = self.patch_size[0].bit_length() - 1
        if halvings < 3:
            widths = [32, 64, embed_dim]
            # late strides: the early convolutions see every pixel
            strides = [2 if i >= 3 - halvings else 1 for i in range(3)]
        else:
            self.check_width(embed_dim, 1 << (halvings - 1))
            widths = [embed_dim >> (halvings - 1 - i) for i in range(halvings)]
            strides = [2] * halvings
        layers: list[nn.Module] = []
        for i, (width, stride) in enumerate(zip(widths, strides)):
            before = widths[i - 1] if i else in_chans
            last = halvings < 3 and i == len(widths) - 1
            if self.activation and not last:
                layers.append(ConvNormAct(before, width, 3, stride=stride, act_layer=nn.GELU, **dd))
            else:
                layers.append(nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=bias or not last, **dd))
        if halvings >= 3:
            layers.append(nn.Conv2d(embed_dim, embed_dim, 1, bias=bias, **dd))
        self.proj = nn.Sequential(*layers)


class LinearConvolutionalStem(ConvolutionalStem):
    """The official code's stem: convolutions without normalisation and activation."""

    activation = False
