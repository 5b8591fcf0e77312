"""Pooling-based vision transformers with another token mixer: PiN, PiP and Hybrid PiN.

Heo et al. 2021, "Rethinking Spatial Dimensions of Vision Transformers" (arXiv 2103.16302): timm's PiT, in which a
strided depthwise convolution halves the grid between three stages. Jeevan & Sethi 2022 (arXiv 2107.02239) put Nyström
attention into it (PiN) and, with a convolutional stem, call it Hybrid PiN; here with Performer attention too (PiP).
``tiny`` is PiT-Ti for 224 px and takes its weights. ``mixer="softmax"`` is the control.

The paper gives no configuration of its PiN and its repository no code. ``cifar`` is as near as PiT comes to the paper's
other models: four layers, MLP ratio 2, heads of 32 channels, every pixel a token of the first stage; 64, 128 and 256
channels. Attention and stem are those of ``vix.py`` and ``hybrid.py``; ``vit.py`` lists what they correct.
"""

from collections import OrderedDict
from typing import Any, Optional, Union

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, get_pretrained_cfg
from timm.models.pit import PoolingVisionTransformer
from timm.models.pit import checkpoint_filter_fn as pit_checkpoint_filter_fn
from timm.models.vision_transformer import Block, ParallelThingsBlock
from torch import nn

from .._checks import InputError, check_choice, check_integer
from ..conversion.layers import Layers, check_saved_form, layer_mixers
from ..mixers import MIXERS
from ..mixers._layout import TokenLayout
from ..slots.model import no_decay_names
from ..slots.replace import replace_attention
from ..stems import MAP_STEMS
from ._arguments import StemMixer, check_sizes, check_stages, first_convolution, stem_class, take_keywords
from ._build import build_xformer, overridden
from ._register import CIFAR10, ModelName, register_names
from .checkpoints import complete_checkpoint, split_checkpoint, tensors_of
from .vit import BLOCKS, NYSTROM

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(patch_size=16, stride=8, base_dims=(32, 32, 32), depth=(2, 6, 4), heads=(2, 4, 8), mlp_ratio=4.0),
    "cifar": dict(
        img_size=32, patch_size=1, stride=1, base_dims=(32, 32, 32), depth=(1, 2, 1), heads=(2, 4, 8), mlp_ratio=2.0
    ),
}


class PoolingXformer(PoolingVisionTransformer):
    """timm's ``PoolingVisionTransformer`` with a token mixer and a stem chosen by name.

    Args:
        mixer: a name in ``MIXERS``.
        layers: the blocks that have it, counted over all stages, as for ``timm_vix.convert``.
        stem: "linear", PiT's own overlapping patches, or another stem, whose patches are ``stride`` pixels wide.
        stem_mixer: for ``stem="t2t"`` the mixer inside it, as in ``VisionXformer``.
        rope: None, "axial" or "1d": rotary positions, in addition to PiT's learned ones.
        block: "sequential", or "parallel": the layers of a stage two by two side by side, as in ``VisionXformer``, and
            the last of an odd number alone. A sequential PiT's weights load in pairs.
        **kwargs: the mixer's keywords and those of timm's class. A stage of fewer patches than ``num_landmarks`` or
            ``num_proj_tokens`` takes as many as it has.

    Raises:
        ValueError: for an unknown name or wrong value, naming what is allowed.
        TypeError: for a keyword that neither takes.
    """

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        patch_size: int = 16,
        stride: int = 8,
        in_chans: int = 3,
        mixer: str = "softmax",
        stem: str = "linear",
        stem_mixer: StemMixer = None,
        rope: Optional[str] = None,
        block: str = "sequential",
        layers: Layers = "all",
        **kwargs: Any,
    ) -> None:
        check_choice("stem", stem, MAP_STEMS)
        check_choice("block", block, tuple(BLOCKS))
        check_choice("mixer", mixer, tuple(MIXERS))
        keywords = take_keywords(kwargs)
        check_sizes(img_size, 1, False)
        check_integer("patch_size", patch_size, 1)
        check_integer("stride", stride, 1)
        sides = to_2tuple(img_size)
        if min(sides) < patch_size:
            raise InputError(f"img_size={img_size}, patch_size={patch_size}, stride={stride}: no patch fits")
        super().__init__(img_size=sides, patch_size=patch_size, stride=stride, in_chans=in_chans, **kwargs)
        if block == "parallel":
            for stage in self.transformers:
                own = list(stage.blocks)
                stage.blocks = nn.Sequential(*(side_by_side(own[i : i + 2]) for i in range(0, len(own), 2)))
        width = self.base_dims[0] * self.heads[0]
        embed = stem_class(stem, stem_mixer)
        self._traits = {"first_conv": "patch_embed.conv" if stem == "linear" else first_convolution(stem)}
        if stem != "linear":
            dd = {key: kwargs.get(key) for key in ("device", "dtype")}
            if any(side % stride for side in sides):
                raise InputError(f"img_size={img_size} is no multiple of stride={stride}")
            self.patch_embed = embed(
                img_size=sides, patch_size=stride, in_chans=in_chans, embed_dim=width, flatten=False, **dd
            )
            self.pos_embed = nn.Parameter(torch.empty(1, width, *self.patch_embed.grid_size, **dd))
            trunc_normal_(self.pos_embed, std=0.02)
        grid, stages = tuple(self.patch_embed.grid_size), []
        check_saved_form(layers)
        for i, stage in enumerate(self.transformers):
            if i:
                grid = ((grid[0] - 1) // 2 + 1, (grid[1] - 1) // 2 + 1)
            stages.append((stage.blocks, TokenLayout(self.num_tokens, grid)))
        depth = sum(len(blocks) for blocks, _ in stages)
        replace_attention(stages, self, layer_mixers(layers, depth, mixer, keywords), rope)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | no_decay_names(self)


def side_by_side(layers: list[Block]) -> ParallelThingsBlock:
    """Layers as one block: their attentions at once, then their MLPs."""
    block = ParallelThingsBlock(dim=0, num_heads=0, num_parallel=0)  # empty; the layers bring their modules
    block.num_parallel = len(layers)
    for layer in layers:
        attn = dict(norm=layer.norm1, attn=layer.attn, ls=layer.ls1, drop_path=layer.drop_path1)
        mlp = dict(norm=layer.norm2, mlp=layer.mlp, ls=layer.ls2, drop_path=layer.drop_path2)
        block.attns.append(nn.Sequential(OrderedDict(attn)))
        block.ffns.append(nn.Sequential(OrderedDict(mlp)))
    return block


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PoolingXformer) -> dict[str, Any]:
    """Fit a checkpoint to the model: one of ours as it is, one of PiT with our own parameters fresh.

    Raises:
        ValueError: if it is neither, with the keys that are missing, unexpected or of another shape.
    """
    state_dict, found = split_checkpoint(pit_checkpoint_filter_fn(tensors_of(state_dict), model), model)
    positions = state_dict.get("pos_embed")
    if positions is not None and positions.ndim == 4 and positions.shape != model.pos_embed.shape:
        size = model.pos_embed.shape[2:]
        # torch has no antialiasing in half precision on a CPU
        resampled = nn.functional.interpolate(positions.float(), size, mode="bicubic", antialias=True)
        state_dict["pos_embed"] = resampled.to(positions.dtype)
    return complete_checkpoint(state_dict, model, **found)


