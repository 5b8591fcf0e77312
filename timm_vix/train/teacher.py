"""The frozen original of a converted model: how it is built, and what new mixers may see of it before training."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from torch import nn

from .._files import one_line
from .._names import check_model
from ..mixers._slot import AttentionSlot, MixerSlot
from .settings import check_weights


def check_teacher(run: SimpleNamespace) -> None:
    """Raise ValueError for a source that timm doesn't know, or that would have random weights."""
    check_model(run.source, "source")
    check_weights("weights", run.weights)
    if not run.weights and not run.pretrained and ":" not in run.source:
        raise ValueError(f"source={run.source} would have random weights; give weights=FILE or pretrained=True")


def build_teacher(run: SimpleNamespace) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen original, and timm's data configuration for it."""
    arguments = dict(run.source_kwargs or {})
    if run.img_size:
        arguments["img_size"] = run.img_size
    if run.weights:
        # the file's own number of classes, or timm leaves its classifier out
        classes = {"num_classes": arguments["num_classes"]} if "num_classes" in arguments else {}
        arguments["pretrained_cfg_overlay"] = dict(file=run.weights, source=None, custom_load=False, **classes)
    try:
        teacher = timm.create_model(run.source, pretrained=True, **arguments)
    except Exception as error:  # timm, torch and safetensors raise by kind of damage
        weights = f" with weights={run.weights}" if run.weights else ""
        raise ValueError(f"source={run.source}{weights} cannot be built: {one_line(error)}") from error
    wish = dict(img_size=run.img_size) if run.img_size else {}
    return teacher.to(run.device).eval().requires_grad_(False), resolve_input_data_config(teacher, wish)


@torch.no_grad()
def start_mixers(teacher: nn.Module, mixers: dict[str, MixerSlot], images: torch.Tensor) -> None:
    """Show the mixers, by their paths, what the teacher's attention there sees of some images (B, 3, H, W)."""

    def show(mixer: MixerSlot) -> Callable:
        def hook(attn: nn.Module, args: tuple, kwargs: dict) -> None:
            if isinstance(mixer, AttentionSlot):
                mixer.init_from_inputs(args[0], kwargs.get("rope"))

        return hook

    handles = [
        teacher.get_submodule(path).register_forward_pre_hook(show(mixer), with_kwargs=True)
        for path, mixer in mixers.items()
    ]
    try:
        teacher(images)
    finally:
        for handle in handles:
            handle.remove()
