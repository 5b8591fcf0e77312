"""Train a small part of a model and keep only that: many tasks share one backbone.

Touvron et al. 2022, "Three things everyone should know about Vision Transformers" (arXiv 2203.09795), section 4:
fine-tuning the attention alone loses little or nothing, and needs a third of the optimizer's memory and of the storage.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from .._checks import check_choice
from .._files import one_line, write_whole
from ..mixers._mechanism import MechanismHost
from .convert import source_of
from .replace import REPLACEABLE

PARTS = ("attention", "mlp", "mixer", "head")
MECHANISMS = (MechanismHost,)
# by class, or by the name that timm gives its place: hierarchical models have classes of their own
PLACES: dict[str, tuple[tuple[type, ...], tuple[str, ...]]] = {
    "attention": ((*MECHANISMS, *REPLACEABLE), ("attn", "attn_downsample")),
    "mlp": ((Mlp, GluMlp, SwiGLU), ("mlp",)),
}
MOMENTS_BYTES = 8  # AdamW keeps two float32 numbers for each parameter that trains
FORMAT = "timm_vix delta 1"
ROWS = ("weight", "bias")  # of a classifier: one for each class


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
        model: timm model, converted or not, or one of ours.
        part: "attention": all weights of attention and mixers, and the classifier, since a task has classes of its
            own; "mlp": the feed-forward networks and the classifier, the paper's other choice; "mixer": only what
            mixers add to the softmax attention that they replace (Linformer's projections, a convolution of
            Nyström's), classifier frozen; "head": only the classifier.

    Returns:
        What trains, and what it costs; ``print`` shows it as one line.

    Raises:
        ValueError: for another part, or one that the model lacks; the model is then as it was.

    Example:
        >>> model = timm.create_model("deit_tiny_patch16_224", pretrained=True, num_classes=101)
        >>> print(timm_vix.freeze_except(model, "attention"))
    """
    check_choice("part", part, PARTS)
    chosen = {id(parameter) for parameter in parameters_of(model, part)}
    if not chosen:
        mixers = ", ".join(sorted({type(m).__name__ for m in model.modules() if isinstance(m, MECHANISMS)}))
        lacks = dict(
            attention="has no attention that timm_vix knows",
            mlp="has no feed-forward network that timm_vix knows",
            mixer=f"has {mixers or 'no mixer'}, so nothing was added to its softmax attention",
            head="has no classifier; create it with num_classes=",
        )
        allowed = ", ".join(repr(other) for other in PARTS if parameters_of(model, other)) or "none"
        raise ValueError(f"part={part!r}: {type(model).__name__} {lacks[part]}; allowed here: {allowed}")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Frozen(
        part,
        trainable,
        sum(p.numel() for p in model.parameters()),
        MOMENTS_BYTES * trainable,
        size(delta_of(model)),
        size(model.state_dict()),
    )


