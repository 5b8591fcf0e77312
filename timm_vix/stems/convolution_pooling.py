"""Convolutional tokeniser: convolutions, each with ReLU and max pooling, in place of the linear patch embedding.

Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers" (arXiv 2104.05704, section 3.3). Patch
16 is CCT-7/7x2: two 7x7 convolutions of stride 2, each with a pooling of stride 2. Patches 1 and 2 are the tokeniser of
Jeevan & Sethi 2022 (arXiv 2107.02239): three 3x3 convolutions 3-64-64-C and poolings of stride 1. Convolutions have no
bias.

Shapes: (B, 3, height, width) -> (B, N, C), N = height/patch · width/patch.
"""

from typing import Any

from torch import nn

from ._sequential import SequentialStem

WIDTH = 64
# patch size: kernel, strides of the convolutions, stride of the poolings
LAYOUTS = {
    1: (3, (1, 1, 1), 1),
    2: (3, (2, 1, 1), 1),
    4: (7, (1, 1), 2),
    8: (7, (2, 1), 2),
    16: (7, (2, 2), 2),
}


class ConvolutionPoolingStem(SequentialStem):
    """Convolutions, ReLU and max pooling as the projection of a patch embedding."""

    kind = "a convolution-pooling"

    def build(self, in_chans: int, embed_dim: int, bias: bool, dd: dict[str, Any]) -> None:
        kernel, strides, pool_stride = LAYOUTS[self.patch_size[0]]
        widths = [in_chans, *[WIDTH] * (len(strides) - 1), embed_dim]
        layers: list[nn.Module] = []
        for before, width, stride in zip(widths, widths[1:], strides):
            layers.append(nn.Conv2d(before, width, kernel, stride, padding=kernel // 2, bias=False, **dd))
            layers += [nn.ReLU(), nn.MaxPool2d(3, pool_stride, padding=1)]
        self.proj = nn.Sequential(*layers)
