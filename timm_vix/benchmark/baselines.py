"""The softmax baseline of a model, by name: the same trunk, stem and positions with softmax attention.

What the configuration of a folder or of the Hub says isn't trusted, see ``saved_model``.
"""

import inspect
from typing import Any, Optional

import timm
import torch
from timm.data import resolve_input_data_config
from timm.layers import set_fused_attn
from timm.models import resolve_model_input_args
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .._checks import InputError
from .._files import one_line
from .._names import parse_model
from ..conversion.record import NAME
from ..measure.job import JOB
from ..models.converted import check_source
from ..models.saved import check_plain
from ..models.softmax_trunk import Model, softmax_counterpart

# what a saved configuration may not say about its baseline: how and where timm loads a model
NOT_SAVED = inspect.signature(timm.create_model).parameters.keys() | {"device", "dtype"}


def baseline_of(spec: str, given: Optional[str] = None) -> str:
    """The softmax model that a model is timed against, with the keywords of the trunk.

    Args:
        spec: "NAME key=value ...".
        given: The baseline that the user wants instead.

    Raises:
        InputError: for a name that timm does not know, and for a configuration that can't be read or isn't allowed.
    """
    name, given_keywords = parse_model(spec)
    if given:
        parse_model(given)
        return given
    found = softmax_counterpart(*(saved_model(name, given_keywords) if ":" in name else (name, given_keywords)))
    if found is None:
        return JOB["baseline"]
    softmax, trunk = found
    # as they were written: a tuple's own text has spaces
    written = {part.partition("=")[0]: part for part in spec.split()[1:]}
    parts = [
        written[key] if key in given_keywords and given_keywords[key] == value else f"{key}={text_of(value)}"
        for key, value in trunk.items()
    ]
    baseline = " ".join([softmax, *parts])
    if parse_model(baseline) != (softmax, trunk):  # text with spaces would become keywords of its own
        raise InputError(f"model={spec!r} has a baseline with arguments that can't be written as key=value: {trunk}")
    return baseline


def text_of(value: Any) -> str:
    """A keyword's value without spaces, as ``parse_model`` reads it."""
    return value if isinstance(value, str) else repr(value).replace(" ", "")


def saved_model(name: str, keywords: dict[str, Any]) -> Model:
    """Architecture and keywords of a model in a folder or on the Hub: the saved ones, and before them those given here.

    The saved image size is left out, since the model is measured at another. No path in the configuration is followed:
    the source of a conversion has to be a model of timm itself, and no weights are named.

    Raises:
        InputError: for a configuration that can't be read, or that says more than how the model is built.
    """
    try:
        found = resolve_model_input_args(name, {}, **keywords)
    except Exception as error:  # timm raises as it likes
        raise InputError(f"model={name!r}: its configuration can't be read: {one_line(error)}") from error
    architecture, cfg = found.pop("model_name"), found.pop("pretrained_cfg")
    saved = found.pop("pretrained_model_args", {})
    source_kwargs = saved.get("source_kwargs") or {}
    if not isinstance(source_kwargs, dict):
        raise InputError(f"model={name!r}: source_kwargs={source_kwargs!r}: expected a mapping of arguments by name")
    for key, value in (*saved.items(), *source_kwargs.items()):
        if key in NOT_SAVED:
            raise InputError(f"model={name!r}: {key}: a saved configuration may not say how another model is loaded")
        check_plain(key, value)
    if architecture == NAME and "source" in found:
        check_source(found["source"])
    check_plain("num_classes", cfg.get("num_classes"))
    found.setdefault("num_classes", cfg.get("num_classes"))  # those of a trained model need not be among its arguments
    if "img_size" not in keywords:
        found.pop("img_size", None)
    return architecture, {key: value for key, value in found.items() if value is not None}


class CallsOfAttention(TorchFunctionMode):
    """Context that counts the calls of ``scaled_dot_product_attention``."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def can_run_fused(baseline: str) -> bool:
    """Whether a softmax model calls ``scaled_dot_product_attention``, without which no fused kernel can run.

    timm's LeViT doesn't, for one: it adds a learned bias to the logits of two matrix products of its own. Found out on
    the meta device, where nothing is computed. A model that can't be built there counts as one that does: what is wrong
    with it shows when it is measured.

    Example:
        >>> can_run_fused("vit_tiny_patch16_224"), can_run_fused("levit_128s")
        (True, False)
    """
    name, keywords = parse_model(baseline)
    keywords.pop("train_only", None)
    set_fused_attn(True)  # as where it is measured
    try:
        model = timm.create_model(**resolve_model_input_args(name, {}, **keywords), device="meta").eval()
        with torch.inference_mode(), CallsOfAttention() as calls:
            model(torch.zeros(1, *resolve_input_data_config(model, {})["input_size"], device="meta"))
    except Exception:  # timm's classes raise as they like
        return True
    return calls.count > 0


def attention_of(baseline: str, wanted: list[str]) -> list[str]:
    """How a softmax baseline is measured in rows of its own: as ``wanted``, a list of "fused" and "unfused".

    A baseline that never runs a fused kernel is measured as "unfused" only, unless ``wanted`` is empty.
    """
    return wanted if not wanted or can_run_fused(baseline) else ["unfused"]
