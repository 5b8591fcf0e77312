"""Files of weights, and whether a model fits them."""

from pathlib import Path
from typing import Any, Optional
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import nn

from ._checks import InputError
from ._files import one_line


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
        raise InputError(f"{name}={path} is no readable file of weights: {one_line(error)}") from error


def check_classes(model: nn.Module, what: str) -> None:
    """Raise InputError for a classifier of other classes than the weights have: timm leaves it random then."""
    known = model.pretrained_cfg.get("num_classes")
    if model.num_classes and known not in (None, model.num_classes):
        raise InputError(f"{what} has {model.num_classes} classes, but its weights are for {known} classes")
