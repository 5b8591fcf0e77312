"""Converted models from a folder or the Hub, whose configuration and weights aren't trusted.

The configuration may name a registered timm model, and hold plain values in sane ranges. Weights are read as tensors
only.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from timm.models import create_model, load_pretrained, load_state_dict, load_state_dict_from_hf
from timm.models._hub import load_state_dict_from_path
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_checkpoint_filter_fn
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from .._checks import InputError, is_integer
from .._files import one_line
from ..slots.model import resample_weights, slots_of
from ..slots.slot import TokenSlot, rename_core_keys
from .checkpoints import resample_positions, tensors_of
from .vit import VisionXformer

# far beyond every published model, and small enough to be counted before memory is taken
LARGEST = {"depth": 1000, "num_classes": 10_000_000, "feature_seed": 2**63 - 1, "redraw_interval": 2**63 - 1}
LARGEST_OTHERWISE = 65_536
# sizes of a model, each a positive integer or several
SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")


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


def read_weights(cfg: dict[str, Any], cache_dir: Any, file: Optional[str] = None) -> dict[str, torch.Tensor]:
    """The tensors of a model that ``save_for_hf`` or ``push_to_hf_hub`` stored, or those of a file of the caller's.

    Raises:
        ValueError: for anything but tensors.
    """
    place = file or (cfg["file"] if cfg["source"] == "local-dir" else cfg["hf_hub_id"])
    try:
        if file:
            return tensors_of(load_state_dict(file, weights_only=True))
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
    if unfinished := [key for key in state_dict if re.search(r"norm\d?\.old\.", key)]:
        raise InputError(
            f"the weights were saved during a hand-over from layer norms ({unfinished[0]}): build the source, call "
            "replace_norms(model, None, schedule), load them, train to the end of the schedule, and save after finish"
        )
    for path, slot in slots_of(model).items():
        rename_core_keys(state_dict, f"{path}.", slot.core)
    filter_fn = eva_checkpoint_filter_fn if isinstance(model, Eva) else vit_checkpoint_filter_fn
    if not isinstance(model, VisionXformer) or isinstance(model.patch_embed.proj, nn.Conv2d):
        state_dict = filter_fn(state_dict, model)
    else:
        resample_positions(state_dict, model, 0 if model.no_embed_class else model.num_prefix_tokens)
    resample_weights(state_dict, model)
    return state_dict


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
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}  # of the caller, who may name a file of weights
    trusted = {name: value for name, value in {**cfg, **overlay}.items() if name in (*taken, "classifier")}
    kwargs["pretrained_cfg"] = {**trusted, "architecture": source.partition(".")[0]}
    weights = read_weights(cfg, cache_dir, overlay.get("file")) if pretrained else {}
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
