"""The trunk of all ``vix_*``, ``hybrid_*`` and ``t2t_*`` models: timm's vision transformer with another token mixer.

Sizes: ViT-Ti, -S and -B are from Touvron et al. 2021 (arXiv 2012.12877, table 1) and Dosovitskiy et al. 2021 (arXiv
2010.11929, table 1); ``cifar`` is the configuration of Jeevan & Sethi 2022 (arXiv 2107.02239): every pixel of a 32 px
image is a token.

*Differs:* the ``cifar`` models, those of ``cct.py``, ``cvt.py``, ``levin.py`` and ``pin.py`` too, correct the
following in the official code of Jeevan & Sethi, as far as they have the part in question.

- No value depends on other images of the batch, except by batch normalisation, in the stems and in LeViT. In the code
  the start of Nyström's inverse and Performer's largest key depend on them.
- The position embedding and the class token start at timm's scale. Rotary positions don't rotate the class token.
- Nyström: landmarks are pooled over the image, not over rows of the raster, and rotated by the centres of their cells.
  Nothing is padded. The residual convolution (``conv_residual``, off in other sizes) is a depthwise 5x5 over the image,
  not over 33 tokens of the raster.
- Linformer: its matrices are resampled for another image size. Values are projected, where the code takes the keys
  again. Keys are rotated after they are projected.
- Performer: features can be drawn anew in training (``redraw_interval``). The code has a class for this, and never uses
  it. The default is off here, too.
"""

from typing import Any, Optional, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import to_2tuple
from timm.models.vision_transformer import Block, ParallelThingsBlock, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from .._checks import InputError, check_choice, check_integer
from ..conversion.layers import Layers, check_saved_form, layer_mixers
from ..conversion.merge_steps import Merge, first_merge, merge_steps
from ..conversion.merging import check_merging, set_merging
from ..conversion.record import source_of
from ..conversion.scaling import check_scaling, trained_tokens
from ..mixers import MIXERS
from ..slots.model import layout_of, mixer_name, no_decay_names, set_grid, slots_of
from ..slots.replace import replace_attention
from ..stems import STEMS
from ._arguments import StemMixer, check_sizes, first_convolution, stem_class, take_keywords
from ._build import build_xformer, overridden
from ._daff import replace_mlps
from ._register import CIFAR10, ModelName
from .checkpoints import check_positions, complete_checkpoint, resample_positions, split_checkpoint, tensors_of

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "small": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "base": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "cifar": dict(img_size=32, patch_size=1, embed_dim=128, depth=4, num_heads=4, mlp_ratio=2.0, qkv_bias=False),
}
# the keywords of the paper's mixers, for models in which each pixel is a token
NYSTROM = dict(num_landmarks=64, conv_residual=True)
PERFORMER = dict(num_features=110, qkv_bias=True)
LINFORMER = dict(num_proj_tokens=64)
TITLES = {"tiny": "ViT-Ti/16", "small": "ViT-S/16", "base": "ViT-B/16"}
BLOCKS = {"sequential": Block, "parallel": ParallelThingsBlock}


def describe_vit(row: ModelName) -> str:
    """The architecture of a row, for the documentation of its model."""
    title = TITLES.get(row.size, "The paper's 32 px model, corrected (see module)")
    stem = {"conv": ", convolutional stem", "t2t": ", tokens-to-token stem"}.get(row.stem or "", "")
    return f"{title}{stem}"


