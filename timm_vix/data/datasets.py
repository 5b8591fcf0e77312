"""Data sets of timm's factory: ``hfds/...``, ``torch/...``, ``hfids/...``, ``tfds/...``, ``wds/...``.

Training needs images by their number, since their order and augmentation are functions of a seed. Data sets that can be
indexed are used as they are. Those that can only be read in order are written out once, as a folder of class folders.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_dataset
from tqdm import tqdm

from .._checks import InputError
from .._files import one_line

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
STREAMS = ("hfids", "tfds", "wds")  # read in order only
VALIDATION = ("validation", "val", "valid", "test")
DONE = "complete"


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a data set that can be indexed."""

    dataset: Any
    number: int

    def open(self) -> Image.Image:
        """The image; its pixels may be still to be decoded."""
        # timm's data set would answer with another image where one is damaged; its reader raises
        image = getattr(self.dataset, "reader", self.dataset)[self.number][0]
        return image if isinstance(image, Image.Image) else Image.open(image)


Source = Union[Path, np.ndarray, Sample]  # an image: as a file, as pixels, or in a data set
Items = list[tuple[Source, int]]  # with its label


def is_dataset(name: str) -> bool:
    """Whether ``name`` is a data set of timm's factory, and not a folder."""
    return name.split("/")[0].lower() in PREFIXES and not Path(name).exists()


def open_dataset(name: str, root: Optional[str]) -> tuple[Any, Optional[Any]]:
    """Training and validation split of a data set of timm's factory; None where it has no validation split.

    Args:
        name: Such as "hfds/uoft-cs/cifar10" or "torch/cifar10".
        root: Where its reader keeps or finds its own files.

    Raises:
        ValueError: for a data set that timm cannot read.
    """
    options = dict(root=root, **columns_of(name, root))
    train = open_split(name, options, ("train",))
    try:
        return train, open_split(name, options, VALIDATION, files_of(train))
    except ValueError as error:
        print(f"a share of the training images is held out: {error}", flush=True)
        return train, None


def labelled_images(dataset: Any) -> Items:
    """The images of a data set that can be indexed, each with its label."""
    reader = getattr(dataset, "reader", dataset)
    if samples := getattr(reader, "samples", None):  # of files
        return [(Path(path), int(label)) for path, label in samples]
    if hasattr(reader, "iter_targets"):
        labels = list(reader.iter_targets())
    elif hasattr(dataset, "targets"):
        labels = list(dataset.targets)
    else:
        labels = [dataset[i][1] for i in tqdm(range(len(dataset)), "labels", leave=False, disable=None)]
    return [(Sample(dataset, i), int(label)) for i, label in enumerate(labels)]


def as_folder(name: str, root: Optional[str], cache: Path) -> str:
    """A folder with ``train/`` and ``val/`` of a data set that can only be read in order; any other name as it is.

    The images are written once, as PNG; if that is stopped, the next call continues. A data set without a validation
    split gets no ``val/``, and training holds a share out.

    Args:
        name: A folder, or a name of timm's factory such as "wds/imagenet".
        root: Where the factory's reader keeps or finds its own files.
        cache: Where the folder is made; for each root, in a folder of its own.

    Raises:
        ValueError: for a data set that timm cannot read.
        OSError: for a file that cannot be written.

    Example:
        >>> as_folder("hfids/uoft-cs/cifar10", None, Path("runs/data"))
        'runs/data/hfids_uoft-cs_cifar10'
    """
    if not is_dataset(name):
        return name
    if root:  # another root may hold other images; the folder keeps its name, by which results name their data set
        cache = cache / f"{zlib.crc32(str(Path(root).resolve()).encode()):08x}"
    folder = cache / re.sub(r"[^\w.-]+", "_", name)
    if (folder / DONE).exists() or (folder / "val" / DONE).exists():  # the latter by earlier versions
        return str(folder)
    if name.split("/")[0].lower() not in STREAMS:
        return name
    for split, dataset in zip(("train", "val"), open_dataset(name, root)):
        if dataset is not None:
            write_images(dataset, name, folder / split)
    (folder / DONE).touch()
    return str(folder)


def columns_of(name: str, root: Optional[str]) -> dict[str, str]:
    """Which columns of a data set of the Hub hold images and labels, where these aren't "image" and "label"."""
    prefix, _, rest = name.partition("/")
    columns: dict[str, str] = {}
    if prefix.lower() in ("hfds", "hfids"):
        with contextlib.suppress(Exception):  # opening the data set gives the reason
            # as a stream it knows its columns before its images are fetched
            reader = create_dataset(f"hfids/{rest}", root, split="train", num_samples=1).reader
            features = reader.builder.as_streaming_dataset(split="train").features
            for key, usual, kind in (("input_key", "image", "Image"), ("target_key", "label", "ClassLabel")):
                found = [column for column, feature in features.items() if type(feature).__name__ == kind]
                if usual not in features and found:
                    columns[key] = found[0]
    return columns


def open_split(name: str, options: dict[str, Any], splits: tuple[str, ...], taken: frozenset[str] = frozenset()) -> Any:
    """The first split that the data set has, and that shares no file with those ``taken``."""
    reasons = []
    for split in splits:
        try:
            dataset = create_dataset(name, split=split, **options)
        except Exception as error:  # readers raise as they like
            reasons.append(f"{split}: {one_line(error, 150)}")
            continue
        if taken.isdisjoint(files_of(dataset)):
            return dataset
        reasons.append(f"{split}: holds images of train")  # timm takes the root where it has no folder of that name
    raise InputError(f"data_dir={name!r} cannot be read by timm's dataset factory: {'; '.join(reasons)}")


def files_of(dataset: Any) -> frozenset[str]:
    """The files of a data set, if its images are files."""
    return frozenset(str(path) for path, _ in getattr(getattr(dataset, "reader", dataset), "samples", ()))


def write_images(dataset: Any, name: str, folder: Path) -> None:
    """Write each image as ``<class>/<number>.png``, but for those that are there."""
    names = {label: re.sub(r"[^\w.-]+", "_", name).lstrip(".") for label, name in class_names(dataset).items()}
    if len(set(names.values())) < len(names):
        names = {}
    length = None
    with contextlib.suppress(TypeError):
        length = len(dataset)
    images = read_images(dataset, name, length or 0)
    for number, (image, label) in enumerate(tqdm(images, f"write {folder}", length, leave=False, disable=None)):
        path = folder / names.get(label, f"{label:05d}") / f"{number:08d}.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        ImageOps.exif_transpose(image).save(partial, format="png")  # a PNG doesn't keep how a camera was turned
        os.replace(partial, path)


def read_images(dataset: Any, name: str, length: int) -> Iterator[tuple[Any, int]]:
    """Images and labels in the data set's order; raise ValueError in one line for whatever its reader raises."""
    try:
        # a data set without an iterator of its own is asked for one index after the other
        for image, label in iter(dataset) if hasattr(dataset, "__iter__") else (dataset[i] for i in range(length)):
            yield image, int(label)
    except Exception as error:  # readers raise as they like
        reason = f"{type(error).__name__}: {one_line(error, 150)}"
        raise InputError(f"data_dir={name!r} cannot be read by timm's dataset factory: {reason}") from error


def class_names(dataset: Any) -> dict[int, str]:
    """Names of the classes by label, in the order of labels, where the reader knows them; the first of synonyms."""
    names: dict[int, str] = {}
    for name, label in (getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}).items():
        names.setdefault(int(label), str(name))
    return dict(sorted(names.items()))
