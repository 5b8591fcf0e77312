"""The softmax baseline of a model, by name: the same trunk, stem and positions with softmax attention."""

from typing import Any, Optional

import timm
import torch
from timm.data import resolve_input_data_config
from timm.layers import set_fused_attn
from timm.models import resolve_model_input_args
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .._names import parse_model
from ..measure.job import JOB
from ..models.softmax_trunk import softmax_counterpart


def baseline_of(spec: str, given: Optional[str] = None) -> str:
    """The softmax model that a model is timed against, with the keywords of the trunk.

    Args:
        spec: "NAME key=value ...".
        given: The baseline that the user wants instead.

    Raises:
        InputError: for a name that timm does not know.
    """
    name, keywords = parse_model(spec)
    if given:
        parse_model(given)
        return given
    found = softmax_counterpart(name, keywords)
    if found is None:
        return JOB["baseline"]
    softmax, trunk = found
    # as they were written: a tuple's own text has spaces
    written = {part.partition("=")[0]: part for part in spec.split()[1:]}
    parts = [written[k] if keywords.get(k) == value else f"{k}={value}" for k, value in trunk.items()]
    return " ".join([softmax, *parts])


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
