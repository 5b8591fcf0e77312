"""Replace the softmax attention of a timm vision transformer by a token mixer.

The registered models, conversions and models that come back from the Hub all build their mixers here.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.naflexvit import NaFlexVit
from torch import nn

from .._checks import InputError, check_choice
from ..mixers import MIXERS
from ..mixers._attention_slot import AttentionSlot
from ..mixers._landmark_slot import LandmarkSlot
from ..mixers._landmarks import LandmarkAttention
from ..mixers._layout import CarryGrid, Grid, RecordGrid, TokenLayout
from ..mixers._mechanism import AttentionMechanism, AttentionShape, MechanismHost, Mixer, TokenMixing
from ..mixers._rotary import RotaryPositions
from ..mixers._slot import GridModule, MixerSlot, TokenSlot
from ..mixers.softmax import SoftmaxAttention

# exact classes whose weights a mixer takes over; a subclass may compute something else
REPLACEABLE = (Attention, AttentionRope, EvaAttention)
# keywords with the values at which they add nothing: softmax attention with these is a host's own, and a mixer that was
# saved before there was one of them had this
ADDING_NOTHING: dict[str, Any] = dict(merge_keys=1.0, conv_residual=False, locality=0.0)
HOOKS = (RecordGrid, CarryGrid)
_logger = logging.getLogger(__name__)


class AttentionSite(NamedTuple):
    """A place in a model that holds attention: ``parent.name``, which is ``path`` in the model."""

    path: str
    parent: nn.Module
    name: str
    attn: nn.Module


def mixer_keywords(mixer: str) -> list[str]:
    """The keywords that a mixer takes, e.g. ``["num_landmarks", "pinv_iterations", ...]`` for "nystrom".

    Raises:
        ValueError: for a name that isn't in ``MIXERS``.
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    return MIXERS[mixer].keywords()


def all_keywords() -> set[str]:
    """The keywords of all mixers."""
    return {name for mixer in MIXERS for name in mixer_keywords(mixer)}


