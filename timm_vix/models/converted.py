"""A converted timm ViT as a model with a name: ``timm_vix.convert`` for timm's scripts and the Hub.

    timm.create_model("vix_from_timm", source="deit_small_patch16_224", mixer="nystrom", layers="last-6")

What comes from a folder or the Hub isn't trusted, see ``saved.py``.
"""

from functools import partial
from typing import Any, Optional

from timm.models import (
    build_model_with_cfg,
    create_model,
    generate_default_cfgs,
    register_model,
)
from torch import nn

from .._checks import InputError, check_choice
from .._names import check_model
from ..conversion.convert import convert
from ..conversion.folding import fold_norms
from ..conversion.layers import Layers, check_saved_form
from ..conversion.merge_steps import Merge
from ..conversion.norms import replace_norms
from ..conversion.record import NAME, record_arguments, source_of
from ..conversion.saved_arguments import saved_arguments
from ..conversion.scaling import ScaleLogits
from ._arguments import take_keywords
from .saved import build_saved

# what may have become of the layer norms of a saved model
NORMS = (None, "batch", "folded", "folded_blocks")

# a fixed size, so that timm's scripts hand their --img-size to the source
default_cfgs = generate_default_cfgs(
    {NAME: dict(num_classes=1000, input_size=(3, 224, 224), fixed_input_size=True, classifier="head")}
)


def check_source(source: Any) -> None:
    """Raise ValueError unless ``source`` is the name of a timm model: not ours, nor a place of the Hub."""
    if isinstance(source, str) and (":" in source or source.partition(".")[0] == NAME):
        raise InputError(f"source={source!r} is no model of timm itself")
    check_model(source, "source")


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
    for name, value in source_kwargs.items():
        if name in kwargs and kwargs[name] != value:
            raise InputError(f"{name}={kwargs[name]!r} and source_kwargs: {name}={value!r} differ; allowed is one")
    model = create_model(source, **{**kwargs, **source_kwargs})  # a saved model has some of them in both places
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
    """Wrap a model for ``features_only``; it is converted before, since timm's wrapper drops its last layers."""
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
    check_saved_form(layers)
    if not isinstance(source_kwargs or {}, dict):
        raise InputError(f"source_kwargs={source_kwargs!r}: expected a mapping of arguments by name")
    cfg = kwargs.pop("pretrained_cfg", None)
    cache_dir = kwargs.pop("cache_dir", None)
    keywords = take_keywords(kwargs)
    arguments: dict[str, Any] = dict(mixer=mixer, layers=layers, keywords=keywords, merge=merge)
    arguments["scale_logits"] = scale_logits
    saved = isinstance(cfg, dict) and cfg.get("source") in ("local-dir", "hf-hub")
    built = arguments
    if saved or conversion:
        built = saved_arguments(conversion, kwargs.get("pretrained_model_args") or {}, arguments)
    mixer, layers = built["mixer"], built["layers"]
    keywords = built["keywords"] | {name: built[name] for name in ("merge", "scale_logits") if built[name] is not None}
    names = ("features_only", "out_indices", "feature_cls")
    wrapping = {name: kwargs.pop(name) for name in names if name in kwargs}
    check_choice("norms", norms, NORMS)
    create = partial(build, source, mixer, layers, keywords, source_kwargs or {}, norms)
    if saved:
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
    if source_of(model) is None and getattr(model, "pretrained_cfg", None):
        # softmax as it was: under the source's own name the keywords of this one would be unknown
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": NAME}
        own = dict(source=source, mixer="softmax", layers="all")
        model._model_args = {**getattr(model, "_model_args", {}), **own}
    if source_of(model) is not None:
        record_arguments(model, arguments, conversion)
    return features_of(model, **wrapping) if wrapping.pop("features_only", False) else model
