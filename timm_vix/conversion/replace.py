"""The primitive: replace the softmax attention of a timm vision transformer by a token mixer.

The registered models, conversions and models that come back from the Hub all build their mixers by ``build_mixer``.
"""

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

from .._checks import check_choice
from ..mixers import MIXERS
from ..mixers._rotary import RotaryPositions
from ..mixers._slot import AttentionMixer, Grid, TokenMixer

SLOT_ARGUMENTS = {"self", "attn", "grid", "num_prefix_tokens", "rope"}
# whose mathematics the mixers continue: any other class, a subclass too, may do something else
REPLACEABLE = (Attention, AttentionRope, EvaAttention)


class Slot(NamedTuple):
    """A place in a model that holds attention: ``parent.name``, which is ``path`` in the model."""

    path: str
    parent: nn.Module
    name: str
    attn: nn.Module


def mixer_options(mixer: str) -> list[str]:
    """The keywords that a mixer takes, e.g. ``["num_landmarks", "pinv_iterations", ...]`` for "nystrom".

    Raises:
        ValueError: for a name that isn't in ``MIXERS``.
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    return [name for name in inspect.signature(MIXERS[mixer].__init__).parameters if name not in SLOT_ARGUMENTS]


def check_options(mixer: str, options: Iterable[str]) -> None:
    """Raise ValueError for an unknown mixer, or a keyword that it doesn't take."""
    allowed = mixer_options(mixer)
    for name in options:
        if name not in allowed:
            raise ValueError(f"mixer={mixer!r} takes no {name}; it takes {', '.join(allowed) or 'no keywords'}")


class BeforeForward:
    """Hook of a patch embedding that tells the mixers the grid of the images at hand.

    It runs once for each forward pass and not again when gradient checkpointing repeats the blocks. With checkpointing,
    call backward before the next forward pass if the two have different image sizes. TorchScript takes no such hook.
    With ``follow`` the mixers take the patch embedding's grid even where all images have one size: a host's own
    ``set_input_size`` doesn't know them.
    """

    def __init__(self, model: nn.Module, follow: bool = False) -> None:
        self.mixers = [module for module in model.modules() if isinstance(module, TokenMixer)]
        self.ropes = [module for module in model.modules() if isinstance(module, RotaryPositions)]
        self.dynamic = getattr(model, "dynamic_img_size", False)
        self.follow = follow

    def __call__(self, patch_embed: nn.Module, args: Any, output: torch.Tensor) -> None:
        # a dynamic patch embedding gives (B, H, W, C)
        grid = (output.shape[1], output.shape[2]) if self.dynamic else patch_embed.grid_size if self.follow else None
        for module in self.ropes:
            module.set_grid(grid or module.grid)
        for module in self.mixers:
            module.before_forward(grid or module.grid)


def set_grid(model: nn.Module, grid: Grid) -> None:
    """Move every mixer of ``model`` to another patch grid, weights resampled."""
    for module in model.modules():
        if isinstance(module, (TokenMixer, RotaryPositions)):
            module.set_grid(grid)


