"""What a run of ``timm-vix compare`` and its row are known by, and the files of a row of ``timm-vix cost``.

Weights are recorded by the name and checksum of their file, images by the name of their folder, their number and a
checksum, so that both may move. A row of an earlier version has names without checksums. It counts as the row of a run
with the same names.
"""

import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Union

from .._files import name_and_checksum
from .._names import parse_model
from .._weights import check_weights
from ..data.datasets import Items

FILES_OF_A_MODEL = ("config.json", "model.safetensors", "pytorch_model.bin")  # in a folder that timm loads


class Run(NamedTuple):
    """A training: its images, model, initial weights, recipe and seed. These are columns of the table."""

    dataset: str
    model: str
    start: str
    recipe: str
    seed: int

    def folder(self) -> str:
        """The name of its folder."""
        name = re.sub(r"[^\w.=-]+", "_", self.model)
        return f"{name}-seed{self.seed}-{zlib.crc32(repr(sorted(self._asdict().items())).encode()):08x}"


def files_of(model: str) -> list[str]:
    """Names and checksums of the files that a model's name holds: those of a local folder, and those of keywords.

    A keyword may be the file of a plan.
    """
    name, keywords = parse_model(model)
    files = [Path(value) for value in keywords.values() if isinstance(value, str)]
    if name.startswith("local-dir:"):
        files = [Path(name.removeprefix("local-dir:"), file) for file in FILES_OF_A_MODEL] + files
    return [name_and_checksum(file) for file in files if file.is_file()]


def start_of(model: str, weights: Union[str, bool]) -> str:
    """What a run starts from: "scratch", "pretrained", or name and checksum of a file; then those of ``files_of``.

    A folder or a place of the Hub has weights of its own, so it is "pretrained" unless a file is given.
    """
    if isinstance(weights, str):
        check_weights("checkpoint", weights)
        return " ".join([name_and_checksum(weights), *files_of(model)])
    weighted = weights or ":" in parse_model(model)[0]
    return " ".join(["pretrained" if weighted else "scratch", *files_of(model)])


def with_checksum(name: str, *splits: Items) -> str:
    """The name of images, "photos (2 classes)", with their number and a checksum.

    It is of the names and sizes of their files, so it is the same in another folder; for a data set that timm's readers
    index, of the labels.
    """

    def describe(image: Any, label: int) -> Any:
        """A file by its name and size; an image that a data set reads itself, by its label."""
        if isinstance(image, Path):
            return image.parts[-2:], image.exists() and image.stat().st_size
        return label

    files = [[describe(*item) for item in items] for items in splits]
    return f"{name[:-1]}, {sum(map(len, splits))} images {zlib.crc32(repr(files).encode()):08x})"
