"""Tokens-to-token stem: overlapping pieces of the image attend to each other before they become patches.

    7x7 pixels every 4 -> attention, width 64; 3x3 of these every 2 -> attention, width 64; 3x3 of these every 2 -> C
    attention of pieces T:    q, k, v = LN(T) W,   Y = v + softmax(q k^T / sqrt(64)) v W_o,   Y + MLP(LN(Y))

Yuan et al. 2021, "Tokens-to-Token ViT" (arXiv 2101.11986), section 3.1, and its code: one head, whose queries and keys
are narrower than the pieces, so the values take the place of the residual. The MLP is as wide as its input. The last
step is linear in 3x3 tokens, which is a convolution.

At 224 px the first attention has 3,136 tokens and the second 784, so an efficient mechanism pays here before it pays
in the trunk, which has 196: any of ``MIXERS`` with queries and keys can be inside.

*Differs:* the official code neither divides the logits of its Performer by the root of the width nor subtracts a
maximum before it takes exponents, and its softmax divides by the root of the pieces' length; here all mechanisms are
those of ``timm_vix.mixers``, with the root of the width. There is no dropout. Images need not be square. The paper has
patch 16 only; smaller patches take smaller strides, down to three layers of 3x3 every pixel.

Shapes: (B, 3, height, width) -> (B, N, C), N = height/patch · width/patch.
"""

from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from timm.layers import Mlp, register_notrace_module
from torch import nn
from torch.nn import functional as F

from .._checks import InputError, check_choice
from ..mixers import MIXERS
from ..mixers._layout import Grid, TokenLayout
from ..mixers._mechanism import AttentionMechanism, AttentionShape, MechanismHost
from ._sequential import SequentialStem, Size

WIDTH = 64
# patch size: the strides of the three steps
STRIDES = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (4, 2, 2)}
# stride: side and padding of the pieces
PIECES = {1: (3, 1), 2: (3, 1), 4: (7, 2)}


def check_stem_mixer(given: Any) -> tuple[str, dict[str, Any]]:
    """The name and the keywords of a mixer in a stem, given as a name or as a mapping with "mixer".

    Raises:
        InputError: for a mixer without queries and keys, or a keyword that it doesn't take.
    """
    keywords = dict(given) if isinstance(given, Mapping) else {"mixer": given}
    mixer = keywords.pop("mixer", None)
    allowed = tuple(name for name, mixer_class in MIXERS.items() if issubclass(mixer_class, AttentionMechanism))
    check_choice("stem_mixer", mixer, allowed)
    takes = MIXERS[mixer].keywords()
    for name, value in sorted(keywords.items()):
        if name not in takes:
            raise InputError(f"stem_mixer: {name}={value!r}: {mixer!r} takes {', '.join(takes) or 'no keywords'}")
    return mixer, keywords


@register_notrace_module
class TokensToToken(MechanismHost):
    """Attention between overlapping pieces of a map: (B, C, H, W) -> (B, 64, H/stride, W/stride).

    Args:
        in_chans: C.
        stride: 1, 2 or 4.
        grid: H/stride and W/stride at the size for which the stem is built; others are read from the map at hand.
        mixer: a name in ``MIXERS``, with its ``keywords``.
    """

    def __init__(
        self,
        in_chans: int,
        stride: int,
        grid: Grid,
        mixer: str,
        keywords: dict[str, Any],
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.side, self.padding = PIECES[stride]
        self.stride = stride
        self.grid = grid
        length = in_chans * self.side**2
        layout = TokenLayout(0, grid)
        self.norm1 = nn.LayerNorm(length, **dd)
        self.qkv = nn.Linear(length, 3 * WIDTH, bias=bias, **dd)
        self.set_core(MIXERS[mixer].build(AttentionShape(length, 1, WIDTH, WIDTH, layout, layout, **dd), **keywords))
        self.proj = nn.Linear(WIDTH, WIDTH, **dd)
        self.norm2 = nn.LayerNorm(WIDTH, **dd)
        self.mlp = Mlp(WIDTH, WIDTH, **dd)

    def set_grid(self, grid: Grid) -> None:
        """Take another grid permanently."""
        self.grid = grid
        self.core.set_grid(grid)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height = (image.shape[2] + 2 * self.padding - self.side) // self.stride + 1
        width = (image.shape[3] + 2 * self.padding - self.side) // self.stride + 1
        layout = TokenLayout(0, (height, width))
        pieces = F.unfold(image, self.side, padding=self.padding, stride=self.stride)
        x = self.norm1(pieces.transpose(1, 2))
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=3)
        x = (v + self.proj(self.mix(q, k, v, layout, layout, x))).squeeze(1)
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).reshape(image.shape[0], x.shape[2], height, width)


class TokensToTokenStem(SequentialStem):
    """Two attentions between overlapping pieces and a linear step, as the projection of a patch embedding.

    Args:
        mixer: a name in ``MIXERS`` with queries and keys, or a mapping with "mixer" and keywords of it.

    Raises:
        ValueError: for another patch size, or a mixer that can't be in a stem.
    """

    kind = "a tokens-to-token"

    def __init__(self, *args: Any, mixer: Union[str, Mapping[str, Any]] = "nystrom", **kwargs: Any) -> None:
        self.mixer = check_stem_mixer(mixer)  # before the layers are made
        super().__init__(*args, **kwargs)

    def build(self, in_chans: int, embed_dim: int, bias: bool, dd: dict[str, Any]) -> None:
        name, keywords = self.mixer
        strides = STRIDES[self.patch_size[0]]
        first, second = self.grids()
        self.proj = nn.Sequential(
            TokensToToken(in_chans, strides[0], first, name, keywords, **dd),
            TokensToToken(WIDTH, strides[1], second, name, keywords, **dd),
            nn.Conv2d(WIDTH, embed_dim, 3, strides[2], padding=1, bias=bias, **dd),
        )

    def grids(self) -> list[Grid]:
        """Rows and columns of the pieces of the first and of the second attention."""
        height, width = self.dynamic_feat_size(self.img_size or self.patch_size)
        _, second, third = STRIDES[self.patch_size[0]]
        return [(height * third * second, width * third * second), (height * third, width * third)]

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Take another image size: weights of the mixers that live on a grid are resampled."""
        super().set_input_size(img_size, patch_size)
        for layer, grid in zip(self.proj, self.grids()):
            layer.set_grid(grid)
