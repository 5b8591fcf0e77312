"""What a model has in the places of its attention: softmax attention that can be replaced, or slots with mixers."""

import logging
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.naflexvit import NaFlexVit
from torch import nn

from ..mixers import MIXERS
from ..mixers._keywords import is_plain_softmax
from ..mixers._layout import Grid, TokenLayout
from ..mixers._mechanism import MechanismHost
from ..mixers._rotary import RotaryPositions
from ..mixers.softmax import SoftmaxAttention
from .attention_slot import AttentionSlot
from .slot import GridModule, MixerSlot

# exact classes whose weights a mixer takes over; a subclass may compute something else
REPLACEABLE = (Attention, AttentionRope, EvaAttention)
_logger = logging.getLogger(__name__)


class AttentionSite(NamedTuple):
    """A place in a model that holds attention: ``parent.name``, which is ``path`` in the model."""

    path: str
    parent: nn.Module
    name: str
    attn: nn.Module


def mixer_name(module: nn.Module) -> str:
    """The name in ``MIXERS`` of the mixer in a slot, or in another host of mechanisms."""
    return next(name for name, mixer_class in MIXERS.items() if type(module.core) is mixer_class)


def slots_of(model: nn.Module) -> dict[str, MixerSlot]:
    """The slots of a model by path, first block first."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MixerSlot)}


def hosts_of(model: nn.Module) -> dict[str, MechanismHost]:
    """The modules of a model that hold a mixer, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MechanismHost)}


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """The places of a model that hold attention which can be replaced, first block first."""
    return [
        AttentionSite(f"{prefix}.{name}".lstrip("."), parent, name, attn)
        for prefix, parent in model.named_modules()
        for name, attn in parent.named_children()
        if type(attn) in REPLACEABLE
    ]


def is_plain_core(core: nn.Module) -> bool:
    """Whether a mechanism at hand is softmax attention to which nothing is added."""
    return type(core) is SoftmaxAttention and is_plain_softmax("softmax", core.config())


def is_softmax(module: nn.Module) -> bool:
    """Whether a module is softmax attention that a mixer can replace, to which nothing is added."""
    return is_plain_core(module.core) if type(module) is AttentionSlot else type(module) in REPLACEABLE


def layout_of(model: nn.Module) -> TokenLayout:
    """The layout of the tokens of a host at the size for which it was built.

    A ``NaFlexVit`` has a sequence, a grid of one row, as long as its grid of position embeddings.
    """
    if isinstance(model, NaFlexVit):
        rows, columns = model.embeds.pos_embed_grid_size or (16, 16)
        return TokenLayout(model.num_prefix_tokens, (1, rows * columns))
    height, width = model.patch_embed.grid_size
    return TokenLayout(model.num_prefix_tokens, (height, width))


def set_grid(model: nn.Module, grid: Grid) -> None:
    """Move all parts of ``model`` that see its patch grid to another one, weights resampled."""
    for module in model.modules():
        if isinstance(module, (GridModule, RotaryPositions)):
            module.set_grid(grid)


def resample_weights(state_dict: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Move what a checkpoint has of the mixers' weights on a grid to the grids of ``model``, in place.

    A mixer may take over from them what depends on their own grid.
    """
    for path, host in hosts_of(model).items():
        # where queries and keys have grids of their own, parameters lie on that of the keys
        grid: Any = getattr(host, "key_grid", host.grid)
        for name, resample in host.core.grid_parameters.items():
            key = f"{path}.core.{name}"
            # a tensor with another number of axes is left as it is, and refused later as one of another shape
            if key in state_dict and state_dict[key].ndim == getattr(host.core, name).ndim:
                host.core.before_resampling(name, state_dict[key])
                state_dict[key] = resample(state_dict[key], grid)


def no_decay_names(model: nn.Module) -> set[str]:
    """The mixers' parameters that weight decay should spare like those of one axis: grids of biases, and features."""
    return {
        f"{path}.core.{name}"
        for path, module in hosts_of(model).items()
        for name, _ in module.core.named_parameters()
        if name.rstrip("0123456789").endswith("bias") or name in module.core.learning_rates
    }


def follow_training(module: nn.Module, other: nn.Module) -> None:
    """Give a module the mode of another, training or not, but for the parts that both share: each keeps its own."""
    shared = set(other.modules())
    for part in module.modules():
        if part not in shared:
            part.training = other.training


def warn_of_unseen_patches(model: nn.Module) -> None:
    """Log a warning where the class token is pooled and no layer lets it see the patches."""
    slots = list(slots_of(model).values())
    blind = slots and not find_attention(model) and not any(slot.core.mixes_tokens for slot in slots)
    if blind and getattr(model, "global_pool", None) == "token":
        _logger.warning(
            f"mixer={mixer_name(slots[0])!r} mixes no tokens, so with global_pool='token' the output of "
            f"{type(model).__name__} is the same for every image; what makes sense is global_pool='avg', or layers= "
            "that leave other layers their attention"
        )
