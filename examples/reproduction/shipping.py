"""Trained models in bfloat16, small enough to be kept beside the code, and the accuracy of what is stored."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from timm.data import resolve_model_data_config
from timm.utils import AverageMeter, accuracy
from torch import nn
from tqdm import tqdm

from timm_vix._checks import InputError
from timm_vix._records import Record
from timm_vix.data.folders import label_names, list_images
from timm_vix.data.images import normaliser, open_images
from timm_vix.deploy.classifier import load_trained
from timm_vix.train.hub import write_hub

from .cards import card


def classes_of(model: nn.Module, folder: Path) -> list[str]:
    """The names of the classes of a trained model in a folder.

    Raises:
        InputError: for one without.
    """
    if names := label_names(model):
        return names
    raise InputError(f"{folder} names no classes; expected the folder of a fine-tuning, whose config.json names them")


@torch.inference_mode()
def accuracy_of(folder: Path, data_dir: str, device: str) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on the test images, in percent, of the model in ``folder``."""
    model = load_trained(f"local-dir:{folder}").to(device)
    config = resolve_model_data_config(model)
    classes = classes_of(model, folder)
    items, _ = list_images(Path(data_dir) / "test", classes)
    images, normalise = open_images(items, classes, config, lazy=True), normaliser(config, device)
    top1, top5 = AverageMeter(), AverageMeter()
    keys = images.batches(250)
    for pixels, labels in tqdm(images.loader(keys), "test", len(keys), leave=False, disable=None):
        logits = model(normalise(pixels)).cpu()
        for meter, value in zip((top1, top5), accuracy(logits, labels, topk=(1, 5))):
            meter.update(value.item(), len(labels))
    return top1.avg, top5.avg


def ship(hub: Path, folder: Path, row: Record, data_dir: str, device: str = "cpu", seeds: int = 1) -> int:
    """Write a trained model to ``folder`` with weights in bfloat16 and a card, all or nothing; return its bytes.

    The card states the accuracies of the rounded weights, measured here, beside those of the row.

    Args:
        hub: the folder that the run left for the Hub.
        row: of ``examples/results/reproduce_vix.csv``.
        data_dir: with the test images, test/CLASS/IMAGE.
        seeds: with how many the model was trained.

    Raises:
        ValueError: for a folder that can't be loaded, or images of other classes.
        OSError: for a file that can't be written; an earlier folder stays.
    """
    model = load_trained(f"local-dir:{hub}")
    config, names = resolve_model_data_config(model), classes_of(model, hub)
    del model.pretrained_cfg["label_names"]  # which the configuration has beside it
    model.bfloat16()
    with TemporaryDirectory() as rounded:
        write_hub(Path(rounded) / "hub", model, config, card(row), names)
        top1, top5 = accuracy_of(Path(rounded) / "hub", data_dir, device)
    measured = row | dict(top1=round(top1, 2), top5=round(top5, 2))
    place = f"examples/checkpoints/{folder.name}"
    write_hub(folder, model, config, card(measured, trained=row, stored="bfloat16", folder=place, seeds=seeds), names)
    return sum(path.stat().st_size for path in folder.iterdir())
