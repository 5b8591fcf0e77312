"""What a saved or exported model computes and how fast, beside the model in eager mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from .._checks import InputError
from ..data.folders import find_unlabelled, labelled_folder, spread
from ..data.images import Images, normaliser, open_images
from ..measure.job import time_interleaved
from ..measure.statistics import compare_times
from .formats import Runner

BATCHES = (1, 3)  # of which parity is checked
BATCH = 20  # images a forward pass, where accuracy is measured
# of the largest logit: what orders of summation explain, and no more
TOLERANCE = 1e-3
# the error of a bfloat16 file may be 3 times that of eager bfloat16, or 15 % of the norm of the logits if that is more
BFLOAT16_FACTOR, BFLOAT16_SHARE = 3.0, 0.15


def read_calibration(folder: Path, count: int, config: dict[str, Any]) -> torch.Tensor:
    """Up to ``count`` images of a folder and of those below it, prepared: (images, channels, height, width).

    Raises:
        ValueError: for a folder that isn't there or holds no image that can be read.
    """
    data = open_images(spread(find_unlabelled(folder), count), [str(folder)], config)
    return normaliser(config, "cpu")(torch.stack([data[None, i][0] for i in range(len(data))]))


def known_images(size: tuple[int, ...], count: int = 2) -> torch.Tensor:
    """Random images of a size (channels, height, width), the same ones at every call: (count, *size).

    They are noise, in turn of single pixels, of large areas and of smaller ones. In an image of large even areas, as in
    photographs, tokens are alike, and equations between them are harder to solve.
    """
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        share = (1, 112, 14)[i % 3]
        noise = torch.randn(1, size[0], *(max(1, side // share) for side in size[1:]), generator=generator)
        images.append(interpolate(noise, size[1:], mode="bicubic"))
    return torch.cat(images)


@torch.inference_mode()
def one_by_one(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The outputs of a model that is called with one image at a time, as a threshold of merging wants it."""
    return torch.cat([model(image) for image in images.split(1)])


@torch.inference_mode()
def parity(
    model: Runner, exported: Runner, batches: list[torch.Tensor], dtype: str, rounded: Optional[Runner] = None
) -> list[dict[str, Any]]:
    """For each batch its size, the largest difference of a logit, and how often the largest logit is the same.

    Args:
        dtype: Of the exported model; eager mode is float32. Where both are, only the order of summation may differ.
        rounded: For bfloat16, eager mode in bfloat16. It keeps in float32 what needs that, as the landmarks of Nyström
            attention, while OpenVINO computes everything in bfloat16.

    Raises:
        ValueError: for logits that aren't finite, that differ more than the order of summation explains where both are
            float32, that are in any dtype no nearer to eager's than zeros, or that differ much more than ``rounded``.
    """
    rows = []
    for images in batches:
        expected, found = model(images), exported(images)
        if not expected.isfinite().all():
            raise InputError("the model itself gives logits that aren't finite; its weights are damaged or diverged")
        if found.shape != expected.shape:
            raise InputError(
                f"the exported model gives outputs of {tuple(found.shape)}, eager {tuple(expected.shape)}, for images "
                f"{tuple(images.shape)}: this conversion is wrong, so no file is written; try another --to"
            )
        error, scale = float((found - expected).abs().max()), float(expected.abs().max())
        farthest = float(expected.norm())
        if rounded is not None:
            farthest = min(
                farthest, max(BFLOAT16_FACTOR * float((rounded(images) - expected).norm()), BFLOAT16_SHARE * farthest)
            )
        wrong = not torch.isfinite(found).all() or float((found - expected).norm()) > farthest
        if wrong or (dtype == "float32" and error > TOLERANCE * max(1.0, scale)):
            why = "this conversion is wrong, so no file is written; try another --to"
            if dtype != "float32":
                more = "more images for --calibrate, like those that the model will see, " if dtype == "int8" else ""
                why = f"{dtype} is too coarse for it here, so no file is written; try {more}another --dtype or --to"
            raise InputError(
                f"the exported model differs from eager by {error:.3g} in logits up to {scale:.3g}, for images "
                f"{tuple(images.shape)}: {why}"
            )
        same = int((found.argmax(1) == expected.argmax(1)).sum())
        rows.append(dict(shape=tuple(images.shape), error=error, same=same))
    return rows


def open_labelled(folder: Path, model: nn.Module, count: Optional[int], config: dict[str, Any]) -> Images:
    """Up to ``count`` images of a folder, all for None, with the model's labels; they are decoded as they are needed.

    Damaged images are left out, even the only one of a class.

    Raises:
        ValueError: for another folder than those of ``labelled_folder``, or one without an image that can be read.
    """
    items = spread(labelled_folder(folder, model)[0], count)
    # opened as images of one class, since a class without any image that can be read is an error
    images = open_images([(image, 0) for image, _ in items], [str(folder)], config, lazy=True)
    images.items = items
    return images


@torch.inference_mode()
def accuracy(runners: dict[str, Runner], data: Images, config: dict[str, Any]) -> dict[str, Any]:
    """Top-1 of each runner, its agreement with the first runner, both in % of the images, and the number of images."""
    normalise = normaliser(config, "cpu")
    right, same, total = dict.fromkeys(runners, 0), dict.fromkeys(runners, 0), 0
    batches = data.batches(BATCH)
    for pixels, labels in tqdm(data.loader(batches), "accuracy", len(batches), leave=False, disable=None):
        images = normalise(pixels)
        predicted = {name: run(images).argmax(1) for name, run in runners.items()}
        first = next(iter(predicted.values()))
        for name, own in predicted.items():
            right[name] += int((own == labels).sum())
            same[name] += int((own == first).sum())
        total += len(labels)
    return dict(
        images=total,
        top1={name: 100 * count / total for name, count in right.items()},
        agreement={name: 100 * count / total for name, count in same.items()},
    )


def latency(exported: Runner, others: list[Runner], images: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """The columns of ``compare_times`` of an exported model beside each of ``others``, all timed in turn."""

    def call(run: Runner) -> Callable[[], None]:
        def timed_call() -> None:
            with torch.inference_mode():
                run(images)

        return timed_call

    job = dict(device="cpu", rounds=rounds, seconds=0)
    own, *baselines = time_interleaved([call(run) for run in (exported, *others)], job, settle=True).T
    return [compare_times(own, baseline) for baseline in baselines]
