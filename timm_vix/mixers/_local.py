"""Local enhancement: a depthwise convolution of the values over the patch grid, added to what attention gives.

Xiong et al. 2021 (arXiv 2102.03902, section 3.3: ``conv_residual``), there over the sequence.

Shapes: B images, N = P + H·W tokens, h heads, E width of a head's values.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ._layout import TokenLayout

KERNEL_SIZE = 5


class DepthwiseResidual(nn.Conv2d):
    """Depthwise 5x5 convolution of the values of the patches; prefix tokens get 0."""

    def __init__(self, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(
            width, width, KERNEL_SIZE, padding="same", groups=width, bias=False, device=device, dtype=dtype
        )

    def forward(self, v: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """(B, h, N, E) -> (B, h, N, E)."""
        B, h, _, E = v.shape
        P, (height, width) = layout.num_prefix_tokens, layout.grid
        image = v[:, :, P:].transpose(2, 3).reshape(B, h * E, height, width)
        local = self._conv_forward(image, self.weight, self.bias).reshape(B, h, E, height * width)
        return pad(local.transpose(2, 3), (0, 0, P, 0))
