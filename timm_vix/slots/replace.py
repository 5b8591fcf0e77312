"""Replace the softmax attention of a timm vision transformer by a token mixer.

The registered models, conversions and models that come back from the Hub all build their mixers here.
"""

from typing import Any, Optional

from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from timm.models.naflexvit import NaFlexVit
from torch import nn

from .._checks import InputError, check_choice
from ..mixers import MIXERS
from ..mixers._keywords import is_plain_softmax
from ..mixers._landmarks import LandmarkAttention
from ..mixers._layout import Grid, TokenLayout
from ..mixers._mechanism import AttentionMechanism, AttentionShape, Mixer, TokenMixing
from ..mixers._rotary import RotaryPositions
from .attention_slot import AttentionSlot
from .hooks import update_hooks
from .landmark_slot import LandmarkSlot
from .model import find_attention, follow_training, warn_of_unseen_patches
from .slot import MixerSlot, TokenSlot


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
            slot = build_slot(model, site.attn, mixer, layout, positions.get(layout.grid), **keywords)
            setattr(site.parent, site.name, slot)
    update_hooks(model)
    warn_of_unseen_patches(model)


def build_slot(
    model: nn.Module, attn: nn.Module, mixer: str, layout: TokenLayout, rope: Optional[nn.Module], **keywords: Any
) -> MixerSlot:
    """A slot with a mixer and the weights of ``attn``, for the tokens of ``model``; neither is changed.

    Raises:
        ValueError: for what the mixer does not support.
    """
    if getattr(attn, "num_kv_groups", 1) > 1:
        raise InputError(
            f"attention with {attn.num_heads} heads of queries and {attn.num_kv_heads} of keys (grouped queries) can't "
            "be replaced; expected as many of both"
        )
    rotary = type(attn) in (AttentionRope, EvaAttention) and getattr(model, "rope", None) is not None
    if rotary and not MIXERS[mixer].supports_rotary:
        raise InputError(f"mixer={mixer!r} has no queries and keys for the rotary positions of {type(model).__name__}")
    slot = slot_around(MIXERS[mixer], attn, layout, rope, rope is not None or rotary, **keywords)
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


def slot_around(
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
        dim=weight.shape[0],
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        value_dim=attn.head_dim,
        queries=layout,
        keys=layout,
        dropout=attn.core.dropout if isinstance(attn, AttentionSlot) else attn.attn_drop.p,
        rotary=rotary,
        device=weight.device,
        dtype=weight.dtype,
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
    follow_training(slot, attn)
    return slot