def check_keywords(mixer: str, keywords: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown mixer, or a keyword that it doesn't take."""
    allowed = mixer_keywords(mixer)
    for name, value in sorted(keywords.items()):
        if name not in allowed:
            owners = " or ".join(f"mixer={other!r}" for other in MIXERS if name in mixer_keywords(other))
            belongs = f"; {name} belongs to {owners}" if owners else ""
            raise InputError(f"{name}={value!r}: mixer={mixer!r} takes {', '.join(allowed)}{belongs}")


def mixer_name(module: nn.Module) -> str:
    """The name in ``MIXERS`` of the mixer in a slot, or in another host of mechanisms."""
    return next(name for name, mixer_class in MIXERS.items() if type(module.core) is mixer_class)


def slots_of(model: nn.Module) -> dict[str, MixerSlot]:
    """The slots of a model by path, first block first."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MixerSlot)}


def set_grid(model: nn.Module, grid: Grid) -> None:
    """Move all parts of ``model`` that see its patch grid to another one, weights resampled."""
    for module in model.modules():
        if isinstance(module, (GridModule, RotaryPositions)):
            module.set_grid(grid)


def resample_weights(state_dict: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Move what a checkpoint has of the mixers' weights on a grid to the grids of ``model``, in place."""
    for path, host in model.named_modules():
        if not isinstance(host, MechanismHost):
            continue
        grid: Any = getattr(
            host, "key_grid", host.grid
        )  # where queries and keys have two, the parameters are of the keys'
        for name, resample in host.core.grid_parameters.items():
            key = f"{path}.core.{name}"
            # a tensor with another number of axes is left as it is, and refused later as one of another shape
            if key in state_dict and state_dict[key].ndim == getattr(host.core, name).ndim:
                state_dict[key] = resample(state_dict[key], grid)


def no_decay_names(model: nn.Module) -> set[str]:
    """The mixers' parameters that weight decay should spare like those of one axis: grids of biases, and features."""
    return {
        f"{path}.core.{name}"
        for path, module in model.named_modules()
        if isinstance(module, MechanismHost)
        for name, _ in module.core.named_parameters()
        if name.rstrip("0123456789").endswith("bias") or name in module.core.learning_rates
    }


def is_plain_softmax(mixer: str, keywords: Mapping[str, Any]) -> bool:
    """Whether a mixer is the attention that hosts have themselves, without anything added."""
    return mixer == "softmax" and {**ADDING_NOTHING, **keywords} == ADDING_NOTHING


def is_plain_core(core: nn.Module) -> bool:
    """Whether a mechanism at hand is softmax attention to which nothing is added."""
    return type(core) is SoftmaxAttention and is_plain_softmax("softmax", core.config())


def is_softmax(module: nn.Module) -> bool:
    """Whether a module is softmax attention that a mixer can replace, to which nothing is added."""
    return is_plain_core(module.core) if type(module) is AttentionSlot else type(module) in REPLACEABLE


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """The places of a model that hold attention which can be replaced, first block first."""
    return [
        AttentionSite(f"{prefix}.{name}".lstrip("."), parent, name, attn)
        for prefix, parent in model.named_modules()
        for name, attn in parent.named_children()
        if type(attn) in REPLACEABLE
    ]


def build_mixer(
    model: nn.Module, attn: nn.Module, mixer: str, layout: TokenLayout, rope: Optional[nn.Module], **keywords: Any
) -> MixerSlot:
    """A slot with a mixer and the weights of ``attn``, for the tokens of ``model``; neither is changed.

    Raises:
        ValueError: for what the mixer does not support.
    """
    if getattr(attn, "num_kv_groups", 1) > 1:
        raise InputError(f"grouped queries ({attn.num_heads} heads, {attn.num_kv_heads} of keys) can't be replaced")
    rotary = type(attn) in (AttentionRope, EvaAttention) and getattr(model, "rope", None) is not None
    if rotary and not MIXERS[mixer].supports_rotary:
        raise InputError(f"mixer={mixer!r} has no queries and keys for the rotary positions of {type(model).__name__}")
    slot = build_slot(MIXERS[mixer], attn, layout, rope, rope is not None or rotary, **keywords)
    slot.is_sequence = isinstance(model, NaFlexVit)
    if slot.is_sequence and not (slot.core.takes_sequences and slot.supports_key_mask):
        names = ", ".join(name for name, mixer_class in MIXERS.items() if mixer_class.takes_sequences)
        given = ", ".join(f"{name}={value!r}" for name, value in {"mixer": mixer, **keywords}.items())
        raise InputError(
            f"{given}: {type(model).__name__} takes padded sequences of patches, and this needs the patch grid or "
            f"reads the padding; allowed are {names}, without conv_residual, locality and window_size, and with "
            "merge_keys=1"
        )
    if slot.uses_grid and getattr(getattr(model, "patch_drop", None), "prob", 0) > 0:
        raise InputError(
            f"patch_drop_rate={model.patch_drop.prob}: mixer={mixer!r} works on the whole patch grid, so no patch can "
            "be dropped; allowed is 0"
        )
    return slot


def build_slot(
    mixer_class: type[Mixer],
    attn: nn.Module,
    layout: TokenLayout,
    rope: Optional[nn.Module],
    rotary: bool,
    **keywords: Any,
) -> MixerSlot:
    """A slot with a new mixer; ``rotary`` says whether queries and keys are rotated, by ``rope`` or by the host."""
    weight = attn.proj.weight
    shape = AttentionShape(
        weight.shape[0],
        attn.num_heads,
        attn.head_dim,
        attn.head_dim,
        layout,
        layout,
        attn.core.dropout if isinstance(attn, AttentionSlot) else attn.attn_drop.p,
        rotary,
        weight.device,
        weight.dtype,
    )
    core = mixer_class.build(shape, **keywords)
    slot: MixerSlot
    if isinstance(core, TokenMixing):
        slot = TokenSlot(core, attn, layout)
    elif isinstance(core, LandmarkAttention):
        slot = LandmarkSlot(core, attn, layout, rope)
    else:
        assert isinstance(core, AttentionMechanism)
        slot = AttentionSlot(core, attn, layout, rope)
    return slot.train(attn.training)


class CountPasses:
    """Forward hook of a patch embedding: random features are drawn anew after some passes in training.

    It runs once for each forward pass, and not again when gradient checkpointing repeats the blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mixers = [module for module in model.modules() if isinstance(module, Mixer)]

    def __call__(self, patch_embed: nn.Module, args: Any, output: torch.Tensor) -> None:
        for mixer in self.mixers:
            mixer.count_pass()


def update_hooks(model: nn.Module) -> None:
    """Give a model the hooks that the parts of its blocks need, and take away those that they no longer need."""
    remove_hooks(model)
    parts = [module for module in model.modules() if isinstance(module, GridModule)]
    if parts and getattr(model, "dynamic_img_size", False):
        model.patch_embed.register_forward_hook(RecordGrid())
        for module in (*model.blocks.children(), *parts):  # any may be what is checkpointed
            module.register_forward_pre_hook(CarryGrid())
        for part in parts:
            part.dynamic = True
    if any(isinstance(module, Mixer) and module.counts_passes for module in model.modules()):
        embedding_of(model).register_forward_hook(CountPasses(model))
    make_key_masks(model)


def remove_hooks(model: nn.Module) -> None:
    """Take the hooks of ``update_hooks`` away."""
    modules = [embedding_of(model), *getattr(model, "blocks", nn.Sequential()).children()]
    modules += [module for module in model.modules() if isinstance(module, GridModule)]
    for hooks in (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (*HOOKS, CountPasses))]:
            del hooks[key]


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


def embedding_of(model: nn.Module) -> nn.Module:
    """The patch embedding of a host."""
    return model.embeds if isinstance(model, NaFlexVit) else model.patch_embed


def make_key_masks(model: nn.Module) -> None:
    """Let a ``NaFlexVit`` mask padding by masks of keys while it has slots; without, its masks are its own again.

    Its own may be of N x N, with the padding's queries masked too. Nothing reads what these give.
    """
    if not isinstance(model, NaFlexVit):
        return
    if slots_of(model):
        model.__dict__.setdefault("own_key_only_attn_mask", model.use_key_only_attn_mask)
        model.use_key_only_attn_mask = True
    else:
        model.use_key_only_attn_mask = model.__dict__.pop("own_key_only_attn_mask", model.use_key_only_attn_mask)


def layout_of(model: nn.Module) -> TokenLayout:
    """The layout of the tokens of a host at the size for which it was built.

    A ``NaFlexVit`` has a sequence, a grid of one row, as long as its grid of position embeddings.
    """
    if isinstance(model, NaFlexVit):
        rows, columns = model.embeds.pos_embed_grid_size or (16, 16)
        return TokenLayout(model.num_prefix_tokens, (1, rows * columns))
    height, width = model.patch_embed.grid_size
    return TokenLayout(model.num_prefix_tokens, (height, width))


def replace_attention(
    parts: list[tuple[nn.Module, TokenLayout]],
    model: nn.Module,
    mixers: dict[int, tuple[str, dict[str, Any]]],
    rope: Optional[str] = None,
    first_slot: Optional[int] = None,
) -> None:
    """Put mixers in the place of the attention of a new model, in place.

    Args:
        parts: parts of the model with the layout of their tokens; one part for a ViT, its blocks.
        model: timm ``VisionTransformer``, ``Eva`` or ``PoolingVisionTransformer``.
        mixers: for each block, counted over all parts, the name in ``MIXERS`` and the keywords. A part of fewer
            patches than a keyword counts takes as many as it has.
        rope: None, "axial" or "1d": rotary positions, shared by all blocks of a grid, for a model that has none.
        first_slot: the block from which on softmax attention has a slot too, as where tokens merge or logits are
            scaled; None: only where rotary positions or keywords want one.

    Raises:
        ValueError: for an unknown value, naming what is allowed.
    """
    if rope is not None:
        check_choice("rope", rope, ("axial", "1d"))
    if rope is not None and getattr(model, "rope", None) is not None:
        raise InputError(f"rope={rope!r}: {type(model).__name__} has rotary positions of its own")
    positions: dict[Grid, RotaryPositions] = {}
    blocks = [(block, layout) for part, layout in parts for block in part.children()]
    for index, (block, layout) in enumerate(blocks):
        mixer, keywords = mixers.get(index, ("softmax", {}))
        needs_slot = rope is not None or (first_slot is not None and index >= first_slot)
        if is_plain_softmax(mixer, keywords) and not needs_slot:
            continue
        sites = find_attention(block)
        if not sites:
            names = ", ".join(sorted({type(module).__name__ for module in block.modules() if hasattr(module, "qkv")}))
            raise InputError(
                f"mixer={mixer!r}: block {index}, a {type(block).__name__} with {names or 'no attention'}, has no "
                "softmax attention that can be replaced; allowed is attn_layer='' with timm's Block"
            )
        for site in sites:
            weight = site.attn.proj.weight
            if rope is not None and layout.grid not in positions:
                dd = {"device": weight.device, "dtype": weight.dtype}
                positions[layout.grid] = RotaryPositions(
                    rope, site.attn.head_dim, layout.grid, layout.num_prefix_tokens, **dd
                )
            slot = build_mixer(model, site.attn, mixer, layout, positions.get(layout.grid), **keywords)
            setattr(site.parent, site.name, slot)
    update_hooks(model)
    warn_of_unseen_patches(model)
