"""Which images there are: of folders, of data sets of timm's factory, or scikit-learn's handwritten digits.

Labels and order depend on the names alone, never on the order in which a file system lists them.
"""

import csv
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, TypeVar

import numpy as np
from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torch import nn

from .._checks import InputError
from .._files import one_line, printable
from .._names import weights_config
from .datasets import VALIDATION, Items, class_names, is_dataset, labelled_images, open_dataset

Item = TypeVar("Item")


def find_images(
    data_dir: Optional[str], val_dir: Optional[str] = None, held_out: float = 0.2, data_root: Optional[str] = None
) -> tuple[Items, Items, list[str]]:
    """List training images, validation images and class names; no ``data_dir`` stands for scikit-learn's digits.

    ``data_dir`` holds class folders, or ``train/`` and one of ``VALIDATION`` with class folders; or it names a data set
    of timm's factory that can be indexed, whose files are below ``data_root``. Without validation images, a share of
    every class is held out, the same in every run.

    Raises:
        ValueError: for a folder or a data set of another structure; the error names it.
    """
    for name, value in (("val_dir", val_dir), ("data_root", data_root)):
        if data_dir is None and value is not None:
            raise InputError(f"{name}={value} was given without data_dir; expected both")
    if data_dir is None:
        items, classes = list_digits()
        return *hold_out(items, held_out), classes
    if is_dataset(data_dir):
        return list_dataset(data_dir, data_root, val_dir, held_out)
    if data_root is not None:
        raise InputError(f"data_root={data_root} is for a data set of timm's factory, and data_dir={data_dir} is none")
    root = Path(data_dir)
    splits = [root / name for name in VALIDATION if (root / name).is_dir()]
    if splits and not (root / "train").is_dir():
        raise InputError(f"data_dir={root} has {splits[0].name}/ but no train/; allowed: both, or class folders only")
    train, classes = list_images(root / "train" if (root / "train").is_dir() else root)
    if len(classes) < 2:
        raise InputError(f"data_dir={root} has one class only, {classes[0]!r}; at least two class folders are needed")
    if val_dir or splits:
        return train, list_images(Path(val_dir or splits[0]), classes)[0], classes
    return *hold_out(train, held_out), classes


def name_of(data_dir: str) -> str:
    """What a reader elsewhere is told of a ``data_dir``: a folder's own name, or the name of a data set of timm's."""
    if is_dataset(data_dir):
        return data_dir
    return printable(Path(os.path.abspath(data_dir)).name)  # "." and ".." have no name


def list_digits() -> tuple[Items, list[str]]:
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey pixels each, and their names."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("data_dir is missing, and the built-in digits need scikit-learn; allowed: a folder") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return list(zip(pixels, digits.target.tolist())), [str(name) for name in digits.target_names]


def list_dataset(
    name: str, root: Optional[str], val_dir: Optional[str], held_out: float
) -> tuple[Items, Items, list[str]]:
    """``find_images`` of a data set of timm's factory."""
    train_set, val_set = open_dataset(name, root)
    if not hasattr(train_set, "__getitem__"):
        raise InputError(f"data_dir={name!r} can only be read in order; allowed is a data set that can be indexed")
    images = labelled_images(train_set)
    classes = list(names_by_label(train_set, images).values())
    if len(classes) < 2:
        raise InputError(f"data_dir={name!r} has one class only, {''.join(classes)!r}; at least two are needed")
    train = by_class_name(name, train_set, images, classes)
    if val_dir:
        return train, list_images(Path(val_dir), classes)[0], classes
    if val_set is None:
        return *hold_out(train, held_out), classes
    return train, by_class_name(name, val_set, labelled_images(val_set), classes), classes


def names_by_label(dataset: Any, images: Items) -> dict[int, str]:
    """The name of each class by its label, in the order of labels; the number of one without a name."""
    names = class_names(dataset)
    # torchvision knows ImageNet's classes by single words, of which two classes have the same
    unnamed = {label: f"{label:05d}" for label in {label for _, label in images} - names.keys()}
    return dict(sorted({**names, **unnamed}.items()))


def by_class_name(name: str, dataset: Any, images: Items, classes: list[str]) -> Items:
    """The images with the position of their class among ``classes`` as label; splits may count classes differently."""
    numbers = {own: number for number, own in enumerate(classes)}
    labels = {label: numbers.get(own) for label, own in names_by_label(dataset, images).items()}
    found: Items = []
    for source, label in images:
        number = labels.get(label)
        if number is None:
            raise InputError(f"data_dir={name!r} has an image of label {label}, which is none of its classes")
        found.append((source, number))
    return found


