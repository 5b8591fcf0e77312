"""A transferred model made small enough to be kept beside the code: only the weights that changed, in bfloat16."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import timm
import torch
from timm.models import get_model_args
from torch import nn

from .._checks import InputError
from .._files import one_line, write_whole
from .._weights import weights_of_file
from ..conversion.delta import load_delta, save_delta
from ..conversion.record import NAME, record_resolved_arguments
from ..mixers._keywords import ADDING_NOTHING
from ..slots.model import hosts_of
from .check import known_images, one_by_one
from .classifier import load_trained


def save_transferred(
    hub: str, path: Path, weights: Optional[str] = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, dict[str, Any]]:
    """Save a transferred model as a delta of its original: the weights of the converted attention alone.

    The delta is put onto the original before it is written, and must give the same outputs there.

    Args:
        hub: the folder that a transfer left, in which only attention was trained.
        path: of the delta, a safetensors file.
        weights: file of the original's weights; None: those that timm knows.
        dtype: in which the delta is stored; loaded it is float32.

    Returns:
        The original with the delta, in eval mode, and the keywords with which ``timm.create_model("vix_from_timm",
        pretrained=True, ...)`` builds the model that takes the delta.

    Raises:
        ValueError: for a folder of another model, weights that aren't those of the original, or a transfer that
            changed more than attention.
        OSError: for a file that can't be written; a previous one stays.
    """
    student = load_trained(f"local-dir:{hub}")
    if "source" not in get_model_args(student):
        raise InputError(f"{hub} holds {type(student).__name__}, which is no converted model; expected a transfer's")
    record_resolved_arguments(student)
    keywords = in_short(get_model_args(student))
    # the file's own number of classes, or timm leaves its classifier out
    overlay = weights_of_file(weights, num_classes=student.num_classes) if weights else {}
    try:
        original = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **keywords).eval()
    except Exception as error:  # timm, torch and safetensors raise by kind of damage
        raise InputError(f"weights={weights}: {keywords['source']} cannot be built: {one_line(error)}") from error
    student.requires_grad_(False)
    for host in hosts_of(student).values():
        for parameter in host.requires_grad_(True).parameters():
            parameter.data = parameter.data.to(dtype)
    with TemporaryDirectory() as folder:
        saved = Path(folder) / path.name
        save_delta(student, saved)
        try:
            load_delta(original, saved)
        except InputError as error:
            raise InputError(
                f"{hub} is no delta of these weights of {keywords['source']}: other weights than those of its "
                f"attention differ; expected the weights it was made of, and a transfer with distill_part=attention"
            ) from error
        images = known_images(student.pretrained_cfg["input_size"])
        if not torch.equal(one_by_one(original, images), one_by_one(copy.deepcopy(student).float(), images)):
            raise InputError(f"{hub}: its delta on {keywords['source']} gives other outputs")
        write_whole(path, saved.read_bytes())
    return original, keywords


def in_short(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a converted model; those of its mixers once, where all converted layers have the same."""
    layers = keywords["layers"]
    if not isinstance(layers, dict) or any(own != next(iter(layers.values())) for own in layers.values()):
        return keywords
    own = next(iter(layers.values()))
    acting = {name: value for name, value in own.items() if ADDING_NOTHING.get(name, ...) != value}
    return {**keywords, "layers": [int(layer) for layer in layers], **acting}
