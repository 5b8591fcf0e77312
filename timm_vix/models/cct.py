"""Compact convolutional transformers with another token mixer: CCN, CCP and CCT.

Hassani et al. 2021 (arXiv 2104.05704): a tokeniser of convolution, ReLU and max pooling, no class token, and an
attention-weighted mean of the last tokens. Jeevan & Sethi 2022 (arXiv 2107.02239) put Nyström (CCN) and Performer
attention (CCP) into it; CCT is the softmax control. ``7`` and ``14`` are CCT-7/7x2 and CCT-14/7x2 for 224 px. ``cifar``
is the paper's model of four layers, in which each pixel of a 32 px image is a token.

``cifar`` departs from the official code where that is defective: the residual stream is not replaced by its normalised
self, landmarks are pooled over the image and not over rows of the raster, the residual convolution is a depthwise 5x5
over the image and not over 33 tokens of the raster, no value depends on other images of the batch, and the position
embedding starts at timm's scale. The MLP ratio is 4, with which the paper's models were trained: the code's misspelt 1
had no effect. The code's stochastic depth of 0.1 is a keyword, ``drop_path_rate=0.1``: the models have none by default,
and the reproduction leaves it out.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .vit import VisionXformer, create_vision_xformer, default_cfgs_for
from .vit import checkpoint_filter_fn as checkpoint_filter_fn  # timm's tools look for it beside the class

SIZES: dict[str, dict[str, Any]] = {
    "7": dict(patch_size=16, embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0, qkv_bias=False),
    "14": dict(patch_size=16, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, qkv_bias=False),
    "cifar": dict(mlp_ratio=4.0),
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


def create_compact(name: str, pretrained: bool, kwargs: dict[str, Any], mixer: str, **options: Any) -> CompactXformer:
    size = SIZES[name.split("_")[1]]
    return create_vision_xformer(name, pretrained, kwargs, CompactXformer, mixer=mixer, **{**size, **options})


def _cfgs() -> dict[str, dict[str, Any]]:
    first_conv = "patch_embed.proj.0"
    cfgs = default_cfgs_for(["ccn_cifar", "ccp_cifar", "cct_cifar"], first_conv)
    shared = dict(cfgs["cct_cifar"], num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)
    shared.update(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    return {**cfgs, **{f"{family}_{size}": shared for family in ("ccn", "ccp", "cct") for size in ("7", "14")}}


default_cfgs = generate_default_cfgs(_cfgs())


@register_model
def ccn_cifar(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """The paper's CCT for 32 px, corrected (see module), Nyström attention (arXiv 2102.03902)."""
    return create_compact("ccn_cifar", pretrained, kwargs, "nystrom", num_landmarks=64, conv_residual=True)


@register_model
def ccn_7(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """CCT-7/7x2 for 224 px, Nyström attention (arXiv 2102.03902)."""
    return create_compact("ccn_7", pretrained, kwargs, "nystrom")


@register_model
def ccn_14(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """CCT-14/7x2 for 224 px, Nyström attention (arXiv 2102.03902)."""
    return create_compact("ccn_14", pretrained, kwargs, "nystrom")


@register_model
def ccp_cifar(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """The paper's CCT for 32 px, corrected (see module), Performer attention (arXiv 2009.14794)."""
    return create_compact("ccp_cifar", pretrained, kwargs, "performer", num_features=110, qkv_bias=True)


@register_model
def ccp_7(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """CCT-7/7x2 for 224 px, Performer attention (arXiv 2009.14794)."""
    return create_compact("ccp_7", pretrained, kwargs, "performer")


@register_model
def ccp_14(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """CCT-14/7x2 for 224 px, Performer attention (arXiv 2009.14794)."""
    return create_compact("ccp_14", pretrained, kwargs, "performer")


@register_model
def cct_cifar(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """The paper's CCT for 32 px, corrected (see module), softmax attention, the control (arXiv 2104.05704)."""
    return create_compact("cct_cifar", pretrained, kwargs, "softmax")


@register_model
def cct_7(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """CCT-7/7x2 for 224 px, softmax attention, the control (arXiv 2104.05704)."""
    return create_compact("cct_7", pretrained, kwargs, "softmax")


@register_model
def cct_14(pretrained: bool = False, **kwargs: Any) -> CompactXformer:
    """CCT-14/7x2 for 224 px, softmax attention, the control (arXiv 2104.05704)."""
    return create_compact("cct_14", pretrained, kwargs, "softmax")
