"""Files of weights, and whether a model fits them."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Optional
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from timm.models import get_pretrained_cfg, load_state_dict
from torch import nn

from ._checks import InputError
from ._files import one_line

# the weights of classifiers, by the keys that timm's transformers have for them
CLASSIFIERS = ("head.weight", "head.fc.weight", "head.linear.weight", "classifier.weight", "fc.weight")


def weights_of_file(path: Any, num_classes: Optional[int] = None) -> dict[str, Any]:
    """timm's ``pretrained_cfg_overlay`` for a file of weights in place of the Hub's.

    ``num_classes``: those of the file, or timm leaves its classifier out; None: as many as the weights of the name.
    """
    classes = {} if num_classes is None else dict(num_classes=num_classes)
    return dict(file=path, source=None, custom_load=False, **classes)


def check_weights(name: str, path: Optional[str]) -> None:
    """Raise ValueError if a file of weights is named and not there, or holds no weights."""
    if path is None:
        return
    if not Path(path).is_file():
        raise InputError(f"{name}={path} is no file; allowed is a .safetensors or .pth file")
    try:  # what timm raises of a damaged file doesn't name it
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt"):
                return
        torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # torch and safetensors raise by kind of damage
        saved = Path(path).suffix == ".safetensors" or is_zipfile(path) or isinstance(error, UnpicklingError)
        reason = one_line(error) if saved else "it is neither a .safetensors file nor one that torch.save wrote"
        raise InputError(f"{name}={path} is no readable file of weights: {reason}") from error


def reason_of(error: Exception, name: str, path: Optional[str], num_classes: Optional[int]) -> str:
    """Why a model can't be built with weights, in one line.

    Args:
        error: which timm, torch, safetensors or the Hub's client raised.
        name: of the model.
        path: of the file of weights, if there is one.
        num_classes: of the model; None: those of its configuration.
    """
    config = get_pretrained_cfg(name)  # None for a folder
    expected = num_classes or (config and config.num_classes)
    found = classes_in(path) if path else None
    if found and expected and found != expected:
        return f"the model has {expected} classes, and the weights are for {found}; allowed here is num_classes={found}"
    return f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)


def classes_in(path: str) -> Optional[int]:
    """The number of classes of a file of weights; None if it has no classifier that is known, or can't be read."""
    try:
        weights = load_state_dict(path)
    except Exception:  # torch and safetensors raise by kind of damage
        return None
    return next((len(weights[key]) for key in CLASSIFIERS if key in weights), None)


def check_classes(model: nn.Module, what: str) -> None:
    """Raise InputError for a classifier of other classes than the weights have: timm leaves it random then."""
    known = model.pretrained_cfg.get("num_classes")
    if model.num_classes and known not in (None, model.num_classes):
        raise InputError(f"{what} has {model.num_classes} classes, but its weights are for {known} classes")
