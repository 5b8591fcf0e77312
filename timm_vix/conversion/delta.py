"""Save what was fine-tuned on a frozen backbone, and put it back: one backbone serves many tasks.

A delta is a safetensors file. It holds the parameters that trained and all buffers, and describes in its metadata the
model that they belong to: architecture, pooling, mechanisms and checksums of the frozen weights. Two models are equal
if they compute the same function; how their keywords were written, on which device they are, in which dtype, and
whether they are compiled doesn't count.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import get_model_args
from timm.utils import unwrap_model
from torch import nn

from .._checks import InputError
from .._files import one_line, write_whole
from ..mixers._dilated import check_dilations
from ..mixers._keywords import ADDING_NOTHING
from ..slots.slot import MixerSlot
from .freeze import PARTS, classifiers, unfrozen_tensors, unwrapped_name
from .identity import DTYPES, architecture, checksums, dtype_of, fingerprint, mechanisms_of

FORMAT = "timm_vix delta 2"
DESCRIBED = ("architecture", "pooling", "mechanisms", "backbone")  # in the metadata of a file
ROWS = ("weight", "bias")  # of a classifier: one for each class

# Format 1 named the classes of its time, and held a keyword only where it was given or chosen by the mechanism. The
# others had these values.
FORMAT_1 = "timm_vix delta 1"
FORMAT_1_NAMES = {
    "AtrousAttention": "atrous",
    "FourierMixing": "fnet",
    "LinformerAttention": "linformer",
    "NystromAttention": "nystrom",
    "PerformerAttention": "performer",
    "ProjectedNystrom": "nystrom",
    "ProjectedPerformer": "performer",
    "ProjectedSoftmax": "softmax",
    "SoftmaxAttention": "softmax",
    "TokenMlp": "mixer",
}
FORMAT_1_DEFAULTS: dict[str, dict[str, Any]] = {
    "atrous": dict(dilations=[1, 2, 4], window_size=8),
    "linformer": dict(sharing="kv", window_size=0),
    "mixer": dict(tokens_mlp_ratio=0.5),
    "nystrom": dict(pinv_iterations=8, ridge=0.01, window_size=0),
    "performer": dict(num_features=64, feature_seed=0, redraw_interval=0, learned_features=False),
}


def save_delta(model: nn.Module, path: Union[str, Path]) -> None:
    """Write the parameters that ``freeze_except`` left trainable, and all buffers, to a file.

    It is of safetensors, and has checksums of the frozen backbone.

    Args:
        model: also one that ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` wraps.
        path: file to write, replaced as a whole.

    Raises:
        ValueError: for a model in which all or nothing is frozen.
        OSError: for a file that can't be written; a previous one is then intact.

    Example:
        >>> timm_vix.freeze_except(model, "attention")
        >>> train(model)
        >>> timm_vix.save_delta(model, "flowers.safetensors")
    """
    model = unwrap_model(model)
    trains = {parameter.requires_grad for parameter in model.parameters()}
    if trains != {True, False}:
        raise InputError(
            f"{type(model).__name__} has {'no frozen' if True in trains else 'only frozen'} parameters, and a delta is "
            f"what was trained on a frozen backbone; call freeze_except(model, part) first, with part in {PARTS}"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in unfrozen_tensors(model).items()}
    described = Description(
        architecture(model), pooling(model), mechanisms_of(model), checksums(backbone(model, tensors))
    )
    metadata = {name: json.dumps(value) for name, value in described._asdict().items() if name in DESCRIBED}
    write_whole(Path(path), save(tensors, {"format": FORMAT, **metadata}))


def load_delta(model: nn.Module, path: Union[str, Path]) -> None:
    """Put a saved delta onto its backbone, in place; the classifier takes the delta's number of classes.

    One model in memory serves many tasks: load one delta after the other. Its parts train or stay frozen as before.

    Args:
        model: as when the delta was saved: same architecture, mechanisms and backbone weights, any number of classes.
            A backbone in another dtype is compared in the coarser of the two.
        path: file of ``save_delta``.

    Raises:
        ValueError: for a file that is no delta, or one of another model; the model is then as it was.

    Example:
        >>> timm_vix.load_delta(model, "flowers.safetensors")
    """
    model = unwrap_model(model)
    saved, tensors = read_delta(path, mechanisms_of(model))
    former = former_names(model)
    tensors = {former.get(name, name): tensor for name, tensor in tensors.items()}
    frozen = backbone(model, tensors)
    if saved.first_format:
        present = {name: before for before, name in former.items()}
        frozen = {present.get(name, name): tensor for name, tensor in frozen.items()}
    other = f"{path} does not fit this model: "
    if found := difference(saved, model, frozen):
        raise InputError(f"{other}{found}")
    # LeViT's classifiers are linear layers after a normalisation
    heads = {f"{path}.{part}{name}" for path in classifiers(model) for part in ("", "linear.") for name in ROWS}
    classes = {len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items() if name in heads}
    target = {unwrapped_name(name): tensor for name, tensor in model.state_dict().items()}

    def fits(name: str, tensor: torch.Tensor) -> bool:
        if name not in target:  # a classifier that the model lacks: its rows are a task's own, its columns are features
            width = getattr(model, "head_hidden_size", model.num_features)
            columns = (width,) if name.endswith("weight") else ()
            return name in heads and tensor.is_floating_point() and tensor.ndim > 0 and tensor.shape[1:] == columns
        own = target[name]
        same = (tensor.ndim, tensor.is_floating_point()) == (own.ndim, own.is_floating_point())
        return same and tensor.shape[name in heads :] == own.shape[name in heads :]

    misfits = [name for name, tensor in tensors.items() if not fits(name, tensor)]
    if misfits or len(classes) > 1 or 0 in classes:
        listed = one_line(", ".join(misfits or ["classifiers"]))
        raise InputError(f"{other}{listed} have another shape, or do not exist here")
    if classes and classes != {model.num_classes}:
        frozen_names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        model.reset_classifier(*classes)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen_names)
    names = {unwrapped_name(name): name for name in model.state_dict()}
    model.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()}, strict=False)


class Description(NamedTuple):
    """The model that a delta belongs to.

    ``mechanisms`` are those of ``mechanisms_of``, ``backbone`` are the ``checksums`` of what was frozen.
    """

    architecture: str
    pooling: Optional[str]
    mechanisms: dict[str, list[Any]]
    backbone: dict[str, str]
    first_format: bool = False


def pooling(model: nn.Module) -> Optional[str]:
    """What the classifier reads, such as "token" or "avg", where timm knows it."""
    return get_model_args(model).get("global_pool")


def backbone(model: nn.Module, delta: Iterable[str]) -> dict[str, torch.Tensor]:
    """The parameters that a delta with these names leaves alone."""
    parameters = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
    return {name: parameter for name, parameter in parameters.items() if name not in delta}


def difference(saved: Description, model: nn.Module, frozen: dict[str, torch.Tensor]) -> str:
    """How a model with these frozen weights differs from the description, for an error; empty if it does not."""
    if saved.architecture != architecture(model):
        return f"it was saved from {saved.architecture}; this model is {architecture(model)}"
    if saved.pooling not in (None, pooling(model)):
        return f"it was saved with global_pool={saved.pooling!r}; this model has {pooling(model)!r}"
    mechanisms = mechanisms_of(model)
    for path in sorted({*saved.mechanisms, *mechanisms}):
        theirs, ours = completed(saved.mechanisms.get(path)), completed(mechanisms.get(path))
        if theirs != ours:
            theirs_in_words, ours_in_words = in_words(theirs, ours), in_words(ours, theirs)
            return f"the mixers differ: {path} is {theirs_in_words} in the file and {ours_in_words} here"
    finest = min(saved.backbone, key=list(DTYPES).index)
    coarser = max(finest, dtype_of(frozen), key=list(DTYPES).index)
    if saved.backbone.get(coarser) != fingerprint(frozen, DTYPES[coarser]):
        return (
            f"the frozen weights of its {saved.architecture} differ from those here; load the weights from which it "
            "was fine-tuned"
        )
    return ""


def completed(mechanism: Optional[list[Any]]) -> Optional[list[Any]]:
    """A mechanism of ``mechanisms_of``, completed by the keywords that didn't exist when it was saved."""
    return mechanism and [mechanism[0], {**ADDING_NOTHING, **mechanism[1]}]


def in_words(mechanism: Optional[list[Any]], other: Optional[list[Any]]) -> str:
    """A mechanism for an error, with the keywords in which it differs from another of the same name."""
    if mechanism is None:
        return "timm's attention"
    name, config = mechanism
    if other is None or other[0] != name:
        return name
    differing = [f"{key}={value!r}" for key, value in config.items() if value != other[1].get(key, ...)]
    return f"{name}({', '.join(differing)})"


def read_delta(path: Union[str, Path], mechanisms: dict[str, list[Any]]) -> tuple[Description, dict[str, torch.Tensor]]:
    """The description of a delta's model, and the delta's tensors.

    Args:
        mechanisms: ``mechanisms_of`` the model that is to take the delta.

    Raises:
        ValueError: for a file that is no delta.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as a delta: {one_line(error)}") from error
    if metadata.get("format") not in (FORMAT, FORMAT_1):
        raise InputError(f"{path} is no delta; expected a file of timm_vix.save_delta")
    try:
        if metadata["format"] == FORMAT_1:
            return from_format_1(metadata, mechanisms), tensors
        saved = Description(*(json.loads(metadata[name]) for name in DESCRIBED))
        forms = [[str(name), dict(config)] for name, config in saved.mechanisms.values()]
        dtypes = set(saved.backbone)
        known = isinstance(saved.backbone, dict) and dtypes and dtypes <= set(DTYPES)
        if forms != list(saved.mechanisms.values()) or not known:
            raise InputError("mechanisms or checksums have another form")
        return saved, tensors
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is a damaged delta: its metadata cannot be read: {one_line(error)}") from error


def from_format_1(metadata: dict[str, str], current: dict[str, list[Any]]) -> Description:
    """The description in a file of format 1; keywords that it doesn't know are those of the ``current`` mechanisms."""
    mechanisms = {}
    for place, (class_name, options) in json.loads(metadata["mixers"]).items():
        path, name = place.removesuffix(".core"), FORMAT_1_NAMES.get(class_name, class_name)
        later = current[path][1] if path in current and current[path][0] == name else {}
        defaults = {keyword: value for keyword, value in FORMAT_1_DEFAULTS.get(name, {}).items() if keyword in later}
        given = {keyword: value for keyword, value in options.items() if value is not None}
        config = {**later, **ADDING_NOTHING, **defaults, **given}
        if "dilations" in config:
            config["dilations"] = check_dilations(config["dilations"])
        mechanisms[path] = [name, config]
    # the dtype of the checksum is not in the file, so it may be that of any model
    return Description(
        metadata["architecture"].partition(".")[0], None, mechanisms, dict.fromkeys(DTYPES, metadata["backbone"]), True
    )


def former_names(model: nn.Module) -> dict[str, str]:
    """The present name of each parameter and buffer that had another one before mixers were sub-modules."""
    return {
        f"{path}.{name}": f"{path}.core.{name}"
        for path, module in model.named_modules()
        if isinstance(module, MixerSlot)
        for name in module.core.state_dict()
    }
