"""Registered names as rows of a table: what differs between two models stands in their rows."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import register_model
from torch import nn

from ..mixers import MIXERS

# timm's configuration of a model for CIFAR-10
CIFAR10: dict[str, Any] = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    crop_pct=1.0,
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
)


class ModelName(NamedTuple):
    """A row: the registered name, and how its model is built.

    ``keywords`` are those of the mixer and of the model, which the user's override.
    """

    name: str
    mixer: str
    stem: Optional[str]
    size: str
    rope: Optional[str] = None
    keywords: dict[str, Any] = {}


def register_names(
    module: str,
    rows: list[ModelName],
    create: Callable[[ModelName, bool, dict[str, Any]], nn.Module],
    describe: Callable[[ModelName], str],
) -> None:
    """Register a function in timm for each row, as a function of ``module``, a name in ``sys.modules``.

    Args:
        create: builds the model of a row, given ``pretrained`` and the user's keywords.
        describe: names the architecture of a row, e.g. "ViT-Ti/16"; mixer and positions are added.
    """
    for row in rows:

        def entry_point(pretrained: bool = False, *, _row: ModelName = row, **kwargs: Any) -> nn.Module:
            return create(_row, pretrained, kwargs)

        mixer = MIXERS[row.mixer]
        positions = " and rotary positions" if row.rope else ""
        control = ", the control" if row.mixer == "softmax" else ""
        entry_point.__name__ = entry_point.__qualname__ = row.name
        entry_point.__module__ = module
        entry_point.__doc__ = f"{describe(row)}, {mixer.title}{positions}{control} ({mixer.source})."
        setattr(sys.modules[module], row.name, register_model(entry_point))
