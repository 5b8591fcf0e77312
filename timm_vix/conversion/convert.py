"""Give a trained timm ViT another attention in some or all of its layers, in place, and take it back.

The mixers share the weights of the attention that they replace. What was converted is recorded for ``save_for_hf`` and
``push_to_hf_hub``, see ``record.py``.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Union

from timm.models.naflexvit import NaFlexVit
from torch import nn

from .._checks import InputError
from .._modules import has_hooks
from ..mixers._keywords import ADDING_NOTHING, check_keywords
from ..slots.attention_slot import AttentionSlot
from ..slots.hooks import HOOKS
from ..slots.model import AttentionSite, is_softmax, layout_of, warn_of_unseen_patches
from ..slots.replace import build_slot
from .layers import Layers, layer_mixers
from .merge_steps import Merge, first_merge, merge_steps
from .merging import MergingBlocks, check_merging, keeps_container, set_merging
from .plan_file import Plan, load_plan
from .record import record_conversion, recorded_mixer
from .report import Conversion, report_of
from .scaling import ScaleLogits, check_scaling, scaled_for, trained_tokens
from .sites import attention_sites


def convert(
    model: nn.Module,
    mixer: Optional[str] = None,
    layers: Union[Layers, Plan] = "all",
    merge: Optional[Merge] = None,
    scale_logits: Optional[ScaleLogits] = None,
    **keywords: Any,
) -> Conversion:
    """Replace the attention of some layers of a timm ViT by a token mixer, in place; weights are shared, not copied.

    Args:
        model: timm ``VisionTransformer``, ``Eva`` (EVA-02, DINOv3, rope-vit, Perception Encoder) or ``NaFlexVit``. The
            last takes mixers for padded sequences. Padding changes nothing; landmarks are pooled in sequence order.
        mixer: a name in ``MIXERS``; "softmax" gives a converted layer its own attention back. None: "nystrom", or with
            only ``merge`` or ``scale_logits`` the attention that each layer has. A layer that is given a mixer gets a
            new one, without what an earlier one has learned.
        layers: "all"; "first-n" or "last-n"; "every-n": each n-th, from the n-th on, so that the first stay; indices
            from 0; a mapping from index to a mixer, or to a dict with "mixer" and keywords; or a plan of ``timm-vix
            plan``, its file or what ``load_plan`` makes of it. Other layers stay as they are, converted ones too;
            a plan gives them their own attention back, and takes no ``mixer`` and no keywords of one.
        merge: token merging (Bolya et al. 2023, ``timm_vix/mixers/_merging.py``) in all layers, whatever ``layers``
            says. An integer is the number of patch tokens that each layer merges; a list has one number for each layer;
            a float in (0, 1) is the share of patch tokens left after the last layer; ``{"threshold": t}`` merges all
            pairs whose keys have a cosine of at least t, with a batch of 1. A layer merges at most half of its patch
            tokens, and never prefix tokens. Layers after the first merge need "softmax" or "performer". None keeps the
            present setting, or takes that of a plan; 0 disables merging. Features, pooling, masks and hooks of blocks
            see all N tokens. Iterating over ``model.blocks`` then gives calls within one forward pass; the modules are
            ``model.blocks.children()``. With an ``attn_mask``, only tokens that it treats alike merge.
            ``is_causal=True`` raises ValueError.
        scale_logits: "log" multiplies the logits of all layers, whatever ``layers`` says, by max(1, log N / log
            N_train), with N_train from the image size in ``pretrained_cfg`` and the patch size. An integer is N_train
            itself, which a model with resampled patches needs. None keeps the present setting, or takes that of a plan;
            0 disables the scaling.
        **keywords: of the mixer (``timm_vix.mixers.MIXERS[mixer].keywords()``); with a mapping, for those that take
            them.

    Returns:
        A ``Conversion`` with a row for each attention module; its ``table()`` shows them as text.

    Raises:
        ValueError: for a wrong argument, or for attention that can't be replaced or has hooks, naming the module and
            the reason; the model is then as it was.

    Example:
        >>> model = timm.create_model("vit_small_patch14_reg4_dinov2.lvd142m", pretrained=True, img_size=518)
        >>> print(timm_vix.convert(model, "nystrom", layers="last-6", num_landmarks=64).table())
        >>> timm_vix.convert(model, merge=60)
        >>> timm_vix.convert(model, layers="plan.json")
    """
    sites = attention_sites(model, sequences=True)
    layers = read_layers(layers, model)
    if isinstance(layers, Plan):
        merge = layers.merge if merge is None else merge
        scale_logits = layers.scale_logits if scale_logits is None else scale_logits
    check_sequence_options(model, merge, scale_logits)
    keeps_mixers = mixer is None and not keywords and (merge is not None or scale_logits is not None)
    mixer, wanted = wanted_mixers(model, len(sites), mixer, layers, keywords, keeps_mixers)
    trained = resolved_scaling(model, sites, scale_logits)
    merge = resolved_merging(model, len(sites), merge)
    steps = merge_steps(merge, len(sites))
    built_to_merge = merge_of_name(model) is not None
    # softmax attention needs a slot if logits are scaled, and from the first merge on, unless it has one
    first = None if built_to_merge else first_merge(steps)
    need_slots = [trained > 0 or (first is not None and layer >= first) for layer in range(len(sites))]
    planned = planned_sites(model, sites, wanted, need_slots)
    check_merging(list(model.blocks.children()), [[planned[site.path] for site in block] for block in sites], steps)
    check_scaling(planned, trained)

    former = {site.path: getattr(site.parent, site.name) for block in sites for site in block}
    for path, module in former.items():
        check_hooks(path, module, [planned[path]])
    if not built_to_merge and not keeps_container(model, merge, steps):
        check_hooks("blocks", model.blocks, model.blocks.children())
    follow_frozen_model(model, sites)
    for site in (site for block in sites for site in block):
        setattr(site.parent, site.name, planned[site.path])
        if isinstance(planned[site.path], AttentionSlot):
            planned[site.path].trained_tokens = trained
    if not built_to_merge:  # otherwise it merges as before
        set_merging(model, merge, steps)
    record_conversion(model, sites, mixer)
    warn_of_unseen_patches(model)
    return report_of(sites, former, steps, layout_of(model), trained)


def read_layers(layers: Any, model: nn.Module) -> Any:
    """``layers`` of ``convert``, with the plan of a file in its place."""
    if isinstance(layers, os.PathLike):
        layers = os.fspath(layers)
    return load_plan(layers, model) if isinstance(layers, str) and layers.endswith(".json") else layers


def wanted_mixers(
    model: nn.Module,
    depth: int,
    mixer: Optional[str],
    layers: Union[Layers, Plan],
    keywords: dict[str, Any],
    keeps_mixers: bool,
) -> tuple[str, dict[int, tuple[str, dict[str, Any]]]]:
    """The mixer that a conversion records, and name and keywords of what is wanted for each layer that is to change.

    Args:
        keeps_mixers: whether no mixer is named, and only ``merge`` or ``scale_logits`` is to be applied.

    Raises:
        ValueError: for a mixer, layer or keyword that isn't there, or layers for which no mixer is named.
    """
    if isinstance(layers, Plan):
        if mixer is not None or keywords:
            given = {} if mixer is None else dict(mixer=mixer)
            words = ", ".join(f"{name}={value!r}" for name, value in {**given, **keywords}.items())
            raise InputError(
                f"{words}: a plan names the mixer of each layer; allowed beside it are merge and scale_logits"
            )
        wanted = layer_mixers(layers.layers, depth, "softmax", {}) if layers.layers else {}
        return recorded_mixer(model), {layer: ("softmax", {}) for layer in range(depth)} | wanted
    if keeps_mixers and not isinstance(layers, Mapping):
        if not isinstance(layers, str) or layers != "all":
            raise InputError(
                f"layers={layers!r}: these are layers for a mixer, and none is named. merge and scale_logits act on "
                "the whole model; allowed is mixer=, or merge as a list with one number for each layer"
            )
        return recorded_mixer(model), {}
    name = "nystrom" if mixer is None else mixer
    check_keywords(name, {})
    return name, layer_mixers(layers, depth, name, keywords)


def resolved_scaling(model: nn.Module, sites: list[list[AttentionSite]], scale_logits: Optional[ScaleLogits]) -> int:
    """N_train of a conversion, see ``convert``; 0: logits stay as they are.

    Raises:
        ValueError: for another number than the one with which the model was created.
    """
    number = scaled_for(model) if scale_logits is None else trained_tokens(model, scale_logits)
    named = scale_of_name(sites)
    if named and number != named:
        raise InputError(
            f"scale_logits={scale_logits!r}: the model was created with {named}; pass another to create_model"
        )
    return number


def resolved_merging(model: nn.Module, depth: int, merge: Optional[Merge]) -> Merge:
    """How a conversion merges tokens, see ``convert``: as given, or as the model does at present.

    Raises:
        ValueError: for other merging than that with which the model was created.
    """
    if merge is None:
        merge = model.blocks.merge if isinstance(model.blocks, MergingBlocks) else 0
    built = merge_of_name(model)
    if built is not None and merge_steps(merge, depth) != merge_steps(built, depth):
        raise InputError(f"merge={merge!r}: the model was created with merge={built!r}; pass another to create_model")
    return merge


def merge_of_name(model: nn.Module) -> Optional[Merge]:
    """How a model merges by the name it was created with, in the layers that it has now; None if it doesn't."""
    built = getattr(model, "merge", None)
    return model.blocks.merge if built is not None and isinstance(model.blocks, MergingBlocks) else built