def parameters_of(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters of a part, see ``freeze_except``; none where the model lacks it."""
    head = [p for classifier in classifiers(model).values() for p in classifier.parameters()]
    if part == "head":
        return head
    mixers = [m for m in model.modules() if isinstance(m, MECHANISMS)]
    if part == "mixer":
        return [parameter for mixer in mixers for parameter in mixer.core.parameters()]
    classes, names = PLACES[part]
    # an MLP over tokens is a mixer's
    others = {id(m) for mixer in mixers for m in mixer.modules()} if part == "mlp" else set()
    parameters = [
        parameter
        for path, module in model.named_modules()
        if (isinstance(module, classes) or path.rpartition(".")[2] in names) and id(module) not in others
        for parameter in module.parameters()
    ]
    return parameters + head if parameters else []


def classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """The classifiers of a timm model by path; a distilled one has two, one without classes none."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = {id(head) for head in (found if isinstance(found, (tuple, list)) else (found,))}
    return {path: module for path, module in model.named_modules() if id(module) in heads and module is not model}


def delta_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What may differ from the backbone: parameters that train, and buffers, which change without a gradient.

    Such buffers are redrawn random features and the statistics of a batch normalisation.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def size(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Sixteen hexadecimal digits that stand for names, shapes, dtypes and every bit of some tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def architecture(model: nn.Module) -> str:
    """timm's name of a model, of the source where it is converted; the class where it has none."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return source_of(model) or name or type(model).__name__


def mixers_of(model: nn.Module) -> dict[str, Any]:
    """Class and keywords of each mixer, by path: two models may have the same weights and another function."""
    return {
        path: [type(module.core).__name__, module.core.config()]
        for path, module in model.named_modules()
        if isinstance(module, MECHANISMS)
    }


def save_delta(model: nn.Module, path: Union[str, Path]) -> None:
    """Write what ``freeze_except`` left to train as safetensors, with a fingerprint of the rest, the backbone.

    Raises:
        ValueError: for a model in which all or nothing is frozen.
        OSError: for a file that can't be written; a previous one is then intact.

    Example:
        >>> timm_vix.freeze_except(model, "attention")
        >>> train(model)
        >>> timm_vix.save_delta(model, "flowers.safetensors")
    """
    trains = {parameter.requires_grad for parameter in model.parameters()}
    if trains != {True, False}:
        raise ValueError(
            f"{type(model).__name__} has {'no frozen' if True in trains else 'only frozen'} parameters, and a delta is "
            f"what was trained on a frozen backbone; call freeze_except(model, part) first, with part in {PARTS}"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in delta_of(model).items()}
    metadata = {
        "format": FORMAT,
        "architecture": architecture(model),
        "mixers": json.dumps(mixers_of(model)),
        "backbone": fingerprint(backbone(model, tensors)),
    }
    write_whole(Path(path), save(tensors, metadata))


def backbone(model: nn.Module, delta: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The parameters that a delta leaves alone."""
    return {name: parameter for name, parameter in model.named_parameters() if name not in delta}


def load_delta(model: nn.Module, path: Union[str, Path]) -> None:
    """Put a saved delta onto its backbone, in place; the classifier takes the delta's number of classes.

    One model in memory serves many tasks: load one delta after the other. Its parts train or stay frozen as before.

    Args:
        model: as when the delta was saved: same architecture, mixers and backbone weights, any number of classes.
        path: file of ``save_delta``.

    Raises:
        ValueError: for a file that is no delta, or one of another model; the model is then as it was.

    Example:
        >>> timm_vix.load_delta(model, "flowers.safetensors")
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a delta: {one_line(error)}") from error
    if told.get("format") != FORMAT:
        raise ValueError(f"{path} is no delta; expected a file of timm_vix.save_delta")
    other = f"{path} is a delta of another model: "
    if told.get("architecture") != architecture(model):
        raise ValueError(f"{other}of {told.get('architecture')}; this one is {architecture(model)}")
    if told.get("mixers") != json.dumps(mixers_of(model)):
        raise ValueError(f"{other}its mixers are {told.get('mixers')}; here they are {json.dumps(mixers_of(model))}")
    if told.get("backbone") != fingerprint(backbone(model, tensors)):
        raise ValueError(
            f"{other}the frozen weights of its {architecture(model)} differ from those here; load the weights from "
            "which it was fine-tuned"
        )
    # LeViT's classifiers are linear layers after a normalisation
    heads = {f"{path}.{part}{name}" for path in classifiers(model) for part in ("", "linear.") for name in ROWS}
    classes = {len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items() if name in heads}
    target = model.state_dict()

    def fits_here(name: str, tensor: torch.Tensor) -> bool:
        if name not in target:
            return name in heads  # the rows of a classifier are a task's own
        own = target[name]
        same = (tensor.ndim, tensor.is_floating_point()) == (own.ndim, own.is_floating_point())
        return same and tensor.shape[name in heads :] == own.shape[name in heads :]

    fits = {name: fits_here(name, tensor) for name, tensor in tensors.items()}
    if not all(fits.values()) or len(classes) > 1 or 0 in classes:
        names = ", ".join(name for name, fit in fits.items() if not fit)
        raise ValueError(f"{other}{one_line(names) if names else 'classifiers'} are of another shape, or not here")
    if classes and classes != {model.num_classes}:
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        model.reset_classifier(*classes)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    model.load_state_dict(tensors, strict=False)
