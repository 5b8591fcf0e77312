"""ConViT with its token mixer chosen by name.

d'Ascoli et al. 2021 (arXiv 2103.10697): gated positional self-attention between patches in the first ten of twelve
layers; then the class token joins, and two layers have softmax attention. It is timm's ConViT, whose weights load, on
any image that the patches divide, square or not. Other mixers may stand in any layer. ``convix_gpsa_tiny`` with another
``num_heads`` is the paper's small (9) or base (16).

Queries, keys and values are projected as one, and positional attention is computed by rows and columns
(``mixers/gpsa.py``), so no table of all pairs of patches is kept.
"""

from typing import Any, Optional, Union

import torch
from timm.layers import Attention, to_2tuple
from timm.models import generate_default_cfgs, get_pretrained_cfg
from timm.models.convit import ConVit
from torch import nn

from .._checks import check_choice, check_integer
from ..conversion.layers import Layers, check_saved_form, layer_mixers
from ..mixers import MIXERS
from ..mixers._layout import TokenLayout
from ..mixers.gpsa import GatedPositionalAttention
from ..slots.model import no_decay_names, slots_of
from ..slots.replace import replace_attention
from ._arguments import check_sizes, take_keywords
from ._build import build_xformer, overridden
from ._register import ModelName, register_names
from .checkpoints import complete_checkpoint, resample_positions, split_checkpoint, tensors_of

SIZES: dict[str, dict[str, Any]] = {"tiny": dict(embed_dim=48, num_heads=4, local_up_to_layer=10)}


class ConvitXformer(ConVit):
    """timm's ``ConVit`` with a token mixer chosen by name.

    Args:
        mixer: a name in ``MIXERS``.
        layers: the blocks that have it, as for ``timm_vix.convert``; None: those before the class token. Other blocks
            have softmax attention.
        local_up_to_layer: the block before which the class token joins.
        embed_dim: width of a head, as in timm's class.
        **kwargs: the mixer's keywords and those of timm's class.

    Raises:
        ValueError: for an unknown name or wrong value, naming what is allowed.
        TypeError: for a keyword that neither takes.
    """

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        patch_size: int = 16,
        mixer: str = "gpsa",
        layers: Optional[Layers] = None,
        depth: int = 12,
        local_up_to_layer: int = 10,
        qkv_bias: bool = False,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_choice("mixer", mixer, tuple(MIXERS))
        keywords = take_keywords(kwargs)
        check_sizes(img_size, patch_size, False)
        check_integer("depth", depth, 2)
        check_integer("local_up_to_layer", local_up_to_layer, 1, depth - 1)
        super().__init__(
            img_size=to_2tuple(img_size),
            patch_size=patch_size,
            depth=depth,
            local_up_to_layer=local_up_to_layer,
            qkv_bias=qkv_bias,
            proj_drop_rate=proj_drop_rate,
            **kwargs,
        )
        if not self.use_pos_embed:
            self.pos_embed = None
        dd = {key: kwargs.get(key) for key in ("device", "dtype")}
        for block in self.blocks:
            options = dict(num_heads=block.attn.num_heads, qkv_bias=qkv_bias)
            attn = Attention(self.embed_dim, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **options, **dd)
            block.attn = attn.apply(self._init_weights)
        grid = self.patch_embed.grid_size
        parts = [
            (self.blocks[:local_up_to_layer], TokenLayout(0, grid)),
            (self.blocks[local_up_to_layer:], TokenLayout(self.num_prefix_tokens, grid)),
        ]
        chosen = list(range(local_up_to_layer)) if layers is None else layers
        check_saved_form(layers)
        replace_attention(parts, self, layer_mixers(chosen, depth, mixer, keywords))
        for slot in slots_of(self).values():
            if isinstance(slot.core, GatedPositionalAttention):  # values start as the tokens themselves
                nn.init.eye_(slot.qkv.weight.data[2 * self.embed_dim :])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | no_decay_names(self)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ConvitXformer) -> dict[str, Any]:
    """Fit a checkpoint to the model: one of ours or timm's as it is, for another mixer with fresh parameters.

    Raises:
        ValueError: if it is neither, with the keys that are missing, unexpected or of another shape.
    """
    state_dict, found = split_checkpoint(tensors_of(state_dict), model)
    resample_positions(state_dict, model, 0, state_dict.get("patch_embed.proj.weight"))
    return complete_checkpoint(state_dict, model, **found)


def create_convit(row: ModelName, pretrained: bool, kwargs: dict[str, Any]) -> ConvitXformer:
    """Build the model of a registered name: its architecture, overridden by the user's ``kwargs``."""
    arguments = overridden(row, SIZES, kwargs)
    feature_cfg = dict(feature_cls="getter", out_indices=arguments.pop("out_indices", 3))
    return build_xformer(ConvitXformer, row.name, pretrained, arguments, checkpoint_filter_fn, feature_cfg)


def describe(row: ModelName) -> str:
    """The architecture of a row, for the documentation of its model."""
    return "ConViT-Ti"


def _cfgs() -> dict[str, dict[str, Any]]:
    host = get_pretrained_cfg("convit_tiny.fb_in1k").to_dict()
    kept = ("num_classes", "input_size", "mean", "std", "license", "first_conv", "classifier", "fixed_input_size")
    host = {key: host[key] for key in kept}
    return {"convix_gpsa_tiny.fb_in1k": dict(host, pool_size=None, hf_hub_id="timm/convit_tiny.fb_in1k")}


default_cfgs = generate_default_cfgs(_cfgs())

# name, mixer, stem, size, rotary positions, keywords
NAMES = [ModelName("convix_gpsa_tiny", "gpsa", None, "tiny")]

register_names(__name__, NAMES, create_convit, describe)
