"""Vision transformers with efficient attention as timm models, and conversion of trained softmax ViTs to them.

>>> import timm, timm_vix
>>> model = timm.create_model("vix_nystrom_tiny", pretrained=True)

``import timm_vix`` registers the models in timm. ``finetune`` and ``transfer`` are imported on first use, since loading
the training code takes longer.

Where to find what, from the bottom up; a package imports only from those above it in this list:

- ``mixers``: token mixers, one mechanism in one file, by name in ``MIXERS``.
- ``stems``: patch embeddings, by name in ``STEMS``.
- ``slots``: modules that hold a mixer in the place of a model's attention, put there by ``replace_attention``.
- ``conversion``: changes of a trained model, see ``convert`` and ``revert``.
- ``models``: the registered names; ``vit.py`` is the trunk of most of them.
- ``measure``: operations, memory and latency of one model.
- ``data``: images of folders and data sets.
- ``train``: ``finetune`` and ``transfer``.
- ``planning``, ``benchmark``, ``deploy``: the other commands of ``cli.py``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import models
from .conversion.convert import convert, revert
from .conversion.delta import load_delta, save_delta
from .conversion.feedforward import structure_mlp
from .conversion.folding import fold_norms
from .conversion.freeze import freeze_except
from .conversion.handover import HandoverSchedule, finish_handover
from .conversion.norms import replace_norms
from .conversion.plan_file import load_plan

if TYPE_CHECKING:
    from .train.finetune import finetune
    from .train.transfer import transfer

__version__ = "0.1.0"
__all__ = [
    "HandoverSchedule",
    "convert",
    "finetune",
    "finish_handover",
    "fold_norms",
    "freeze_except",
    "load_delta",
    "load_plan",
    "models",
    "replace_norms",
    "revert",
    "save_delta",
    "structure_mlp",
    "transfer",
]

LAZY = {"finetune": "train.finetune", "transfer": "train.transfer"}


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
