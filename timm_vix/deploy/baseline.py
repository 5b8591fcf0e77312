"""The softmax baseline of a trained model: the same trunk with softmax attention, and with the weights that fit."""

import contextlib
import copy
from typing import Optional

import timm
from timm.models import get_model_args
from torch import nn

from .._checks import InputError
from ..conversion.convert import revert
from ..conversion.merging import MergingBlocks
from ..models.softmax_trunk import softmax_counterpart
from ..slots.model import hosts_of, is_plain_core


def softmax_baseline(model: nn.Module) -> tuple[Optional[nn.Module], bool]:
    """The softmax baseline of a trained model, in eval mode, and whether its predictions are meaningful.

    A converted model is reverted. One of ours is built anew with softmax attention, and takes over the weights; where
    the mixer has no queries, keys and values, only the time of softmax can be compared.

    Returns:
        None instead of a model for one whose attention is softmax over all tokens, or that has none.

    Raises:
        InputError: for a model whose softmax baseline can't be built.
    """
    merges = isinstance(getattr(model, "blocks", None), MergingBlocks)
    if not merges and all(is_plain_core(host.core) for host in hosts_of(model).values()):
        return None, False
    keywords = get_model_args(model)
    if "source" in keywords:
        reverted = copy.deepcopy(model)
        with contextlib.suppress(InputError):  # a mixer without queries, keys and values: the attention was not saved
            revert(reverted)
            return reverted.eval(), True
    architecture = model.pretrained_cfg["architecture"]
    counterpart = softmax_counterpart(architecture, keywords)
    if counterpart is None:
        raise InputError(f"{architecture} has no softmax model of the same trunk; expected a model of this package")
    name, trunk = counterpart
    softmax = timm.create_model(name, **trunk).eval()
    own, theirs = softmax.state_dict(), model.state_dict()
    fitting = {key: theirs[key] for key in own if key in theirs and theirs[key].shape == own[key].shape}
    softmax.load_state_dict(fitting, strict=False)
    return softmax, fitting.keys() == own.keys()
