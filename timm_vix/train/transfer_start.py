"""What a transfer starts from: the converted model, the weights of an earlier transfer, and images without labels."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .._checks import InputError
from .._files import one_line
from ..conversion.convert import convert, read_layers
from ..conversion.identity import fingerprint, mechanisms_of
from ..conversion.plan_file import Plan
from ..conversion.report import Conversion
from ..data.datasets import Items
from ..data.folders import find_unlabelled
from ..data.images import Images, Key, transforms
from ..mixers import MIXERS
from .hub import hub_of
from .transfer_results import layers_with_other_attention
from .transfer_settings import TransferSettings


def convert_copy(teacher: nn.Module, run: TransferSettings) -> tuple[nn.Module, Conversion]:
    """A converted copy of the teacher, and what became of its layers.

    Raises:
        ValueError: if there is nothing to train.
    """
    run.layers = read_layers(run.layers, teacher)
    student = copy.deepcopy(teacher)
    mixer = None if isinstance(run.layers, Plan) else run.mixer  # a plan names mixers itself
    report = convert(student, mixer, run.layers, **(run.mixer_kwargs or {}))
    mixers = mixers_of(student, report)
    if not mixers:
        raise InputError(f"mixer={run.mixer!r}, layers={run.layers!r} leave every layer as it is: nothing to transfer")
    if not layers_with_other_attention(student, report) and all(row.merged == 0 for row in report.rows):
        raise InputError(f"mixer={run.mixer!r} only scales logits, as the original's are too: nothing to transfer")
    if not any(True for mixer in mixers.values() for _ in mixer.parameters()):
        raise InputError(f"mixer={run.mixer!r} has no parameters to fit")
    return student, report


def load_start(student: nn.Module, folder: str) -> str:
    """Give the student the weights of an earlier transfer's folder, and return their fingerprint.

    Position embeddings and what else lives on the patch grid are resampled to the student's image size.

    Raises:
        ValueError: for a folder that isn't one, or whose model is converted otherwise.
    """
    hub = hub_of(Path(folder))
    try:
        earlier = timm.create_model(f"local-dir:{hub}", pretrained=True, img_size=student.patch_embed.img_size)
        check_same_mixers(earlier, student)
        student.load_state_dict(earlier.state_dict())
    except Exception as error:  # timm, torch and safetensors raise by kind of damage
        raise InputError(
            f"start={folder}: {one_line(error)}; expected the folder of a transfer with the same source and mixers"
        ) from error
    return fingerprint(earlier.state_dict())


def check_same_mixers(earlier: nn.Module, student: nn.Module) -> None:
    """Raise InputError for other mechanisms; keywords may differ where the weights fit, as landmarks."""
    theirs, ours = (
        {path: name for path, (name, _) in mechanisms_of(model).items() if name in MIXERS and name != "softmax"}
        for model in (earlier, student)
    )
    for path in {**ours, **theirs}:
        if theirs.get(path) != ours.get(path):
            there, here = (names.get(path, "softmax") for names in (theirs, ours))
            raise InputError(f"{path} has {there} attention there and {here} attention here")


def mixers_of(student: nn.Module, report: Conversion) -> dict[str, Any]:
    """The mixers that a conversion put in, by path."""
    return {row.path: student.get_submodule(row.path) for row in report.rows if row.changed}


def prepare_images(run: TransferSettings, config: dict[str, Any]) -> tuple[Images, Images]:
    """The images to learn from, and every twentieth, which is held out to measure agreement on.

    Raises:
        ValueError: for a folder with too few.
    """
    resize, augmented, evaluated = transforms(config, "light", 0.5)
    # an image that is in two of the folders counts once
    found = list({os.path.realpath(str(i[0])): i for folder in run.folders for i in find_unlabelled(folder)}.values())

    def part(items: Items, transform: Callable) -> Images:
        return Images(items, ["image"], config["input_size"][0], resize, transform, run.seed, lazy=True)

    images = part([item for i, item in enumerate(found) if i % 20], augmented)
    try:
        held_out = part(found[::20], evaluated)
    except InputError as error:
        raise InputError(
            f"data_dir={run.data_dir}: every twentieth image is held out to measure agreement on, and none of these "
            f"{len(found[::20])} can be read, such as {found[0][0]}"
        ) from error
    batches(images, run.batch_size, 1, 1)  # too few images show before an earlier run is replaced
    return images, held_out


def batches(images: Images, batch_size: int, steps: int, stage: int) -> list[list[Key]]:
    """Keys of a stage's steps, epoch after epoch, in an order of its own.

    Raises:
        ValueError: for fewer images than one batch has.
    """
    if len(images) < batch_size:  # an epoch has whole batches only, so it would have none
        raise InputError(
            f"batch_size={batch_size}: allowed is at most {len(images)}, the number of images to learn from"
        )
    found: list[list[Key]] = []
    epoch = stage * 1000
    while len(found) < steps:
        found += images.batches(batch_size, epoch)
        epoch += 1
    return found[:steps]
