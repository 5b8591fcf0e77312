"""Give a trained timm ViT another attention in some or all of its layers, in place, and take it back.

The mixers share the weights of the attention that they replace. A converted model notes its source, mixers and keywords
among timm's arguments, under the name ``vix_from_timm``, so that ``save_for_hf`` and ``push_to_hf_hub`` keep them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..mixers import MIXERS
from ..mixers._slot import TokenMixer
from .replace import REPLACEABLE, BeforeForward, Slot, build_mixer, check_options, mixer_options, remove_hook

HOSTS = (VisionTransformer, Eva)
NAME = "vix_from_timm"
Layers = Union[str, Sequence[int], Mapping[Any, Any]]


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of one place of attention: its block and path, the class before and after, the mixer's keywords."""

    layer: int
    path: str
    before: str
    after: str
    changed: bool
    options: dict[str, Any]
    new_parameters: int


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did: a row for each place of attention in the model, kept ones included."""

    rows: list[ConvertedLayer]
    tokens: int

    def table(self) -> str:
        """The rows as text, one line each."""
        width = max(len(row.path) for row in self.rows)
        lines = [f"layer  {'module':{width}}  what became of it, at {self.tokens} tokens"]
        for row in self.rows:
            keywords = ", ".join(f"{name}={value}" for name, value in row.options.items())
            became = f"-> {row.after}" if row.changed else "kept"
            fresh = f", {row.new_parameters} new parameters" if row.new_parameters else ""
            lines.append(
                f"{row.layer:5}  {row.path:{width}}  {row.before} {became}{f' ({keywords})' if keywords else ''}{fresh}"
            )
        return "\n".join(lines)


def original_attention(module: nn.Module) -> nn.Module:
    """The attention that stood where ``module`` stands, with the weights as they are now; unconverted: itself."""
    if not isinstance(module, TokenMixer) or not hasattr(module, "replaced"):
        return module
    (attn,) = module.replaced
    # moved to another device, or built anew, a module may have other tensors than those that it once took over
    for name in attn._modules:
        if name in module._modules:
            setattr(attn, name, module._modules[name])
    for name in attn._parameters:
        if name in module._parameters:
            setattr(attn, name, module._parameters[name])
    for name, buffer in attn._buffers.items():
        if buffer is not None:
            attn._buffers[name] = buffer.to(module.proj.weight)
    return attn.train(module.training)


def attention_slots(model: nn.Module) -> list[list[Slot]]:
    """For each block of a host, the places of its attention, converted or not.

    Raises:
        ValueError: for a model whose attention can't be continued by a mixer, naming the module and the reason.
    """
    if not isinstance(model, HOSTS):
        named = [(path, module) for path, module in model.named_modules() if "Att" in type(module).__name__]
        if not named:
            raise ValueError(f"{type(model).__name__} has no attention to replace")
        path, module = named[0]
        raise ValueError(
            f"{type(model).__name__} can't be converted: {path} ({type(module).__name__} of {type(module).__module__}) "
            f"{reason(module)}; what can be converted is timm's VisionTransformer and Eva"
        )
    found: list[list[Slot]] = []
    for index, block in enumerate(model.blocks):
        slots = [
            Slot(f"blocks.{index}.{prefix}{'.' if prefix else ''}{name}", parent, name, attn)
            for prefix, parent in block.named_modules()
            for name, module in parent.named_children()
            if type(attn := original_attention(module)) in REPLACEABLE
        ]
        if not slots:
            attn = getattr(block, "attn", block)
            path = f"blocks.{index}.attn" if attn is not block else f"blocks.{index}"
            raise ValueError(f"{path} ({type(attn).__name__}) can't be replaced: it {reason(attn)}")
        found.append(slots)
    return found


def reason(module: nn.Module) -> str:
    """Why attention of another class is not replaced, for an error message."""
    names = {name for name, _ in module.named_modules()} | set(vars(module)) | set(module._parameters)
    if isinstance(module, TokenMixer):
        return "is a mixer without the attention that it replaced; create the model with another mixer= instead"
    if type(module) in REPLACEABLE:
        return "works on tokens that are not prefix tokens and one patch grid"
    if any("rel_pos" in name or "relative_position" in name for name in names):
        return "adds a relative position bias to its logits, which no mixer can honour"
    if "Diff" in type(module).__name__:
        return "subtracts one softmax from another, which no mixer can honour"
    if "window_size" in names or "mask_unit" in str(sorted(names)):
        return "works in windows"
    if "in_proj" in names:
        return "computes attention and MLP by joint projections"
    return "is none of timm's Attention, AttentionRope and EvaAttention over a class token and a patch grid"


def layer_mixers(layers: Layers, depth: int, mixer: str, options: dict[str, Any]) -> dict[int, tuple[str, dict]]:
    """Mixer and keywords for each layer that ``layers`` names, see ``convert``.

    Raises:
        ValueError: for a form, a layer, a mixer or a keyword that isn't there.
    """
    forms = "expected 'all', 'first-n', 'last-n', 'every-n', a list of indices or a mapping from index to mixer"
    chosen: dict[Any, Any]
    if isinstance(layers, str):
        form, _, count = layers.partition("-")
        if layers != "all" and not (
            form in ("first", "last", "every") and count.isdecimal() and 0 < int(count) <= depth
        ):
            raise ValueError(f"layers={layers!r}: {forms}, with n from 1 to {depth}")
        n = depth if layers == "all" else int(count)
        indices = {"all": range(depth), "first": range(n), "last": range(depth - n, depth)}
        chosen = dict.fromkeys(indices.get(form, range(n - 1, depth, n)), mixer)
    elif isinstance(layers, Mapping):
        chosen = dict(layers)
    elif isinstance(layers, Sequence) and all(isinstance(layer, (int, str)) for layer in layers):
        chosen = dict.fromkeys(layers, mixer)
    else:
        raise ValueError(f"layers={layers!r}: {forms}")
    if not chosen:
        raise ValueError(f"layers={layers!r} names no layer: {forms}")
    found: dict[int, tuple[str, dict]] = {}
    for key, value in chosen.items():
        # a mapping that went through a JSON file has text for its keys
        index = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < depth:
            raise ValueError(f"layers: {key!r} is no layer; the model has {depth}, from 0 to {depth - 1}")
        own = dict(value) if isinstance(value, Mapping) else {"mixer": value}
        name = own.pop("mixer", mixer)
        if not isinstance(name, str) or index in found:
            raise ValueError(
                f"layers: {value!r} at layer {index}: expected one mixer's name, or a mapping with 'mixer'"
            )
        check_options(name, own)
        takes = mixer_options(name)
        found[index] = name, {**{k: v for k, v in options.items() if k in takes}, **own}
    used = sorted({name for name, _ in found.values()})
    for name in used:
        others = set(options) - {option for mixer in used for option in mixer_options(mixer)}
        check_options(name, sorted(others))
    return dict(sorted(found.items()))


def convert(model: nn.Module, mixer: str = "nystrom", layers: Layers = "all", **options: Any) -> Conversion:
    """Replace the attention of some layers of a timm ViT by a token mixer, in place; weights are shared, not copied.

    Args:
        model: timm ``VisionTransformer`` or ``Eva`` (EVA-02, DINOv3, rope-vit, Perception Encoder).
        mixer: a name in ``MIXERS``; "softmax" gives a converted layer its own attention back.
        layers: "all"; "first-n" or "last-n"; "every-n": each n-th, from the n-th on, so that the first stay; indices
            from 0; or a mapping from index to a mixer, or to a dict with "mixer" and keywords. Other layers stay as
            they are, converted ones too.
        **options: keywords of the mixer, ``timm_vix.swap.mixer_options``; with a mapping, for those that take them.

    Returns:
        What became of each layer.

    Raises:
        ValueError: for a wrong argument, or for attention that can't be replaced, naming the module and the reason;
            the model is then as it was.

    Example:
        >>> model = timm.create_model("vit_small_patch14_reg4_dinov2.lvd142m", pretrained=True, img_size=518)
        >>> print(timm_vix.convert(model, "nystrom", layers="last-6", num_landmarks=64).table())
    """
    check_options(mixer, ())
    slots = attention_slots(model)
    given = getattr(model, "_model_args", {}).get("mixer")
    if given is not None and source_of(model) is None:
        raise ValueError(
            f"{model.pretrained_cfg['architecture']} was created with mixer={given!r}, which couldn't be told from the "
            f"conversion's in a saved model; create it with mixer={mixer!r}, or convert vix_softmax_*, hybrid_vit_* or "
            "a ViT of timm's"
        )
    wanted = layer_mixers(layers, len(slots), mixer, options)
    built: list[tuple[Slot, nn.Module]] = []
    for index, (name, own) in wanted.items():
        for slot in slots[index]:
            if name == "softmax":
                built.append((slot, slot.attn))
                continue
            try:
                module = build_mixer(model, slot.attn, name, **own)
            except ValueError as error:
                raise ValueError(f"{slot.path}: {error}") from error
            # the weights know no local convolution: it starts as nothing and leaves their function alone
            if getattr(module, "conv", None) is not None:
                nn.init.zeros_(module.conv.weight)
            # in a tuple, so that it is no sub-module with a state of its own
            module.replaced = (slot.attn,)
            built.append((slot, module))
    former = {slot.path: getattr(slot.parent, slot.name) for block in slots for slot in block}
    for slot, module in built:
        setattr(slot.parent, slot.name, module)
    note_conversion(model, slots, mixer)
    grid = model.patch_embed.grid_size
    return Conversion(
        [layer_row(index, slot, former[slot.path]) for index, block in enumerate(slots) for slot in block],
        model.num_prefix_tokens + grid[0] * grid[1],
    )


def layer_row(index: int, slot: Slot, former: nn.Module) -> ConvertedLayer:
    module = getattr(slot.parent, slot.name)
    inherited = {id(p) for p in slot.attn.parameters()}
    new_parameters = sum(p.numel() for p in module.parameters() if id(p) not in inherited)
    return ConvertedLayer(
        index,
        slot.path,
        type(former).__name__,
        type(module).__name__,
        module is not former,
        {} if module is slot.attn else recorded_options(module),
        new_parameters,
    )


def recorded_options(mixer: TokenMixer) -> dict[str, Any]:
    """The keywords with which ``mixer`` was built, and those that it chose for itself."""
    return {**mixer.given, **mixer.options()}


def note_conversion(model: nn.Module, slots: list[list[Slot]], mixer: str) -> None:
    """Note source, layers and keywords where timm looks when it saves a model; nothing if no layer is converted."""
    layers = {}
    for index, block in enumerate(slots):
        module = getattr(block[0].parent, block[0].name)
        if module is not block[0].attn:
            name = next(name for name, mixer_class in MIXERS.items() if type(module) is mixer_class)
            layers[str(index)] = {"mixer": name, **recorded_options(module)}
    forget_conversion(model)
    cfg = getattr(model, "pretrained_cfg", None)
    if layers:
        model.patch_embed.register_forward_hook(BeforeForward(model, follow=True))
        # a model that was built from its class has no name, and timm can't save it either
        if cfg and cfg.get("architecture"):
            source = model.pretrained_cfg["architecture"]
            model.pretrained_cfg = {**model.pretrained_cfg, "architecture": NAME}
            model._model_args = {
                **getattr(model, "_model_args", {}),
                "source": source,
                "mixer": mixer,
                "layers": layers,
            }


def source_of(model: nn.Module) -> Optional[str]:
    """The name of the model that a converted one was, if it had one; None for one that isn't converted."""
    arguments = getattr(model, "_model_args", {})
    return arguments["source"] if "source" in arguments and "layers" in arguments else None


def forget_conversion(model: nn.Module) -> None:
    """Undo ``note_conversion``, and take the hook away."""
    remove_hook(model)
    source = source_of(model)
    if source is not None:
        model.pretrained_cfg = {**model.pretrained_cfg, "architecture": source}
        ours = {"source", "mixer", "layers", *(option for name in MIXERS for option in mixer_options(name))}
        model._model_args = {name: value for name, value in model._model_args.items() if name not in ours}


def revert(model: nn.Module) -> None:
    """Give a converted model its own attention back, in place, with the weights as they are now.

    Raises:
        ValueError: for a model that isn't converted, or that was saved by a mixer which keeps no attention weights.
    """
    slots = [slot for block in attention_slots(model) for slot in block]
    converted = [slot for slot in slots if getattr(slot.parent, slot.name) is not slot.attn]
    if not converted:
        raise ValueError(f"{type(model).__name__} is not converted: there is nothing to revert")
    for slot in converted:
        setattr(slot.parent, slot.name, slot.attn)
    forget_conversion(model)