def resample_weights(state_dict: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Move what a checkpoint has of the mixers' grid-bound weights to the grids of ``model``, in place."""
    for prefix, module in model.named_modules():
        if isinstance(module, TokenMixer):
            for name, resample in module.grid_parameters.items():
                key = f"{prefix}.{name}"
                if key in state_dict:
                    state_dict[key] = resample(state_dict[key], module.grid)


def undecayed(model: nn.Module) -> set[str]:
    """The mixers' parameters that weight decay should spare like those of one axis: grids of biases, and features."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, TokenMixer)
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith("bias") or name in module.learning_rates
    }


def find_attention(model: nn.Module) -> list[Slot]:
    """The places of a model that hold attention which can be replaced, first block first."""
    return [
        Slot(f"{prefix}.{name}".lstrip("."), parent, name, attn)
        for prefix, parent in model.named_modules()
        for name, attn in parent.named_children()
        if type(attn) in REPLACEABLE
    ]


def build_mixer(
    model: nn.Module,
    attn: nn.Module,
    mixer: str,
    positions: Optional[nn.Module] = None,
    layout: Optional[tuple[Grid, int]] = None,
    **options: Any,
) -> TokenMixer:
    """A mixer with the weights of ``attn``, for the tokens of ``model``; neither is changed.

    Args:
        layout: (H, W) and the number of prefix tokens, where they aren't those of the patch embedding.

    Raises:
        ValueError: for what the mixer can't honour.
    """
    if getattr(attn, "num_kv_groups", 1) > 1:
        raise ValueError(f"grouped queries ({attn.num_heads} heads, {attn.num_kv_heads} of keys) can't be replaced")
    rotates = type(attn) is not Attention and getattr(model, "rope", None) is not None
    if rotates and not issubclass(MIXERS[mixer], AttentionMixer):
        raise ValueError(f"mixer={mixer!r} has no queries and keys for the rotary positions of {type(model).__name__}")
    grid, num_prefix_tokens = layout or (model.patch_embed.grid_size, model.num_prefix_tokens)
    built = MIXERS[mixer](attn, grid, num_prefix_tokens, positions, **options)
    if built.uses_grid and getattr(getattr(model, "patch_drop", None), "prob", 0) > 0:
        raise ValueError(
            f"patch_drop_rate={model.patch_drop.prob}: mixer={mixer!r} works on the whole patch grid, so no patch can "
            "be dropped; allowed is 0"
        )
    built.given = options
    return built.train(attn.training)


def remove_hook(model: nn.Module) -> None:
    """Take ``BeforeForward`` away from the patch embedding: TorchScript wants that of a converted model.

    The model then keeps its image size, and draws no new random features.
    """
    hooks = model.patch_embed._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, BeforeForward)]:
        del hooks[key]


def swap_attention(
    model: nn.Module,
    mixer: str,
    rope: Optional[str] = None,
    stages: Optional[list[tuple[nn.Module, Grid, int]]] = None,
    **options: Any,
) -> None:
    """Replace every timm attention in ``model`` by a mixer that takes over its weights, in place.

    Args:
        model: timm ``VisionTransformer`` or ``Eva``.
        mixer: a name in ``MIXERS``.
        rope: None, "axial" or "1d": rotary positions, shared by all blocks, for a model that has none.
        stages: where the grid shrinks on the way, parts of the model with their (H, W) and number of prefix tokens. A
            part of fewer patches than ``num_landmarks`` or ``num_proj_tokens`` takes as many as it has.
        **options: the mixer's keywords, see ``mixer_options``. What a mixer adds begins as in a new model, Nyström's
            residual convolution at random; for a trained model, ``timm_vix.convert`` begins it as nothing.

    Raises:
        ValueError: for an unknown mixer, keyword or value, naming what is allowed.

    Example:
        >>> model = timm.create_model("vit_tiny_patch16_224")
        >>> swap_attention(model, "nystrom", num_landmarks=64)
    """
    check_options(mixer, options)
    if rope is not None:
        check_choice("rope", rope, ("axial", "1d"))
    parts: list[tuple[nn.Module, Optional[tuple[Grid, int]]]] = [(model, None)]
    if stages is not None:
        parts = [(part, (grid, num_prefix_tokens)) for part, grid, num_prefix_tokens in stages]
    slots = [(slot, layout) for part, layout in parts for slot in find_attention(part)]
    if not slots:
        raise ValueError(f"{type(model).__name__} has no timm Attention to replace")
    if mixer == "softmax" and rope is None:
        return
    if rope is not None and getattr(model, "rope", None) is not None:
        raise ValueError(f"rope={rope!r}: {type(model).__name__} has rotary positions of its own")
    positions: dict[Grid, RotaryPositions] = {}
    built = []
    for slot, layout in slots:
        grid, num_prefix_tokens = layout or (model.patch_embed.grid_size, model.num_prefix_tokens)
        if rope is not None and grid not in positions:
            dd = {"device": slot.attn.proj.weight.device, "dtype": slot.attn.proj.weight.dtype}
            positions[grid] = RotaryPositions(rope, slot.attn.head_dim, grid, num_prefix_tokens, **dd)
        own = {name: fitting(name, value, grid) if layout else value for name, value in options.items()}
        built.append((slot, build_mixer(model, slot.attn, mixer, positions.get(grid), layout, **own)))
    for slot, module in built:
        setattr(slot.parent, slot.name, module)
    if getattr(model, "dynamic_img_size", False) or options.get("redraw_interval"):
        model.patch_embed.register_forward_hook(BeforeForward(model))


def fitting(name: str, value: Any, grid: Grid) -> Any:
    """The value of a keyword that counts tokens, at most those of ``grid``; others as they are."""
    counts = name in ("num_landmarks", "num_proj_tokens") and isinstance(value, int)
    return min(value, grid[0] * grid[1]) if counts else value