def list_images(folder: Path, known: Optional[list[str]] = None) -> tuple[Items, list[str]]:
    """List the images of class folders, and the class names in timm's order; ``known`` names set the labels."""
    layout = f"expected {folder}/<class>/<image>.jpg"
    if not folder.is_dir():
        raise InputError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; {layout}")
    names = sorted((path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."), key=order)
    known = known or names
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{folder} has folders that are none of the {len(known)} known classes: {', '.join(unknown)}")
    files = {name: image_files(folder / name) for name in names}
    if not any(files.values()):
        raise InputError(f"{folder} holds no images in class folders; {layout}")
    if empty := [name for name in names if not files[name]]:
        raise InputError(
            f"{folder} has class folders without images: {', '.join(empty)}; fill or remove them; allowed are "
            f"{extensions()}"
        )
    labels = {name: label for label, name in enumerate(known)}
    return [(file, labels[name]) for name in names for file in files[name]], names


def extensions() -> str:
    """What the name of an image's file may end in."""
    return ", ".join(sorted(get_img_extensions()))


def find_unlabelled(folder: Path) -> Items:
    """List the images of a folder at any depth, all with label 0.

    Raises:
        ValueError: for a folder that isn't there or holds no image.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected a folder of images"
        )
    files = image_files(folder)
    if not files:
        raise InputError(f"{folder} holds no images; allowed are {extensions()}")
    return [(file, 0) for file in files]


def labelled_folder(folder: Path, model: nn.Module) -> tuple[Items, list[str]]:
    """List the images of a folder with the model's labels, and the names of its classes.

    The folder holds class folders, or ``val/``, ``validation/`` or ``test/`` with them; or a table ``labels.csv`` whose
    first two columns are the name of an image, there or in ``images/``, and the number of its class.

    Raises:
        ValueError: for another folder, or for classes that aren't the model's.
    """
    if (folder / "labels.csv").is_file():
        return read_labels(folder, model.num_classes)
    inner = [folder / name for name in VALIDATION if (folder / name).is_dir()]
    names = label_names(model)
    known = names if names and len(names) == model.num_classes else None
    if folder.is_dir() and not any(path.is_dir() for path in folder.iterdir()):
        raise InputError(f"{folder} has no classes; expected {folder}/<class>/<image>.jpg, or images and labels.csv")
    items, classes = list_images(inner[0] if inner else folder, known)
    if known is None and len(classes) != model.num_classes:
        raise InputError(f"data_dir={folder} has {len(classes)} classes; the model has {model.num_classes}")
    return items, known or classes


def label_names(model: nn.Module) -> list[str]:
    """The names of a model's classes in the order of labels, as its configuration has them; none: no names.

    Raises:
        InputError: for an entry of another form.
    """
    names = weights_config(model).get("label_names") or []
    if not isinstance(names, (Mapping, list, tuple)):
        raise InputError(f"the model's configuration has label_names={names!r}; expected a list, or names by label")
    if isinstance(names, Mapping):  # by label, which is text in a JSON file
        names = [names[label] for label in sorted(names, key=lambda label: order(str(label)))]
    if wrong := [name for name in names if isinstance(name, (Mapping, list, tuple))]:
        raise InputError(f"the model's configuration has {wrong[0]!r} among its label_names; expected texts")
    return list(names)


def read_labels(folder: Path, num_classes: int) -> tuple[Items, list[str]]:
    """``labelled_folder`` for a folder with the table ``labels.csv``."""
    table = folder / "labels.csv"
    if not table.is_file():
        raise InputError(f"{folder} has no labels.csv; expected one with lines of FILE,CLASS, and the images beside it")
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} cannot be read: {one_line(error)}; expected a CSV file in UTF-8") from error
    items: Items = []
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and not (len(row) > 1 and row[1].isdecimal())):  # the header, if there is one
            continue
        if len(row) < 2 or not row[1].isdecimal() or int(row[1]) >= num_classes:
            raise InputError(f"{table}, line {number}: expected FILE,CLASS with a class below {num_classes}")
        places = [folder / row[0], folder / "images" / row[0]]
        items.append((next((path for path in places if path.is_file()), places[0]), int(row[1])))
    if not items:
        raise InputError(f"{table} names no images; expected lines of FILE,CLASS")
    return items, [str(number) for number in range(num_classes)]


def spread(items: list[Item], count: Optional[int]) -> list[Item]:
    """Up to ``count`` items, spread over the list; None: all."""
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def image_files(folder: Path) -> list[Path]:
    """The image files at any depth below a folder, found by timm's reader, which follows links to folders.

    A folder that is reached by several paths, as in a loop of links, counts once.
    """
    found, _ = find_images_and_targets(str(folder), sort=False)
    files: dict[str, Path] = {}
    folders: dict[str, str] = {}
    for path in sorted((path for path, _ in found), key=order):
        parent, name = os.path.split(path)
        real = folders.setdefault(parent, os.path.realpath(parent))
        files.setdefault(os.path.join(real, name), Path(path))
    return list(files.values())


def order(name: str) -> tuple:
    """timm's order of names, in which 2 comes before 10, and of names that tie in it ("Cat", "cat"; "1", "01")."""
    return natural_key(name), name


def hold_out(items: Items, share: float) -> tuple[Items, Items]:
    """Split off a share of every class."""
    train: Items = []
    val: Items = []
    of_class: dict[int, Items] = {}
    for item in items:
        of_class.setdefault(item[1], []).append(item)
    for label, own in sorted(of_class.items()):
        random.Random(label).shuffle(own)
        cut = min(max(1, round(share * len(own))), len(own) - 1)  # a class always keeps one to learn from
        val += own[:cut]
        train += own[cut:]
    if not val:
        raise InputError("no class has two images, so none can be held out; give val_dir")
    return train, val
