"""A file of ``timm-vix export`` as a model that classifies pictures."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from .._checks import InputError, check_integer
from .._files import one_line
from ..data.decoding import image_mode
from .formats import OPEN, READ_METADATA, SUFFIXES
from .metadata import PREPARATION, config_of

# a .pt2 file holds code, which nobody should run who doesn't know where it is from
READABLE = {SUFFIXES[to]: to for to in READ_METADATA}


def is_exported(model: str) -> bool:
    """Whether a model is given as a file in one of the four formats."""
    return Path(model).suffix in SUFFIXES.values() and Path(model).is_file()


class ExportedModel(nn.Module):
    """A file of ``timm-vix export``, called as a model: float32 images (B, C, H, W) -> logits (B, classes).

    Args:
        path: an .onnx or an .xml file.

    Attributes:
        num_classes, pretrained_cfg: as a timm model has them, from the metadata of the file.
        num_parameters, note: of the model that was exported, see ``metadata_of``.

    Raises:
        ValueError: for a file of another kind, a damaged one, and one without this metadata.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.suffix not in READABLE:
            raise InputError(f"{path}: expected a file that ends in {' or '.join(READABLE)}; {path.suffix} holds code")
        to = READABLE[path.suffix]
        try:
            config = config_of(READ_METADATA[to](path), path)
            self.run = OPEN[to](path, config["dtype"], torch.get_num_threads())
        except InputError:
            raise
        except Exception as error:  # the runtimes raise as they like
            raise InputError(f"{path} cannot be opened as a model: {one_line(error)}") from error
        try:
            transform = create_transform(**{name: config[name] for name in PREPARATION})
            black = transform(Image.new(image_mode(config["input_size"][0]), (8, 8)))
            outputs = self.run(black.unsqueeze(0)).shape[1]
            names = list(map(str, config["classes"]))
            check_integer("parameters", config["parameters"], 0)
        except Exception as error:  # whatever the entries of another program lead to
            reason = f"{type(error).__name__} {one_line(error)}"
            raise InputError(f"{path} has metadata that cannot be used: {reason}") from error
        if names and len(names) != outputs:
            raise InputError(f"{path} has {outputs} outputs, and names of {len(names)} classes in its metadata")
        self.num_classes, self.num_parameters, self.note = len(names), config["parameters"], str(config["note"])
        self.pretrained_cfg: dict[str, Any] = {**config, "label_names": names}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.run(images)
