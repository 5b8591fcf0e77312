"""Train a small part of a model and freeze the rest, the backbone, which many tasks can then share (``delta.py``).

Touvron et al. 2022, "Three things everyone should know about Vision Transformers" (arXiv 2203.09795), section 4:
fine-tuning the attention alone loses little or nothing, and needs a third of the optimizer's memory and of the storage.
"""

from dataclasses import dataclass

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.utils import unwrap_model
from torch import nn

from .._checks import InputError, check_choice
from ..mixers._mechanism import MechanismHost
from ..slots.model import REPLACEABLE, hosts_of
from ..slots.slot import TokenSlot

PARTS = ("attention", "mlp", "mixer", "head")
# Attention and feed-forward networks are known by their class, or by timm's name of their place: hierarchical models
# have classes of their own.
PLACES: dict[str, tuple[tuple[type, ...], tuple[str, ...]]] = {
    "attention": ((MechanismHost, *REPLACEABLE), ("attn", "attn_downsample")),
    "mlp": ((Mlp, GluMlp, SwiGLU), ("mlp",)),
}
# modules that torch puts around a part of a model, under these names, when that part is compiled or checkpointed
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
MOMENTS_BYTES = 8  # AdamW keeps two float32 numbers for each parameter that trains


@dataclass(frozen=True)
class Frozen:
    """What trains after ``freeze_except``: numbers of parameters, and bytes.

    ``optimizer_bytes`` are AdamW's two float32 moments, ``delta_bytes`` the tensors that ``save_delta`` writes,
    ``full_bytes`` those of the whole state dict.
    """

    part: str
    trainable: int
    total: int
    optimizer_bytes: int
    delta_bytes: int
    full_bytes: int

    def __str__(self) -> str:
        return (
            f"training {self.part} only: {self.trainable / 1e6:.2f} of {self.total / 1e6:.2f} M parameters "
            f"({100 * self.trainable / self.total:.1f} %); AdamW's moments {self.optimizer_bytes / 1e6:.1f} of "
            f"{MOMENTS_BYTES * self.total / 1e6:.1f} MB, a delta {self.delta_bytes / 1e6:.1f} of "
            f"{self.full_bytes / 1e6:.1f} MB"
        )


def freeze_except(model: nn.Module, part: str) -> Frozen:
    """Leave one part of a model to train and freeze the rest, in place.

    Args:
        model: timm model, converted or not, or one of ours; wrapped by ``torch.compile`` or for several devices or not.
        part: "attention": all weights of attention and mixers, and the classifier, since a task has classes of its
            own; "mlp": the feed-forward networks and the classifier, the paper's other choice; "mixer": only what
            mixers add to the softmax attention that they replace (as Linformer's projections or the convolution of
            ``conv_residual``), classifier frozen; "head": only the classifier.

    Returns:
        What trains, and what it costs; ``print`` shows it as one line.

    Raises:
        ValueError: for another part, or one that the model lacks; the model is then as it was.

    Example:
        >>> model = timm.create_model("deit_tiny_patch16_224", pretrained=True, num_classes=101)
        >>> print(timm_vix.freeze_except(model, "attention"))
    """
    check_choice("part", part, PARTS)
    model = unwrap_model(model)
    chosen = {id(parameter) for parameter in parameters_of(model, part)}
    if not chosen:
        mixers = ", ".join(sorted({type(host.core).__name__ for host in hosts_of(model).values()}))
        lacks = dict(
            attention="has no attention that timm_vix knows",
            mlp="has no feed-forward network that timm_vix knows",
            mixer=f"has {mixers or 'no mixer'}, so nothing was added to its softmax attention",
            head="has no classifier; create it with num_classes=",
        )
        allowed = ", ".join(repr(other) for other in PARTS if parameters_of(model, other)) or "none"
        raise InputError(f"part={part!r}: {type(model).__name__} {lacks[part]}; allowed here: {allowed}")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    # ``revert`` restores the attention that a mixer without queries, keys and values replaced
    for module in model.modules():
        if isinstance(module, TokenSlot):
            for attn in module.replaced:
                attn.requires_grad_(part == "attention")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Frozen(
        part,
        trainable,
        sum(p.numel() for p in model.parameters()),
        MOMENTS_BYTES * trainable,
        size_in_bytes(unfrozen_tensors(model)),
        size_in_bytes(model.state_dict()),
    )


def parameters_of(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters of a part, see ``freeze_except``; none where the model lacks it."""
    head = [p for classifier in classifiers(model).values() for p in classifier.parameters()]
    if part == "head":
        return head
    mixers = hosts_of(model).values()
    if part == "mixer":
        return [parameter for mixer in mixers for parameter in mixer.core.parameters()]
    classes, names = PLACES[part]
    # an MLP over tokens is a mixer, and belongs to the attention
    excluded = {id(m) for mixer in mixers for m in mixer.modules()} if part == "mlp" else set()
    parameters = [
        parameter
        for path, module in model.named_modules()
        if (isinstance(module, classes) or path.rpartition(".")[2] in names) and id(module) not in excluded
        for parameter in module.parameters()
    ]
    return parameters + head if parameters else []


def classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """The classifiers of a timm model by path; a distilled one has two, one without classes none."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = {id(head) for head in (found if isinstance(found, (tuple, list)) else (found,))}
    paths = {path: module for path, module in model.named_modules() if id(module) in heads and module is not model}
    return {unwrapped_name(path): module for path, module in paths.items()}


def unwrapped_name(name: str) -> str:
    """The name that a parameter or module of a model has where no part of the model is wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unfrozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training can change: parameters that train, and buffers, which change without a gradient.

    Such buffers are redrawn random features and the statistics of a batch normalisation.
    """
    frozen = {unwrapped_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tensors = {unwrapped_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


def size_in_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
