"""Image folders and scikit-learn's digits as data sets whose randomness has no state.

The order of the images is a function of (seed, epoch), the augmentation of one image of (seed, epoch, image): a run
that stops in mid-epoch is continued by skipping batches, and the number of workers changes nothing.
"""

import os
import random
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision.transforms import Compose, RandomCrop
from tqdm import tqdm

CACHE_BYTES = 2 << 30  # decoded pixels kept in memory per split; images beyond are decoded again in every epoch
ORDER, SAMPLE, STEP = range(3)  # what is drawn: the first word of every seed

Items = list[tuple[Union[Path, np.ndarray], int]]  # an image, as file or as pixels, and its label


def seed_of(*key: int) -> int:
    """One well mixed 32-bit seed for a tuple of numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def reseed(*key: int) -> None:
    """Make every draw that follows a function of the key, on the CPU."""
    random.seed(seed := seed_of(*key))
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup and RandAugment draw from this one)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend: 0.2 ms, too slow for each image


def find_images(
    data_dir: Optional[str], val_dir: Optional[str] = None, held_out: float = 0.2
) -> tuple[Items, Items, list[str]]:
    """List training images, validation images and class names; None stands for scikit-learn's digits.

    ``data_dir`` holds class folders, or ``train/`` and ``val/``, ``validation/`` or ``test/`` with class folders.
    Without a validation folder, a share of every class is held out, the same in every run.

    Raises:
        ValueError: for a folder that is not so, naming it.
    """
    if data_dir is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError(
                "data_dir is missing, and the built-in digits need scikit-learn; allowed: a folder"
            ) from None
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        items: Items = list(zip(pixels, digits.target.tolist()))
        return *hold_out(items, held_out), [str(name) for name in digits.target_names]
    root = Path(data_dir)
    splits = [root / name for name in ("val", "validation", "test") if (root / name).is_dir()]
    if splits and not (root / "train").is_dir():
        raise ValueError(f"data_dir={root} has {splits[0].name}/ but no train/; allowed: both, or class folders only")
    train, classes = list_images(root / "train" if (root / "train").is_dir() else root)
    if len(classes) < 2:
        raise ValueError(f"data_dir={root} has one class only, {classes[0]!r}; at least two class folders are needed")
    if val_dir or splits:
        return train, list_images(Path(val_dir or splits[0]), classes)[0], classes
    return *hold_out(train, held_out), classes


def list_images(folder: Path, known: Optional[list[str]] = None) -> tuple[Items, list[str]]:
    """List the images of class folders, and the class names in timm's order; ``known`` names set the labels."""
    layout = f"expected {folder}/<class>/<image>.jpg"
    if not folder.is_dir():
        raise ValueError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; {layout}")
    names = sorted((p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."), key=natural_key)
    known = known or names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{folder} has classes that the training images lack: {', '.join(unknown)}")
    extensions = get_img_extensions(as_set=True)
    files = {
        name: sorted((str(p) for p in (folder / name).rglob("*") if p.suffix.lower() in extensions), key=natural_key)
        for name in names
    }
    if not any(files.values()):
        raise ValueError(f"{folder} holds no images in class folders; {layout}")
    if empty := [name for name in names if not files[name]]:
        raise ValueError(f"{folder} has class folders without images: {', '.join(empty)}; fill or remove them")
    return [(Path(file), known.index(name)) for name in names for file in files[name]], names


def find_unlabelled(folder: Path) -> Items:
    """List the images of a folder at any depth, all with label 0.

    Raises:
        ValueError: for a folder that isn't there or holds no image.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected a folder of images"
        )
    extensions = get_img_extensions(as_set=True)
    files = sorted((str(path) for path in folder.rglob("*") if path.suffix.lower() in extensions), key=natural_key)
    if not files:
        raise ValueError(f"{folder} holds no images; allowed are {', '.join(sorted(extensions))}")
    return [(Path(file), 0) for file in files]


def hold_out(items: Items, share: float) -> tuple[Items, Items]:
    """Split off a share of every class."""
    train: Items = []
    val: Items = []
    for label in sorted({label for _, label in items}):
        own = [item for item in items if item[1] == label]
        random.Random(label).shuffle(own)
        cut = max(1, round(share * len(own))) if len(own) > 1 else 0
        val += own[:cut]
        train += own[cut:]
    if not val:
        raise ValueError("no class has two images, so none can be held out; give val_dir")
    return train, val


def transforms(data_config: dict[str, Any], augment: str, flip: float) -> tuple[Any, Any, Any]:
    """Split timm's pipelines into what is done once, for training and for validation; uint8 tensors come out.

    Images are kept at the size that the first step of validation gives, so validation is exactly timm's.
    """
    shared = {key: data_config[key] for key in ("input_size", "interpolation", "mean")}
    shared["use_prefetcher"] = True  # stay uint8: whole batches are normalised on the device
    steps = create_transform(**shared, crop_pct=data_config["crop_pct"], crop_mode=data_config["crop_mode"]).transforms
    resize, evaluate = steps[0], Compose(steps[1:])
    if augment == "none":
        return resize, evaluate, evaluate
    policy = "rand-m9-mstd0.5-inc1" if augment == "rand" else None
    train = create_transform(
        **shared, is_training=True, scale=(0.4, 1.0), hflip=flip, color_jitter=None, auto_augment=policy
    )
    size = data_config["input_size"][1:]
    if min(size) <= 64:  # zooming costs small images too much detail: shift them, as is usual for CIFAR
        train.transforms[0] = RandomCrop(size, padding=min(size) // 8, pad_if_needed=True)
    return resize, train, evaluate


def normaliser(data_config: dict[str, Any], device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """From uint8 pixels (.., C, H, W), as ``transforms`` gives them, to what the model expects, on its device."""
    mean, std = (torch.tensor(data_config[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
    return lambda pixels: (pixels.to(device).float() / 255 - mean) / std


class Images(Dataset):
    """Decoded images; item (epoch, index) is transformed as a function of (seed, epoch, index).

    Every image is decoded once at the start, by all threads: damaged files are found, named and left out before
    training, and small sets stay in memory.

    Raises:
        ValueError: if no image of a class can be read.
    """

    def __init__(self, items: Items, classes: list[str], channels: int, resize: Any, transform: Any, seed: int) -> None:
        self.mode = "RGB" if channels == 3 else "L"
        self.resize, self.transform, self.seed = resize, transform, seed
        self.items: Items = []
        self.cache: list[Optional[np.ndarray]] = []
        damaged, size = [], 0
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            decoded = pool.map(self._try_decode, (source for source, _ in items))
            for item, pixels in zip(items, tqdm(decoded, "decode", len(items), leave=False, disable=None)):
                if isinstance(pixels, Exception):
                    damaged.append(item)
                    continue
                size += pixels.nbytes
                self.items.append(item)
                self.cache.append(pixels if size <= CACHE_BYTES else None)
        finally:
            pool.shutdown(cancel_futures=True)  # else Ctrl-C waits for all images
        for label in sorted({label for _, label in damaged} - {label for _, label in self.items}):
            files = [str(source) for source, other in damaged if other == label]
            raise ValueError(
                f"class {classes[label]!r}: none of its {len(files)} images can be read, such as {files[0]}"
            )
        if damaged:
            names = ", ".join(str(source) for source, _ in damaged[:5]) + (" ..." if len(damaged) > 5 else "")
            print(f"skipped {len(damaged)} of {len(items)} images that cannot be read: {names}")

    def _decode(self, source: Union[Path, np.ndarray]) -> np.ndarray:
        with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
            return np.asarray(self.resize(image.convert(self.mode)))

    def _try_decode(self, source: Union[Path, np.ndarray]) -> Union[np.ndarray, Exception]:
        try:
            return self._decode(source)
        except Exception as error:  # what a damaged file raises differs between PIL's readers
            return error

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        source, label = self.items[index]
        pixels = self.cache[index]
        if pixels is None:
            pixels = self._decode(source)
        reseed(SAMPLE, self.seed, epoch, index)
        return self.transform(Image.fromarray(pixels)), label

    def batches(self, batch_size: int, epoch: Optional[int] = None) -> list[list[tuple[int, int]]]:
        """Keys of one epoch: shuffled whole batches, or all images in order where the epoch is None."""
        if epoch is None:
            order, stop = range(len(self)), len(self)
        else:
            generator = torch.Generator().manual_seed(seed_of(ORDER, self.seed, epoch))
            order, stop = torch.randperm(len(self), generator=generator).tolist(), len(self) // batch_size * batch_size
        return [[(epoch or 0, i) for i in order[at : min(at + batch_size, stop)]] for at in range(0, stop, batch_size)]

    def digest(self) -> str:
        """Number and checksum of the file names, to recognise the same data at another place."""
        names = ["/".join(source.parts[-2:]) for source, _ in self.items if isinstance(source, Path)]
        return f"{len(self)} images, names {zlib.crc32(repr(names).encode()):08x}"
