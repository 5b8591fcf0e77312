"""Data sets of timm's factory (``hfds/...``, ``torch/...``, ``tfds/...``, ``wds/...``), written out once as folders.

Training reads folders of class folders, in which an order and an augmentation can be a function of a seed.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from timm.data import create_dataset
from tqdm import tqdm

from .._files import one_line

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
VALIDATION = ("validation", "val", "valid", "test")
DONE = "complete"


def as_folder(name: str, root: Optional[str], cache: Path) -> str:
    """A folder with ``train/`` and ``val/`` of the data set ``name``; what is a folder already is returned as it is.

    Written once, as PNG; stopped in between, it continues. A data set that has no validation images besides those of
    training gets no ``val/``, and training holds a share out.

    Args:
        name: A folder, or a name of timm's factory such as "hfds/uoft-cs/cifar10".
        root: Where the factory's reader keeps or finds its own files.
        cache: Where the folder is made; for each root, in a folder of its own.

    Raises:
        ValueError: for a data set that timm cannot read.
        OSError: for a file that cannot be written.

    Example:
        >>> as_folder("hfds/uoft-cs/cifar10", None, Path("runs/data"))
        'runs/data/hfds_uoft-cs_cifar10'
    """
    if name.split("/")[0].lower() not in PREFIXES or Path(name).exists():
        return name
    if root:  # another root may hold other images; the folder's own name stays, by which runs are told
        cache = cache / f"{zlib.crc32(str(Path(root).resolve()).encode()):08x}"
    folder = cache / re.sub(r"[^\w.-]+", "_", name)
    if (folder / DONE).exists() or (folder / "val" / DONE).exists():  # the latter by earlier versions
        return str(folder)
    options = dict(root=root, **columns_of(name, root))
    splits = dict(train=open_split(name, options, ("train",)))
    try:
        splits["val"] = open_split(name, options, VALIDATION, files_of(splits["train"]))
    except ValueError as error:
        print(f"a share of the training images is held out: {error}", flush=True)
    for split, dataset in splits.items():
        write_images(dataset, name, folder / split)
    (folder / DONE).touch()
    return str(folder)


def columns_of(name: str, root: Optional[str]) -> dict[str, str]:
    """Which columns of a data set of the Hub hold images and labels, where these aren't "image" and "label"."""
    prefix, _, rest = name.partition("/")
    columns: dict[str, str] = {}
    if prefix.lower() in ("hfds", "hfids"):
        with contextlib.suppress(Exception):  # opening the data set will tell
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
    raise ValueError(f"data_dir={name!r} cannot be read by timm's dataset factory: {'; '.join(reasons)}")


def files_of(dataset: Any) -> frozenset[str]:
    """What a data set lists, if its images are files."""
    return frozenset(str(path) for path, _ in getattr(dataset, "samples", ()))


def write_images(dataset: Any, name: str, folder: Path) -> None:
    """Write each image as ``<class>/<number>.png``, but for those that are there."""
    names = class_names(dataset)
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
        image.save(partial, format="png")
        os.replace(partial, path)


def read_images(dataset: Any, name: str, length: int) -> Iterator[tuple[Any, int]]:
    try:
        # a data set without an iterator of its own is asked for one index after the other
        for image, label in iter(dataset) if hasattr(dataset, "__iter__") else (dataset[i] for i in range(length)):
            yield image, int(label)
    except Exception as error:  # readers raise as they like
        reason = f"{type(error).__name__}: {one_line(error, 150)}"
        raise ValueError(f"data_dir={name!r} cannot be read by timm's dataset factory: {reason}") from error


def class_names(dataset: Any) -> dict[int, str]:
    """Names by label where the reader knows them, fit for a folder."""
    index = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    names = {int(label): re.sub(r"[^\w.-]+", "_", str(name)).lstrip(".") for name, label in index.items()}
    return names if len(set(names.values())) == len(names) else {}