def default_cfgs_for(
    rows: list[ModelName], first_conv: Optional[str] = "patch_embed.proj"
) -> dict[str, dict[str, Any]]:
    """timm default configurations: softmax ViT and DeiT weights for the patch-16 sizes, none for ``cifar``."""
    shared = dict(
        pool_size=None,
        crop_pct=0.9,
        interpolation="bicubic",
        fixed_input_size=True,
        first_conv=first_conv,
        classifier="head",
        license="apache-2.0",
    )
    cfgs: dict[str, dict[str, Any]] = {}
    for row in rows:
        name, size = row.name, row.size
        if size == "cifar":
            cfgs[name] = {**shared, **CIFAR10}
            continue
        imagenet = dict(shared, num_classes=1000, input_size=(3, 224, 224))
        cfgs[f"{name}.augreg_in21k_ft_in1k"] = dict(
            imagenet,
            hf_hub_id=f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k",
            mean=IMAGENET_INCEPTION_MEAN,
            std=IMAGENET_INCEPTION_STD,
        )
        cfgs[f"{name}.deit_fb_in1k"] = dict(
            imagenet,
            hf_hub_id=f"timm/deit_{size}_patch16_224.fb_in1k",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
    return cfgs


class VisionXformer(VisionTransformer):
    """timm's ``VisionTransformer`` with a token mixer, a stem and positions chosen by name.

    Args:
        mixer: a name in ``timm_vix.mixers.MIXERS``.
        layers: the blocks that have it, as for ``timm_vix.convert``; a mapping mixes them. Other blocks have
            softmax attention.
        stem: "linear", "conv", "conv_linear", "conv_pool", "hmlp", "sope" or "t2t".
        stem_mixer: for ``stem="t2t"`` the mixer in the stem, as a name, or as a mapping with "mixer" and its keywords;
            None: Nyström attention.
        rope: None, "axial" or "1d"; with rotary positions there is no learned position embedding unless
            ``pos_embed="learn"`` asks for it.
        block: "sequential", or "parallel": two attentions side by side, then two MLPs, in half as many blocks as
            ``depth`` says (Touvron et al. 2022, arXiv 2203.09795, section 3). A sequential ViT's weights load in pairs.
        mlp: "mlp", or "daff": with a depthwise convolution over the patch grid inside (``_daff.py``).
        merge: how many tokens merge in each layer, or another form that ``timm_vix.convert`` takes.
        scale_logits: the number of tokens with which the weights were trained, such as 197: logits grow with the log of
            the number of tokens beyond it, see ``timm_vix.convert``. None or 0: they don't grow.
        **kwargs: the mixer's keywords (``timm_vix.mixers.MIXERS[mixer].keywords()``) and those of timm's class.

    Raises:
        ValueError: for an unknown name or wrong value, naming what is allowed.
        TypeError: for a keyword that neither takes.
    """

    def __init__(
        self,
        mixer: str = "softmax",
        stem: str = "linear",
        rope: Optional[str] = None,
        block: str = "sequential",
        stem_mixer: StemMixer = None,
        mlp: str = "mlp",
        layers: Layers = "all",
        merge: Optional[Merge] = None,
        scale_logits: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        check_choice("mixer", mixer, tuple(MIXERS))
        check_choice("stem", stem, tuple(STEMS))
        check_choice("block", block, tuple(BLOCKS))
        check_saved_form(layers)
        keywords = take_keywords(kwargs)
        if rope is not None:
            kwargs.setdefault("pos_embed", "none")
        check_sizes(kwargs.get("img_size", 224), kwargs.get("patch_size", 16), kwargs.get("dynamic_img_pad", False))
        kwargs.setdefault("embed_layer", stem_class(stem, stem_mixer))
        kwargs.setdefault("block_fn", BLOCKS[block])
        if block == "parallel":
            depth = kwargs.get("depth", 12)
            check_integer("depth", depth, 2)
            if depth % 2:
                raise InputError(f"depth={depth}: block='parallel' pairs the layers; allowed is an even number")
            if kwargs.get("fix_init"):
                raise InputError("fix_init=True: scales by depth, which parallel layers don't have; allowed is False")
            kwargs["depth"] = depth // 2
        super().__init__(**kwargs)
        self._traits = {"first_conv": first_convolution(stem)}
        replace_mlps(self.blocks, mlp, layout_of(self), kwargs.get("patch_drop_rate", 0))
        mixers = layer_mixers(layers, len(self.blocks), mixer, keywords)
        steps = merge_steps(0 if merge is None else merge, len(self.blocks))
        self.merge = None if first_merge(steps) is None else merge
        if isinstance(scale_logits, str):  # a saved model would take it for the size at which it runs
            raise InputError(
                f"scale_logits={scale_logits!r}: here the number of tokens with which the weights were trained is "
                "expected, such as 197 for 224 px and patches of 16 px"
            )
        trained = trained_tokens(self, scale_logits or 0)
        replace_attention([(self.blocks, layout_of(self))], self, mixers, rope, 0 if trained else first_merge(steps))
        check_merging(list(self.blocks), [list(slots_of(block).values()) for block in self.blocks], steps)
        check_scaling(slots_of(self), trained)
        if trained:
            for slot in slots_of(self).values():
                slot.trained_tokens = trained
        set_merging(self, self.merge or 0, steps)
        self._model_args = recorded_config(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | no_decay_names(self)

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: Optional[Union[int, tuple[int, int]]] = None,
        patch_size: Optional[Union[int, tuple[int, int]]] = None,
    ) -> None:
        """Take another image or patch size: position embedding and grid-bound mixer weights are resampled.

        Raises:
            ValueError: for an image that the patches don't divide.
        """
        check_sizes(
            self.patch_embed.img_size if img_size is None else img_size,
            self.patch_embed.patch_size if patch_size is None else patch_size,
            self.patch_embed.dynamic_img_pad,
        )
        super().set_input_size(img_size=None if img_size is None else to_2tuple(img_size), patch_size=patch_size)
        set_grid(self, self.patch_embed.grid_size)
        if source_of(self) is None:  # Linformer's regions stay; with another grid a reload would choose others
            self._model_args = {**self._model_args, **recorded_config(self)}


def recorded_config(model: nn.Module) -> dict[str, Any]:
    """The mixers' keywords in force, with which a saved model is built again; by layer where mixers differ."""
    found = {
        str(index): {"mixer": mixer_name(slot), **slot.config()}
        for index, block in enumerate(model.blocks.children())
        for slot in slots_of(block).values()
    }
    configs = list(found.values())
    if any(config != configs[0] for config in configs):
        return {"layers": found}
    return {name: value for config in configs[:1] for name, value in config.items() if name != "mixer"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionXformer) -> dict[str, Any]:
    """Fit a checkpoint to the model: one of ours as it is, one of a softmax ViT with our own parameters fresh.

    Raises:
        ValueError: if it is neither, with the keys that are missing, unexpected or of another shape.
    """
    state_dict = tensors_of(state_dict)
    kernel = state_dict.get("patch_embed.proj.weight")  # which is left out where the model has a stem
    state_dict, found = split_checkpoint(state_dict, model)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    check_positions(state_dict, model, prefix, kernel)
    if isinstance(model.patch_embed.proj, nn.Conv2d):
        state_dict = vit_checkpoint_filter_fn(state_dict, model)
    elif "pos_embed" in state_dict:
        resample_positions(state_dict, model, prefix, kernel)
        stem_keys = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith("patch_embed.")}
        state_dict = {**vit_checkpoint_filter_fn(state_dict, model), **stem_keys}
    return complete_checkpoint(state_dict, model, **found)


def create_vision_xformer(
    row: ModelName,
    pretrained: bool,
    kwargs: dict[str, Any],
    model_class: type[VisionXformer] = VisionXformer,
    sizes: dict[str, dict[str, Any]] = SIZES,
) -> VisionXformer:
    """Build the model of a registered name: its architecture, overridden by the user's ``kwargs``.

    Raises:
        ValueError: for a checkpoint that can't be read or doesn't fit.
    """
    arguments = overridden(row, sizes, kwargs)
    feature_cfg = dict(out_indices=arguments.pop("out_indices", 3), feature_cls="getter")
    return build_xformer(model_class, row.name, pretrained, arguments, checkpoint_filter_fn, feature_cfg)
