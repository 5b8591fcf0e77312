"""The attention modules of a timm ViT that a mixer can replace, and those from before a conversion."""

from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .._checks import InputError
from ..mixers._mechanism import MechanismHost
from ..slots.model import REPLACEABLE, AttentionSite, follow_training, is_softmax
from ..slots.slot import MixerSlot

HOSTS = (VisionTransformer, Eva, NaFlexVit)


def original_attention(module: nn.Module) -> nn.Module:
    """The attention that stood where ``module`` stands, with the weights as they are now; unconverted: itself."""
    if not isinstance(module, MixerSlot) or not module.replaced:
        return module
    (attn,) = module.replaced
    # a slot that was built anew may have other tensors than those that it once took over
    for name in attn._modules:
        if name in module._modules and name != "core":
            setattr(attn, name, module._modules[name])
    for name in attn._parameters:
        if name in module._parameters:
            setattr(attn, name, module._parameters[name])
    follow_training(attn, module)
    return attn


def attention_sites(model: nn.Module, sequences: bool = False) -> list[list[AttentionSite]]:
    """For each block of a host, the places of its attention, converted or not.

    Args:
        sequences: whether the caller can do without a patch grid, and takes a ``NaFlexVit``.

    Raises:
        ValueError: for a model whose attention no mixer can replace, naming the module and the reason.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model={model!r}: expected a model of timm, an nn.Module")
    if not isinstance(model, HOSTS):
        for path, module in model.named_modules():
            if isinstance(module, HOSTS):
                raise InputError(
                    f"{type(model).__name__} wraps the {type(module).__name__} at {path!r}: convert that, and wrap it "
                    "afterwards"
                )
            if isinstance(module, MechanismHost):
                raise InputError(
                    f"{type(model).__name__} is built with its mixer, {class_name(module)} at {path!r}; pass mixer= "
                    "when the model is created"
                )
        named = [(path, module) for path, module in model.named_modules() if "Att" in type(module).__name__]
        if not named:
            raise InputError(f"{type(model).__name__} has no attention to replace")
        path, module = named[0]
        raise InputError(
            f"{type(model).__name__} can't be converted: {path} ({type(module).__name__} of {type(module).__module__}) "
            f"{reason(module)}; what can be converted is timm's VisionTransformer, Eva "
            "and NaFlexVit"
        )
    if isinstance(model, NaFlexVit) and not sequences:
        raise InputError(
            f"{type(model).__name__} takes sequences of patches and has no patch grid, which this needs; what takes it "
            "is timm_vix.convert, without a plan and without merging"
        )
    found: list[list[AttentionSite]] = []
    blocks = list(model.blocks._modules.values())  # ``children()`` leaves out what comes again
    for index, block in enumerate(blocks):
        if (first := blocks.index(block)) < index:
            raise InputError(
                f"blocks.{index} is the same module as blocks.{first}, and a conversion sets each by itself; what can "
                "be converted is a model whose blocks are modules of their own, as copy.deepcopy makes them"
            )
        sites = [
            AttentionSite(f"blocks.{index}.{prefix}{'.' if prefix else ''}{name}", parent, name, attn)
            for prefix, parent in block.named_modules()
            for name, module in parent.named_children()
            if is_softmax(attn := original_attention(module))
        ]
        if not sites:
            attn = getattr(block, "attn", block)
            path = f"blocks.{index}.attn" if attn is not block else f"blocks.{index}"
            raise InputError(f"{path} ({class_name(attn)}) can't be replaced: it {reason(attn)}")
        found.append(sites)
    return found


def reason(module: nn.Module) -> str:
    """Why attention of another class is not replaced, for an error message."""
    names = {name for name, _ in module.named_modules()} | set(vars(module)) | set(module._parameters)
    if isinstance(module, MixerSlot):
        return (
            "was built with this mixer and has no softmax attention to go back to; pass another mixer= when the model "
            "is created"
        )
    if type(module) in REPLACEABLE:
        return "works on tokens that are not prefix tokens and one patch grid"
    if any("rel_pos" in name or "relative_position" in name for name in names):
        return "adds a relative position bias to its logits, which no mixer supports"
    if "Diff" in type(module).__name__:
        return "subtracts one softmax from another, which no mixer supports"
    if "window_size" in names or "mask_unit" in str(sorted(names)):
        return "works in windows"
    if "in_proj" in names:
        return "computes attention and MLP by joint projections"
    return "is none of timm's Attention, AttentionRope and EvaAttention over a class token and a patch grid"


def class_name(module: nn.Module) -> str:
    """The class of an attention module; of a slot, that of its mixer."""
    return type(module.core if isinstance(module, MechanismHost) else module).__name__
