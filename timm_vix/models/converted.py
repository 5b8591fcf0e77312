"""A converted timm ViT as a model with a name: ``timm_vix.convert`` for timm's scripts and the Hub.

    timm.create_model("vix_from_timm", source="deit_small_patch16_224", mixer="nystrom", layers="last-6")

The configuration of a model from the Hub or a folder isn't trusted. It may name a registered timm model, and hold plain
values in sane ranges. Its weights are read as tensors only.
"""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from timm.models import (
    build_model_with_cfg,
    create_model,
    generate_default_cfgs,
    load_pretrained,
    load_state_dict_from_hf,
    register_model,
)
from timm.models._hub import load_state_dict_from_path
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_checkpoint_filter_fn
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from .._checks import InputError, check_choice, is_integer
from .._files import one_line
from .._names import check_model
from ..conversion.convert import convert
from ..conversion.folding import fold_norms
from ..conversion.layers import Layers
from ..conversion.merge_steps import Merge
from ..conversion.norms import replace_norms
from ..conversion.record import NAME, record_arguments, resolved_arguments
from ..conversion.replace import resample_weights, slots_of
from ..conversion.scaling import ScaleLogits
from ..conversion.sites import source_of
from ..mixers._slot import TokenSlot, rename_core_keys
from .checkpoints import tensors_of
from .vit import VisionXformer, take_keywords

# far beyond every published model, and small enough to be counted before memory is taken
LARGEST = {"depth": 1000, "num_classes": 10_000_000, "feature_seed": 2**63 - 1, "redraw_interval": 2**63 - 1}
LARGEST_OTHERWISE = 65_536
# what may have become of the layer norms of a saved model
NORMS = (None, "batch", "folded", "folded_blocks")
# sizes of a model, each a positive integer or several
SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")

# a fixed size, so that timm's scripts hand their --img-size to the source
default_cfgs = generate_default_cfgs(
    {NAME: dict(num_classes=1000, input_size=(3, 224, 224), fixed_input_size=True, classifier="head")}
)


def check_source(source: Any) -> None:
    """Raise ValueError unless ``source`` is the name of a timm model: not ours, nor a place of the Hub."""
    if isinstance(source, str) and (":" in source or source.partition(".")[0] == NAME):
        raise InputError(f"source={source!r} is no model of timm itself")
    check_model(source, "source")


def check_plain(name: str, value: Any) -> None:
    """Raise ValueError unless a saved argument is a plain value of a sane size."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_plain(name, key)
            check_plain(str(key), part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_plain(name, part)
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise InputError(f"{name}={value!r}: a saved configuration holds plain values only")
    elif isinstance(value, (int, float)) and not abs(value) <= LARGEST.get(name, LARGEST_OTHERWISE):
        raise InputError(f"{name}={value}: a saved configuration may go up to {LARGEST.get(name, LARGEST_OTHERWISE)}")


def check_saved_size(name: str, value: Any, lowest: int = 1) -> None:
    """Raise ValueError unless a saved size is an integer of at least ``lowest``, or a list of such integers."""
    parts = value if isinstance(value, (list, tuple)) and value else [value]
    if any(not is_integer(part) or part < lowest for part in parts):
        raise InputError(f"{name}={value!r}: a saved configuration may have integers of at least {lowest} here")


def check_saved(cfg: dict[str, Any], arguments: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError unless a saved configuration is complete, of plain values and of sane sizes.

    Args:
        cfg: of the weights.
        arguments: with which the model is to be built.
        saved: those of them that the configuration holds.
    """
    for name in ("device", "dtype"):
        if name in saved or name in (saved.get("source_kwargs") or {}):
            raise InputError(f"{name}: a saved configuration may not say where the model is built")
    for name in ("source", "mixer", "layers"):
        if name not in saved:
            raise InputError(f"the saved configuration lacks {name!r} among its model_args, so the model is unknown")
    for name, value in arguments.items():
        if name in inspect.signature(create_model).parameters:
            raise InputError(f"{name}={value!r}: a saved configuration may not say how to load another model")
        if name == "layers" and isinstance(value, str) and value.endswith(".json"):
            raise InputError(f"{name}={value!r}: a saved configuration names no file")
        check_plain(name, value)
    for name in ("num_classes", "input_size"):
        check_plain(name, cfg.get(name))
    # what is no number at all fails when the model is built
    sizes = {name: arguments[name] for name in SIZES if name in arguments and not isinstance(arguments[name], str)}
    input_size = cfg.get("input_size", (3, 224, 224))
    for name, value in {**sizes, "input_size": input_size}.items():
        check_saved_size(name, value)
    if not isinstance(input_size, (list, tuple)) or len(input_size) != 3:
        raise InputError(f"input_size={input_size!r}: a saved configuration may have channels, height and width here")
    for given in (cfg, arguments):
        check_saved_size("num_classes", given.get("num_classes", 0), 0)
    for name in ("first_conv", "classifier"):
        value = cfg.get(name)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and not all(isinstance(part, str) for part in parts):
            raise InputError(f"{name}={value!r}: a saved configuration names a module here, or several")


