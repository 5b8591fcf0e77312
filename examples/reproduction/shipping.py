"""Trained models in bfloat16, small enough to be kept beside the code, and the accuracy of what is stored."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from timm.data import resolve_model_data_config
from torch import nn

from timm_vix._checks import InputError
from timm_vix._records import Record
from timm_vix.data.folders import label_names, list_images
from timm_vix.data.images import Images, normaliser, transforms
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
    resize, _, plain = transforms(config, "none", 0.0)
    images = Images(items, classes, config["input_size"][0], resize, plain, seed=0)
    normalise = normaliser(config, device)
    top1 = top5 = 0
    for keys in images.batches(250):
        pixels, labels = zip(*(images[key] for key in keys))
        logits = model(normalise(torch.stack(pixels)))
        ranks = logits.topk(min(5, len(classes))).indices.cpu() == torch.tensor(labels).unsqueeze(1)
        top1, top5 = top1 + int(ranks[:, 0].sum()), top5 + int(ranks.sum())
    return 100 * top1 / len(images), 100 * top5 / len(images)


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
