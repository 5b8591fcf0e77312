"""The primitive: replace the softmax attention of a timm vision transformer by a token mixer.

The registered models, conversions and models that come back from the Hub all go through ``swap_attention``.
"""

import inspect
from typing import Any, Optional

import torch
from timm.layers import Attention
from torch import nn

from .mixers import MIXERS
from .mixers._rotary import RotaryPositions
from .mixers._slot import Grid, TokenMixer, check_choice

SLOT_ARGUMENTS = {"self", "attn", "grid", "num_prefix_tokens", "rope"}


def mixer_options(mixer: str) -> list[str]:
    """The keywords that a mixer takes, e.g. ``["num_landmarks", "pinv_iterations", ...]`` for "nystrom".

    Raises:
        ValueError: for a name that isn't in ``MIXERS``.
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    return [name for name in inspect.signature(MIXERS[mixer].__init__).parameters if name not in SLOT_ARGUMENTS]


class BeforeForward:
    """Hook of a patch embedding that tells the mixers the grid of the images at hand.

    It runs once for each forward pass and not again when gradient checkpointing repeats the blocks. With checkpointing,
    call backward before the next forward pass if the two have different image sizes. TorchScript takes no such hook.
    """

    def __init__(self, model: nn.Module, dynamic: bool) -> None:
        self.mixers = [module for module in model.modules() if isinstance(module, TokenMixer)]
        self.ropes = [module for module in model.modules() if isinstance(module, RotaryPositions)]
        self.dynamic = dynamic

    def __call__(self, patch_embed: nn.Module, args: Any, output: torch.Tensor) -> None:
        # a dynamic patch embedding gives (B, H, W, C)
        grid = (output.shape[1], output.shape[2]) if self.dynamic else None
        for module in self.ropes:
            module.set_grid(grid or module.grid)
        for module in self.mixers:
            module.before_forward(grid or module.grid)


def set_grid(model: nn.Module, grid: Grid) -> None:
    """Move every mixer of ``model`` to another patch grid, weights resampled."""
    for module in model.modules():
        if isinstance(module, (TokenMixer, RotaryPositions)):
            module.set_grid(grid)


def swap_attention(
    model: nn.Module,
    mixer: str,
    rope: Optional[str] = None,
    stages: Optional[list[tuple[nn.Module, Grid, int]]] = None,
    **options: Any,
) -> None:
    """Replace every timm ``Attention`` in ``model`` by a mixer that takes over its weights, in place.

    Args:
        model: timm ``VisionTransformer``.
        mixer: a name in ``MIXERS``.
        rope: None, "axial" or "1d": rotary positions, shared by all blocks.
        stages: where the grid shrinks on the way, parts of the model with their (H, W) and number of prefix tokens. A
            part of fewer patches than ``num_landmarks`` or ``num_proj_tokens`` takes as many as it has.
        **options: the mixer's keywords, see ``mixer_options``.

    Raises:
        ValueError: for an unknown mixer, keyword or value, naming what is allowed.

    Example:
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> swap_attention(model, "nystrom", num_landmarks=64)
    """
    allowed = mixer_options(mixer)
    for name in options:
        if name not in allowed:
            raise ValueError(f"mixer={mixer!r} takes no {name}; it takes {', '.join(allowed) or 'no keywords'}")
    if rope is not None:
        check_choice("rope", rope, ("axial", "1d"))
    whole: Any = [(model,)]
    slots = [
        (parent, name, attn, *layout)
        for part, *layout in (stages or whole)
        for parent in part.modules()
        for name, attn in parent.named_children()
        if type(attn) is Attention
    ]
    if not slots:
        raise ValueError(f"{type(model).__name__} has no timm Attention to replace")
    if mixer == "softmax" and rope is None:
        return
    positions: dict[Grid, RotaryPositions] = {}
    mixers = []
    for _, _, attn, *layout in slots:
        grid, num_prefix_tokens = layout or (model.patch_embed.grid_size, model.num_prefix_tokens)
        if rope is not None and grid not in positions:
            dd = {"device": attn.proj.weight.device, "dtype": attn.proj.weight.dtype}
            positions[grid] = RotaryPositions(rope, attn.head_dim, grid, num_prefix_tokens, **dd)
        own = {key: fitting(key, value, grid) if stages else value for key, value in options.items()}
        mixers.append(MIXERS[mixer](attn, grid, num_prefix_tokens, positions.get(grid), **own))
    for (parent, name, *_), module in zip(slots, mixers):
        setattr(parent, name, module)
    dynamic = getattr(model, "dynamic_img_size", False)
    if dynamic or options.get("redraw_interval"):
        model.patch_embed.register_forward_hook(BeforeForward(model, dynamic))


def fitting(name: str, value: Any, grid: Grid) -> Any:
    """The value of a keyword that counts tokens, at most those of ``grid``; others as they are."""
    counts = name in ("num_landmarks", "num_proj_tokens") and isinstance(value, int)
    return min(value, grid[0] * grid[1]) if counts else value
