"""Data sets of timm's factory (``hfds/...``, ``torch/...``, ``tfds/...``, ``wds/...``), written out once as folders.

Training reads folders of class folders, in which an order and an augmentation can be a function of a seed.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Optional

from timm.data import create_dataset
from tqdm import tqdm

PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
DONE = "complete"


def as_folder(name: str, root: Optional[str], cache: Path) -> str:
    """A folder with ``train/`` and ``val/`` of the data set ``name``; what is a folder already is returned as it is.

    Written once, as PNG; stopped in between, it continues.

    Args:
        name: A folder, or a name of timm's factory such as "hfds/uoft-cs/cifar10".
        root: Where the factory's reader keeps or finds its own files.
        cache: Where the folder is made.

    Raises:
        ValueError: for a data set that timm cannot read.
        OSError: for a file that cannot be written.

    Example:
        >>> as_folder("hfds/uoft-cs/cifar10", None, Path("runs/data"))
        'runs/data/hfds_uoft-cs_cifar10'
    """
    if name.split("/")[0].lower() not in PREFIXES or Path(name).exists():
        return name
    folder = cache / re.sub(r"[^\w.-]+", "_", name)
    for ours, theirs in (("train", ("train",)), ("val", ("validation", "val", "test"))):
        if not (folder / ours / DONE).exists():
            write_images(open_split(name, root, theirs), folder / ours)
            (folder / ours / DONE).touch()
    return str(folder)


def open_split(name: str, root: Optional[str], splits: tuple[str, ...]) -> Any:
    """The first split that the data set has."""
    reasons = []
    for split in splits:
        try:
            return create_dataset(name, root, split=split)
        except Exception as error:  # readers raise as they like
            reasons.append(f"{split}: {' '.join(str(error).split()) or type(error).__name__}"[:150])
    raise ValueError(f"data_dir={name!r} cannot be read by timm's dataset factory: {'; '.join(reasons)}")


def write_images(dataset: Any, folder: Path) -> None:
    """Write each image as ``<class>/<number>.png``, but for those that are there."""
    names = class_names(dataset)
    length = None
    with contextlib.suppress(TypeError):
        length = len(dataset)
    # a data set without an iterator of its own is asked for one index after the other
    images = iter(dataset) if hasattr(dataset, "__iter__") else (dataset[i] for i in range(length or 0))
    for number, (image, label) in enumerate(tqdm(images, f"write {folder}", length, leave=False, disable=None)):
        path = folder / names.get(int(label), f"{int(label):05d}") / f"{number:08d}.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        image.save(partial, format="png")
        os.replace(partial, path)


def class_names(dataset: Any) -> dict[int, str]:
    """Names by label where the reader knows them, fit for a folder."""
    index = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    names = {int(label): re.sub(r"[^\w.-]+", "_", str(name)).lstrip(".") for name, label in index.items()}
    return names if len(set(names.values())) == len(names) else {}
