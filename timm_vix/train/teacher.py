"""The frozen original of a converted model, and how new mixers are initialised from it before training."""

from collections.abc import Callable
from typing import Any, Optional

import timm
import torch
from timm.data import resolve_input_data_config
from torch import nn

from .._checks import InputError, check_at_most_one
from .._names import check_model
from .._weights import check_classes, check_weights, reason_of, weights_of_file
from ..slots.attention_slot import AttentionSlot
from ..slots.slot import MixerSlot


def check_teacher(run: Any) -> None:
    """Raise InputError for a source that timm doesn't know, or that would have random weights."""
    check_model(run.source, "source")
    if not getattr(run, "resume", False):  # an earlier version took both, and such a run may be continued
        check_at_most_one(weights=run.weights, pretrained=run.pretrained)
    check_weights("weights", run.weights)
    if not run.weights and not run.pretrained and ":" not in run.source:
        raise InputError(f"source={run.source} would have random weights; give weights=FILE or pretrained=True")


def build_teacher(
    source: str,
    source_kwargs: Optional[dict[str, Any]] = None,
    weights: Optional[str] = None,
    img_size: Optional[int] = None,
    device: str = "cpu",
    called: str = "source",
) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen original in eval mode, and timm's data configuration for it.

    Args:
        source: A name of timm.
        source_kwargs: Its keywords.
        weights: A file; None: the weights that timm has for the name.
        img_size: Side of the images in pixels; None: the source's own.
        called: The name of the argument in errors.

    Raises:
        InputError: for keywords or weights that don't fit the source, or a file of weights that isn't there.
    """
    check_weights("weights", weights)
    arguments = dict(source_kwargs or {})
    if img_size:
        arguments["img_size"] = img_size
    if weights:
        arguments["pretrained_cfg_overlay"] = weights_of_file(weights, arguments.get("num_classes"))
    try:
        teacher = timm.create_model(source, pretrained=True, **arguments)
    except Exception as error:  # timm, torch and safetensors raise by kind of damage
        given = f" with weights={weights}" if weights else ""
        reason = reason_of(error, source, weights, arguments.get("num_classes"))
        raise InputError(f"{called}={source}{given} cannot be built: {reason}") from error
    check_classes(teacher, f"{called}={source}")
    size = dict(img_size=img_size) if img_size else {}
    return teacher.to(device).eval().requires_grad_(False), resolve_input_data_config(teacher, size)


@torch.no_grad()
def start_mixers(teacher: nn.Module, mixers: dict[str, MixerSlot], images: torch.Tensor) -> None:
    """Initialise mixers from the inputs of the teacher's attention at their paths, for some images (B, C, H, W)."""

    def initialise(mixer: MixerSlot) -> Callable:
        def hook(attn: nn.Module, args: tuple, kwargs: dict) -> None:
            if isinstance(mixer, AttentionSlot):
                mixer.init_from_inputs(args[0], kwargs.get("rope"))

        return hook

    handles = [
        teacher.get_submodule(path).register_forward_pre_hook(initialise(mixer), with_kwargs=True)
        for path, mixer in mixers.items()
    ]
    try:
        teacher(images)
    finally:
        for handle in handles:
            handle.remove()