def read_weights(cfg: dict[str, Any], cache_dir: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model that ``save_for_hf`` or ``push_to_hf_hub`` stored.

    Raises:
        ValueError: for anything but tensors.
    """
    place = cfg["file"] if cfg["source"] == "local-dir" else cfg["hf_hub_id"]
    try:
        if cfg["source"] == "local-dir":
            return tensors_of(load_state_dict_from_path(Path(place), weights_only=True))
        return tensors_of(load_state_dict_from_hf(place, weights_only=True, cache_dir=cache_dir))
    except OSError:
        raise
    except Exception as error:
        # neither torch nor timm has an exception of its own for a damaged file
        raise InputError(
            f"{place} holds no readable weights; expected model.safetensors: {type(error).__name__}: {error}"
        ) from error


def fit_weights(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Fit the weights of a converted model to its grid."""
    for path, slot in slots_of(model).items():
        rename_core_keys(state_dict, f"{path}.", slot.core)
    filter_fn = eva_checkpoint_filter_fn if isinstance(model, Eva) else vit_checkpoint_filter_fn
    if not isinstance(model, VisionXformer) or isinstance(model.patch_embed.proj, nn.Conv2d):
        state_dict = filter_fn(state_dict, model)
    resample_weights(state_dict, model)
    return state_dict


def build(
    source: str,
    mixer: Optional[str],
    layers: Layers,
    keywords: dict[str, Any],
    source_kwargs: dict[str, Any],
    norms: Optional[str],
    **kwargs: Any,
) -> nn.Module:
    """Create the source with its keywords, and convert it. ``keywords`` are the mixer's, and those of ``convert``."""
    model = create_model(source, **kwargs, **source_kwargs)
    # first the norms: a mixer that reads them otherwise than attention can be put in after they are folded, not before
    if norms is not None:
        replace_norms(model, None)
    if norms in ("folded", "folded_blocks"):
        fold_norms(model, last=norms == "folded")
    if layers or norms is None:
        convert(model, mixer, layers, **keywords)
    elif mixer not in (None, "softmax") or keywords.keys() - {"merge", "scale_logits"}:
        raise InputError(f"mixer={mixer!r}, {keywords}: no layer of the saved model is converted; layers= names some")
    elif keywords:
        convert(model, **keywords)
    return model


def features_of(model: nn.Module, **wrapping: Any) -> nn.Module:
    """timm's wrapper for ``features_only``, around a model that was converted whole: it leaves out later layers."""
    return build_model_with_cfg(
        lambda **kwargs: model,
        NAME,
        False,
        pretrained_cfg=model.pretrained_cfg,
        features_only=True,
        feature_cfg=dict(out_indices=3, feature_cls="getter"),
        **wrapping,
    )


@register_model
def vix_from_timm(
    pretrained: bool = False,
    source: str = "deit_tiny_patch16_224",
    mixer: Optional[str] = None,
    layers: Layers = "all",
    merge: Optional[Merge] = None,
    scale_logits: Optional[ScaleLogits] = None,
    source_kwargs: Optional[dict[str, Any]] = None,
    norms: Optional[str] = None,
    conversion: Optional[dict[str, Any]] = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's ``source`` with a token mixer in some layers, see ``timm_vix.convert``.

    Args:
        pretrained: load the weights of ``source``, or those of the folder or repository that the name came from.
        source: a timm model with a tag if wanted, a ``VisionTransformer`` or ``Eva``.
        mixer: a name in ``timm_vix.mixers.MIXERS``; None: "nystrom", or the source's own attention where only ``merge``
            or ``scale_logits`` is given.
        layers: "all", "first-n", "last-n", "every-n", indices, a mapping from index to mixer, or the file of a plan.
        merge: how many tokens merge in each layer, or another form that ``convert`` takes.
        scale_logits: "log", or the number of tokens with which the source was trained, see ``convert``.
        source_kwargs: arguments of ``source`` whose names collide with those of this function or of a mixer's keyword.
        norms: only for a saved model: "batch" after ``replace_norms``; "folded" after ``fold_norms``; "folded_blocks"
            after ``fold_norms(model, last=False)``.
        conversion: only for a saved model: its arguments as given and as resolved, see ``record_arguments``.
        **kwargs: the mixer's keywords, and those of ``source``.

    Raises:
        ValueError: for a source, mixer, layer or keyword that isn't there, attention that can't be replaced, and a
            saved model that is broken or not what it says.
    """
    check_source(source)
    if not isinstance(source_kwargs or {}, dict):
        raise InputError(f"source_kwargs={source_kwargs!r}: expected a mapping of arguments by name")
    cfg = kwargs.pop("pretrained_cfg", None)
    cache_dir = kwargs.pop("cache_dir", None)
    keywords = take_keywords(kwargs)
    arguments = dict(mixer=mixer, layers=layers, keywords=dict(keywords), merge=merge, scale_logits=scale_logits)
    if conversion:
        mixer, layers, keywords, merge, scale_logits = resolved_arguments(conversion, arguments)
    keywords |= {
        name: value for name, value in dict(merge=merge, scale_logits=scale_logits).items() if value is not None
    }
    names = ("features_only", "out_indices", "feature_cls")
    wrapping = {name: kwargs.pop(name) for name in names if name in kwargs}
    check_choice("norms", norms, NORMS)
    create = partial(build, source, mixer, layers, keywords, source_kwargs or {}, norms)
    if isinstance(cfg, dict) and cfg.get("source") in ("local-dir", "hf-hub"):
        classes = kwargs.get("num_classes")
        if norms == "folded" and pretrained and classes not in (None, cfg.get("num_classes")):
            raise InputError(
                f"num_classes={classes}: the last norm of this model is part of its classifier, which has "
                f"{cfg.get('num_classes')} classes; allowed is this number, or fold_norms(model, last=False) before "
                "saving"
            )
        given = {**keywords, **(source_kwargs or {}), "mixer": mixer, "layers": layers}
        model = build_saved(create, source, given, cfg, cache_dir if pretrained else None, pretrained, kwargs)
    elif norms is not None:
        raise InputError(
            f"norms={norms!r} is for a model that was saved with them; allowed here is None, and then "
            "timm_vix.replace_norms(model, images)"
        )
    else:
        # weights that the caller gives are the source's; the rest of this name's configuration says nothing about it
        given = {name: cfg[name] for name in ("file", "state_dict") if isinstance(cfg, dict) and cfg.get(name)}
        if given:
            overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
            kwargs["pretrained_cfg_overlay"] = dict(source=None, custom_load=False) | given | overlay
        model = create(pretrained=pretrained, cache_dir=cache_dir, **kwargs)
    if source_of(model) is not None:
        record_arguments(model, arguments, conversion)
    elif getattr(model, "pretrained_cfg", None):
        # softmax as it was: under the source's own name the keywords of this one would be unknown
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": NAME}
        own = dict(source=source, mixer="softmax", layers="all")
        model._model_args = {**getattr(model, "_model_args", {}), **own}
        if conversion is not None:
            conversion.clear()
    return features_of(model, **wrapping) if wrapping.pop("features_only", False) else model


def build_saved(
    create: Callable[..., nn.Module],
    source: str,
    conversion: dict[str, Any],
    cfg: dict[str, Any],
    cache_dir: Any,
    pretrained: bool,
    kwargs: dict[str, Any],
) -> nn.Module:
    """A model from a folder or the Hub. Its configuration is checked before anything is built.

    Args:
        create: builds the model, given ``kwargs``.
        conversion: the mixer, the layers and the keywords with which ``create`` converts ``source``.
        cfg: the configuration of the weights.
    """
    caller = ("pretrained_cfg_overlay", "pretrained_model_args", "device", "dtype")
    arguments = {name: value for name, value in kwargs.items() if name not in caller} | conversion
    check_saved(cfg, arguments, kwargs.get("pretrained_model_args") or {})
    # the configuration isn't trusted: what it says about other places of weights is not for the source's loader
    taken = ("num_classes", "input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct", "first_conv")
    trusted = {name: cfg[name] for name in (*taken, "classifier") if name in cfg}
    kwargs["pretrained_cfg"] = {**trusted, "architecture": source.partition(".")[0]}
    weights = read_weights(cfg, cache_dir) if pretrained else {}
    try:
        with torch.device("meta"):
            size = sum(tensor.numel() for tensor in create(**kwargs).state_dict().values())
    except (TypeError, AttributeError, AssertionError, ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(f"the saved arguments {arguments} don't build {source}: {error}") from error
    if weights and size > 2 * sum(tensor.numel() for tensor in weights.values()) + 10_000_000:
        raise InputError(f"the saved configuration asks for {size} numbers, far more than the weights beside it hold")
    model = create(**kwargs)
    if pretrained:
        try:
            load_pretrained(
                model,
                {**kwargs["pretrained_cfg"], "state_dict": weights},
                num_classes=model.num_classes,
                in_chans=kwargs.get("in_chans", 3),
                filter_fn=fit_weights,
            )
        except RuntimeError as error:
            raise InputError(f"the weights don't fit {source} with this configuration: {one_line(error)}") from error
        forget_unsaved(model)
    return model


def forget_unsaved(model: nn.Module) -> None:
    """Forget the attention that token mixing replaced: it was not saved, so ``revert`` can't bring it back."""
    for slot in slots_of(model).values():
        if isinstance(slot, TokenSlot):
            slot.replaced = ()
