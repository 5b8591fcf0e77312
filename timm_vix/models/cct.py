"""Compact convolutional transformers with another token mixer: CCN, CCP and CCT.

Hassani et al. 2021 (arXiv 2104.05704): a tokeniser of convolution, ReLU and max pooling, no class token, and an
attention-weighted mean of the last tokens. Jeevan & Sethi 2022 (arXiv 2107.02239) put Nyström (CCN) and Performer
attention (CCP) into it; CCT is the softmax control. ``7`` and ``14`` are CCT-7/7x2 and CCT-14/7x2 for 224 px. ``cifar``
is the paper's model of four layers, in which each pixel of a 32 px image is a token.

*Differs:* ``vit.py`` lists what ``cifar`` corrects in the official code. Here also the residual connections add to the
tokens before normalisation, where the code adds to the normalised tokens. The MLP ratio is 4, with which the paper's
models were trained: the 1 in the code is a misspelt argument without effect. The stochastic depth of 0.1 in the code is
a keyword, ``drop_path_rate=0.1``. It is off by default, and in the reproduction.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from torch import nn

from ._register import ModelName, register_names
from .vit import NYSTROM, PERFORMER, VisionXformer, create_vision_xformer, default_cfgs_for
from .vit import SIZES as VIT_SIZES
from .vit import checkpoint_filter_fn as checkpoint_filter_fn  # timm's tools look for it beside the class

SIZES: dict[str, dict[str, Any]] = {
    "7": dict(patch_size=16, embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0, qkv_bias=False),
    "14": dict(patch_size=16, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, qkv_bias=False),
    "cifar": dict(VIT_SIZES["cifar"], mlp_ratio=4.0),
}


class SequencePool(nn.Linear):
    """A mean of the tokens, weighted by the softmax of one score for each: (B, N, C) -> (B, C)."""

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = nn.functional.linear(x, self.weight, self.bias)
        return torch.matmul(score.softmax(1).transpose(1, 2), x).squeeze(1)


class CompactXformer(VisionXformer):
    """``VisionXformer`` with a convolutional tokeniser and sequence pooling; keywords are the same.

    ``global_pool="map"`` is the sequence pooling, others are timm's.
    """

    def __init__(self, stem: str = "conv_pool", global_pool: str = "map", **kwargs: Any) -> None:
        kwargs = {"class_token": False, **kwargs}
        super().__init__(stem=stem, global_pool=global_pool, **kwargs)
        if global_pool == "map":
            dd = {key: kwargs.get(key) for key in ("device", "dtype")}
            self.attn_pool = SequencePool(self.embed_dim, 1, **dd)


def create_compact(row: ModelName, pretrained: bool, kwargs: dict[str, Any]) -> CompactXformer:
    """Build the model of a registered name: its architecture, overridden by the user's ``kwargs``."""
    return create_vision_xformer(row, pretrained, kwargs, CompactXformer, SIZES)


def describe(row: ModelName) -> str:
    """The architecture of a row, for the documentation of its model."""
    return (
        "The paper's CCT for 32 px, corrected (see module)" if row.size == "cifar" else f"CCT-{row.size}/7x2 for 224 px"
    )


def _cfgs() -> dict[str, dict[str, Any]]:
    cfgs = default_cfgs_for([row for row in NAMES if row.size == "cifar"], "patch_embed.proj.0")
    shared = dict(cfgs["cct_cifar"], num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)
    shared.update(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    return {**cfgs, **{row.name: shared for row in NAMES if row.size != "cifar"}}


# name, mixer, stem, size, rotary positions, keywords
NAMES = [
    ModelName("ccn_cifar", "nystrom", "conv_pool", "cifar", None, NYSTROM),
    ModelName("ccn_7", "nystrom", "conv_pool", "7"),
    ModelName("ccn_14", "nystrom", "conv_pool", "14"),
    ModelName("ccp_cifar", "performer", "conv_pool", "cifar", None, PERFORMER),
    ModelName("ccp_7", "performer", "conv_pool", "7"),
    ModelName("ccp_14", "performer", "conv_pool", "14"),
    ModelName("cct_cifar", "softmax", "conv_pool", "cifar"),
    ModelName("cct_7", "softmax", "conv_pool", "7"),
    ModelName("cct_14", "softmax", "conv_pool", "14"),
]

default_cfgs = generate_default_cfgs(_cfgs())

register_names(__name__, NAMES, create_compact, describe)
