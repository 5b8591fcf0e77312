"""Vision transformers with efficient attention as timm models, and conversion of trained softmax ViTs to them.

>>> import timm, timm_vix
>>> model = timm.create_model("vix_nystrom_tiny", pretrained=True)

``import timm_vix`` registers the models in timm. ``finetune`` and ``transfer`` are imported on first use, since loading
the training code takes longer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import models
from .conversion.convert import convert, revert
from .conversion.delta import load_delta, save_delta
from .conversion.folding import fold_norms
from .conversion.freeze import freeze_except
from .conversion.norms import replace_norms
from .conversion.plan_file import load_plan

if TYPE_CHECKING:
    from .train.finetune import finetune
    from .train.transfer import transfer

__version__ = "0.1.0"
__all__ = [
    "convert",
    "finetune",
    "fold_norms",
    "freeze_except",
    "load_delta",
    "load_plan",
    "models",
    "replace_norms",
    "revert",
    "save_delta",
    "transfer",
]

LAZY = {"finetune": "train.finetune", "transfer": "train.transfer"}


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
