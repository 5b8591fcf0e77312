"""What a plan starts from: a softmax model, its images, and whether its logits are scaled."""

from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from .._checks import InputError
from .._names import weights_config
from ..conversion.convert import convert, revert
from ..conversion.identity import mechanisms_of
from ..conversion.scaling import ScaleLogits, trained_tokens
from ..conversion.sites import attention_sites
from ..data.folders import find_unlabelled, labelled_folder, spread
from ..data.images import open_images
from ..mixers._layout import num_tokens
from ..slots.model import layout_of
from ..train.teacher import build_teacher
from .plan_settings import PlanSettings


class ImageSet(NamedTuple):
    """Images on which plans are measured.

    ``part``: which of a run's images these are, for messages; ``pixels``: uint8 (images, channels, height, width);
    ``labels``: (images,), or None where none are given.
    """

    part: str
    pixels: torch.Tensor
    labels: Optional[torch.Tensor]

    def select(self, part: str, which: Any) -> "ImageSet":
        """Some of the images: a slice, or their indices."""
        return ImageSet(part, self.pixels[which], None if self.labels is None else self.labels[which])


def build_softmax_model(run: PlanSettings) -> tuple[nn.Module, dict[str, Any]]:
    """The source, frozen, and timm's data configuration for it.

    Raises:
        ValueError: for a model whose attention is not softmax, or can't be converted, and for labels without a
            classifier.
    """
    model, config = build_teacher(run.source, run.source_kwargs, run.weights, run.img_size, run.device)
    if found := sorted({name for name, _ in mechanisms_of(model).values() if name != "softmax"}):
        raise InputError(f"source={run.source} has {', '.join(found)}; a plan starts from plain softmax attention")
    if run.labels and not model.num_classes:
        raise InputError(f"labels: source={run.source} has no classifier whose top-1 could be kept; leave them out")
    attention_sites(model)
    return model.to(getattr(torch, run.dtype)), config


@torch.inference_mode()
def num_right(model: nn.Module, batches: list[torch.Tensor], labels: torch.Tensor) -> int:
    """The number of images whose label a model predicts."""
    predicted = torch.cat([model(images).argmax(1).cpu() for images in batches])
    return int((predicted == labels).sum())


def scale_source(
    model: nn.Module,
    scale_logits: Optional[ScaleLogits],
    batches: list[torch.Tensor],
    labels: Optional[torch.Tensor],
    plain: Optional[int],
) -> None:
    """Scale the logits of the source if ``scale_logits`` says so, or if it then predicts more labels of the batches.

    ``plain``: the number of images whose label the source predicts without scaling; None without labels.
    """
    if scale_logits is not None:
        if scale_logits != 0:
            convert(model, scale_logits=scale_logits)
        return
    layout = layout_of(model)
    known = bool(weights_config(model).get("input_size"))
    number = trained_tokens(model, "log") if known else 0
    if labels is None or plain is None or not 0 < number < num_tokens(layout):
        return
    convert(model, scale_logits=number)
    scaled = num_right(model, batches, labels)
    if scaled <= plain:
        revert(model)
    shares = (f"{100 * right / len(labels):.1f} %" for right in (plain, scaled))
    found = "the source is right on {} of the images that choose, with scaled logits on {}".format(*shares)
    print(f"{found}, so they {'are scaled' if scaled > plain else 'stay as they are'}", flush=True)


def read_images(run: PlanSettings, config: dict[str, Any], model: nn.Module) -> ImageSet:
    """The images of a run, spread evenly over the folder.

    Raises:
        InputError: for too few to split, or none that can be read.
    """
    folder = Path(run.data_dir)
    found = labelled_folder(folder, model)[0] if run.labels else find_unlabelled(folder)
    chosen = spread(found, run.images)
    label_of = dict(chosen)
    # as images of one class: so few have damaged ones left out, even the only one of a class
    unlabelled = [(image, 0) for image in label_of]
    data = open_images(unlabelled, [run.data_dir], config)
    if len(data) < 2:
        raise InputError(
            f"data_dir={run.data_dir} has {len(data)} image that can be read: one half of the images chooses a plan "
            "and the other tells what it keeps, so at least 2 are needed"
        )
    pixels = torch.stack([data[0, i][0] for i in range(len(data))])
    labels = torch.tensor([label_of[image] for image, _ in data.items]) if run.labels else None
    return ImageSet("all images", pixels, labels)