def scale_of_name(sites: list[list[AttentionSite]]) -> int:
    """N_train of a model that was created with ``scale_logits``; 0: it wasn't."""
    own = [site.attn for block in sites for site in block if isinstance(site.attn, AttentionSlot)]
    return max((slot.trained_tokens for slot in own), default=0)


def check_hooks(path: str, module: nn.Module, kept: Iterable[nn.Module]) -> None:
    """Raise ValueError for hooks or a forward of its own in a module that is to be replaced, or in a part of it.

    Args:
        path: of the module.
        kept: parts that stay in the model, as they are.
    """
    staying = {id(part) for one in kept for part in one.modules()}
    for name, part in module.named_modules(prefix=path):
        if id(part) not in staying and has_hooks(part, HOOKS):
            raise InputError(
                f"{name} has hooks or a forward of its own, which would be lost; remove them, and add them afterwards"
            )


def check_sequence_options(model: nn.Module, merge: Optional[Merge], scale_logits: Optional[ScaleLogits]) -> None:
    """Raise ValueError for ``merge`` or ``scale_logits`` in a model whose sequences are padded."""
    for name, value in dict(merge=merge, scale_logits=scale_logits).items():
        if isinstance(model, NaFlexVit) and value:
            raise InputError(
                f"{name}={value!r}: {type(model).__name__} takes padded sequences, whose padding would take part; "
                "allowed is None or 0"
            )


