"""What a converted model records about its conversion, so that timm saves it and builds it again.

``convert`` changes ``_model_args``, which timm stores beside the weights, and the name of the architecture: the saved
model is ``vix_from_timm`` with a source, its mixers by layer and their keywords. ``timm.create_model`` overwrites
recorded values by those that its caller gave, so a model that was created by name records its arguments twice: as they
were given, and as they were resolved.
"""

from functools import partial
from typing import Any, Optional

from torch import nn

from ..mixers._keywords import all_keywords
from ..slots.hooks import update_hooks
from ..slots.model import AttentionSite, mixer_name, no_decay_names, slots_of
from .merging import MergingBlocks
from .scaling import scaled_for
from .sites import attention_sites

NAME = "vix_from_timm"
# arguments with short forms, such as "all", "log" or a file: the resolved values are recorded as well
RESOLVED = ("mixer", "layers", "merge", "scale_logits")
# what a conversion records in ``_model_args``; arguments of the source with one of these names are in source_kwargs
RECORDED = {"source", "source_kwargs", *RESOLVED, "norms", "conversion"}


def recorded_mixer(model: nn.Module) -> str:
    """The mixer that a conversion has recorded; "softmax" for a model that isn't converted."""
    return getattr(model, "_model_args", {}).get("mixer") or "softmax" if source_of(model) else "softmax"


def record_conversion(
    model: nn.Module, sites: list[list[AttentionSite]], mixer: str, norms: Optional[str] = None
) -> None:
    """Record source, layers and keywords where timm looks when it saves a model; nothing if it is timm's own again.

    Args:
        norms: what became of the layer norms, see ``record_norms``; None: as recorded before.
    """
    norms = norms or getattr(model, "_model_args", {}).get("norms")
    layers = {}
    for index, block in enumerate(sites):
        module = getattr(block[0].parent, block[0].name)
        if module is not block[0].attn:
            layers[str(index)] = {"mixer": mixer_name(module), **module.config()}
    forget_conversion(model)
    update_hooks(model)
    if not layers and norms is None:
        return
    if layers:
        model.no_weight_decay = partial(no_weight_decay, model)
    cfg = getattr(model, "pretrained_cfg", None)
    # a model that was built from its class has no name, and timm can't save it either
    if cfg and cfg.get("architecture"):
        own = dict(getattr(model, "_model_args", {}))
        names = RECORDED | all_keywords()
        source_kwargs = {name: own.pop(name) for name in names & own.keys()}
        recorded = {"source": cfg["architecture"], "mixer": mixer, "layers": layers}
        if isinstance(model.blocks, MergingBlocks):
            recorded["merge"] = model.blocks.merge
        if number := scaled_for(model):
            recorded["scale_logits"] = number
        if norms is not None:
            recorded["norms"] = norms
        model.pretrained_cfg = {**cfg, "architecture": NAME}
        model._model_args = {**own, **recorded, **({"source_kwargs": source_kwargs} if source_kwargs else {})}


def record_norms(model: nn.Module, norms: str) -> None:
    """Record that layer norms were replaced, "batch", or folded, "folded" or without the last "folded_blocks"."""
    if source_of(model) is not None:  # what is recorded of its attention stays as it is
        model._model_args = {**model._model_args, "norms": norms}
        return
    # a model without a name of timm records no layers, and its mixers have parameters that weight decay spares as well
    converted = any(slot.replaced for slot in slots_of(model).values())
    sites = attention_sites(model, sequences=True) if converted else []
    record_conversion(model, sites, "softmax", norms)


def no_weight_decay(model: nn.Module) -> set[str]:
    """The parameters that weight decay spares: the host's and the mixers'."""
    return set(type(model).no_weight_decay(model)) | no_decay_names(model)


def forget_conversion(model: nn.Module) -> None:
    """Undo ``record_conversion``."""
    model.__dict__.pop("no_weight_decay", None)
    source = source_of(model)
    if source is not None:
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": source}
        own = {name: value for name, value in model._model_args.items() if name not in RECORDED | all_keywords()}
        model._model_args = {**own, **model._model_args.get("source_kwargs", {})}


def record_arguments(model: nn.Module, arguments: dict[str, Any], conversion: Optional[dict[str, Any]]) -> None:
    """Record the arguments with which a converted model was created, as given and as resolved, in ``_model_args``.

    ``timm.create_model`` overwrites the recorded values by those that the caller gave. "log", "all" or a file may mean
    something else when the model is loaded again, so the resolved values are kept in ``conversion``. An earlier
    ``conversion`` would overwrite them too, and is therefore changed in place.
    """
    conversion = {} if conversion is None else conversion
    conversion.clear()
    conversion.update(given=arguments, found={name: model._model_args.get(name) for name in RESOLVED})
    model._model_args = {**model._model_args, "conversion": conversion}


def record_resolved_arguments(model: nn.Module) -> None:
    """Replace the arguments with which a model was created by name by their resolved values, in ``_model_args``."""
    arguments = getattr(model, "_model_args", {})
    if conversion := arguments.get("conversion"):
        dropped = {*RESOLVED, "conversion"} | all_keywords()
        own = {name: value for name, value in arguments.items() if name not in dropped}
        model._model_args = {**own, **{name: value for name, value in conversion["found"].items() if value is not None}}


def source_of(model: nn.Module) -> Optional[str]:
    """The original name of a converted model, if it had one; None for a model that isn't converted."""
    arguments = getattr(model, "_model_args", {})
    return arguments["source"] if "source" in arguments and "layers" in arguments else None