def create_pooling(row: ModelName, pretrained: bool, kwargs: dict[str, Any]) -> PoolingXformer:
    """Build the model of a registered name: its architecture, overridden by the user's ``kwargs``."""
    arguments = overridden(row, SIZES, kwargs)
    check_stages(**{name: arguments[name] for name in ("base_dims", "depth", "heads")})
    feature_cfg = dict(feature_cls="hook", out_indices=arguments.pop("out_indices", (0, 1, 2)))
    return build_xformer(PoolingXformer, row.name, pretrained, arguments, checkpoint_filter_fn, feature_cfg)


def describe(row: ModelName) -> str:
    """The architecture of a row, for the documentation of its model."""
    title = "PiT for 32 px (see module)" if row.size == "cifar" else "PiT-Ti"
    return f"{title} (Heo et al. 2021, arXiv 2103.16302){', convolutional stem' if row.stem == 'conv' else ''}"


def _cfgs() -> dict[str, dict[str, Any]]:
    cfgs = {}
    for family in ("pin", "pip", "hybrid_pin", "hybrid_pip"):
        first_conv = "patch_embed.proj.0.conv" if family.startswith("hybrid") else "patch_embed.conv"
        host = get_pretrained_cfg("pit_ti_224.in1k").to_dict()
        host = {key: host[key] for key in ("num_classes", "input_size", "mean", "std", "license", "classifier")}
        host.update(pool_size=None, crop_pct=0.9, interpolation="bicubic", fixed_input_size=True, first_conv=first_conv)
        cfgs[f"{family}_tiny.in1k"] = dict(host, hf_hub_id="timm/pit_ti_224.in1k")
        cfgs[f"{family}_cifar"] = {**host, **CIFAR10}
    return cfgs


default_cfgs = generate_default_cfgs(_cfgs())

# name, mixer, stem, size, rotary positions, keywords
NAMES = [
    ModelName("pin_cifar", "nystrom", "linear", "cifar", None, NYSTROM),
    ModelName("pin_tiny", "nystrom", "linear", "tiny"),
    ModelName("pip_cifar", "performer", "linear", "cifar", None, dict(num_features=110)),
    ModelName("pip_tiny", "performer", "linear", "tiny"),
    ModelName("hybrid_pin_cifar", "nystrom", "conv", "cifar", None, NYSTROM),
    ModelName("hybrid_pin_tiny", "nystrom", "conv", "tiny"),
    ModelName("hybrid_pip_cifar", "performer", "conv", "cifar", None, dict(num_features=110)),
    ModelName("hybrid_pip_tiny", "performer", "conv", "tiny"),
]

register_names(__name__, NAMES, create_pooling, describe)