def planned_sites(
    model: nn.Module,
    sites: list[list[AttentionSite]],
    wanted: dict[int, tuple[str, dict[str, Any]]],
    need_slots: list[bool],
) -> dict[str, nn.Module]:
    """What is to stand at each place of attention, by path: the mixer that is wanted for its layer, or what is there.

    Args:
        wanted: name and keywords of a mixer, by layer.
        need_slots: for each layer, whether softmax attention that stays needs a slot, see ``planned_attention``.
    """
    planned = {}
    for layer, (block, needs_slot) in enumerate(zip(sites, need_slots)):
        for site in block:
            there = getattr(site.parent, site.name)
            planned[site.path] = there
            if layer in wanted:
                planned[site.path] = planned_attention(model, site, *wanted[layer], needs_slot)
            elif is_softmax(there) and (there is site.attn or not needs_slot):  # else it has its slot already
                kept = there.config() if isinstance(there, AttentionSlot) else {}
                planned[site.path] = planned_attention(model, site, "softmax", kept, needs_slot)
    return planned


def planned_attention(
    model: nn.Module, site: AttentionSite, name: str, own: dict[str, Any], needs_slot: bool
) -> nn.Module:
    """What is to stand at a place of attention: a mixer, or the attention itself unless a slot has something to do.

    Raises:
        ValueError: for what the mixer does not support.
    """
    if name == "softmax":
        host = site.attn.config() if isinstance(site.attn, AttentionSlot) else ADDING_NOTHING
        own = {**host, **own}
        if not needs_slot and own == host:
            return site.attn
    try:
        rope = site.attn.rope if isinstance(site.attn, AttentionSlot) else None
        slot = build_slot(model, site.attn, name, layout_of(model), rope, **own)
    except ValueError as error:
        raise InputError(f"{site.path}: {error}") from error
    for parameter, value in slot.core.added_init.items():
        if parameter in dict(slot.core.named_parameters()):
            nn.init.constant_(slot.core.get_parameter(parameter), value)
    slot.replaced = (site.attn,)
    if not slot.is_sequence:
        slot.patch_embed = (model.patch_embed,)  # the host's own set_input_size doesn't know the slots
    return slot


def follow_frozen_model(model: nn.Module, sites: list[list[AttentionSite]]) -> None:
    """Freeze weights that mixers without queries and keys keep aside, if the whole model was frozen without them."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        for site in (site for block in sites for site in block):
            site.attn.requires_grad_(False)


def revert(model: nn.Module) -> None:
    """Give a converted model its own attention back, in place, with the weights as they are now.

    Attention weights that a mixer without queries and keys kept aside are frozen as ``freeze_except`` said, or with the
    whole model. After freezing some parts by hand, freeze them again.

    Raises:
        ValueError: for a model that isn't converted, that was saved by a mixer which keeps no attention weights, or
            whose mixers have hooks.
    """
    sites = attention_sites(model, sequences=True)
    converted = [site for block in sites for site in block if getattr(site.parent, site.name) is not site.attn]
    if not converted:
        raise InputError(f"{type(model).__name__} is not converted: there is nothing to revert")
    for site in converted:
        check_hooks(site.path, getattr(site.parent, site.name), [site.attn])
    built_to_merge = merge_of_name(model) is not None
    if not built_to_merge and not keeps_container(model, 0, []):
        check_hooks("blocks", model.blocks, model.blocks.children())
    follow_frozen_model(model, sites)
    for site in converted:
        setattr(site.parent, site.name, site.attn)
    if not built_to_merge:
        set_merging(model, 0, [])
    record_conversion(model, sites, "softmax")
