"""Fit replacements of a trained model's layers to what passes through it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .._checks import InputError


class LayerFit(NamedTuple):
    """A layer at a path of a model, and what is called with its input and output and gives another output."""

    path: str
    layer: nn.Module
    replace: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(output).all():
            raise InputError(f"images: {self.path} gives numbers that aren't finite; expected finite images")
        return self.replace(args[0], output)


@torch.no_grad()
def fit_in_one_pass(model: nn.Module, fits: list[LayerFit], images: torch.Tensor) -> None:
    """Pass images through a model once, in eval mode; each layer's input is what the replacements before it give.

    Replacements that are each fitted to a layer's input in the original model lose far more accuracy together.

    Raises:
        ValueError: for images that aren't finite, an empty batch, and anything but a tensor (B, C, H, W).
    """
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) == 0:
        given = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise InputError(f"images={given}: expected a tensor (B, 3, H, W) of at least one image")
    handles = [fit.layer.register_forward_hook(fit) for fit in fits]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model(images.to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
