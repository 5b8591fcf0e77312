"""Images as a data set whose randomness has no state.

The order of the images is a function of (seed, epoch), the augmentation of one image of (seed, epoch, image): a run
that stops in mid-epoch is continued by skipping batches, and the number of workers changes nothing.
"""

import errno
import os
import signal
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision.transforms import Compose, RandomCrop
from tqdm import tqdm

from .._checks import InputError
from .._files import one_line, printable
from .datasets import Items
from .decoding import as_shown, content_of, image_mode, open_image, size_of
from .seeds import ORDER, SAMPLE, reseed, seed_of

CACHE_BYTES = 2 << 30  # decoded pixels kept in memory per split; images beyond are decoded again in every epoch
IN_A_WORKER = f"{InputError.__module__}.{InputError.__name__}: "  # comes before the message, after its traceback
# what the system says of a disk that fails, a server that is gone, and too many open files
FAILING = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE)
CHECKED = 1000  # images whose content enters the digest, evenly spread

Key = tuple[Optional[int], int]  # epoch, None without one, and index of an image
Decoded = tuple[int, Optional[np.ndarray]]  # index and pixels of an image, or None if it can't be read


def transforms(data_config: dict[str, Any], augment: str, flip: float) -> tuple[Any, Any, Any]:
    """Split timm's transforms into a step done once, those of training and those of validation, which give uint8.

    Images are kept at the size that the first step of validation gives, so validation is exactly timm's, but for
    photographs whose EXIF data say that they are turned.

    Raises:
        ValueError: for a model that takes neither grey nor RGB images.
    """
    channels = data_config["input_size"][0]
    if channels not in (1, 3):
        raise InputError(f"in_chans={channels}: allowed is 1 (grey) or 3 (RGB), which is what image files hold")
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
    """Images by key (epoch, index), each transformed as a function of (seed, epoch, index).

    An image is decoded once, and kept in memory as long as there is room.

    Args:
        lazy: Decode an image when a batch first needs it. One that turns out to be damaged is left out of a batch
            without an epoch; in an epoch the next readable image stands for it, since the number of steps is fixed
            before. If False, all images are decoded now, and those that are damaged don't count.

    Raises:
        ValueError: if no image of a class can be read; at once, even if the others are decoded later.
    """

    def __init__(
        self,
        items: Items,
        classes: list[str],
        channels: int,
        resize: Any,
        transform: Any,
        seed: int,
        lazy: bool = False,
    ) -> None:
        self.mode = image_mode(channels)
        self.resize, self.transform, self.seed = resize, transform, seed
        self.items = items
        self.cache: dict[int, np.ndarray] = {}
        self.bytes = 0
        self.damaged: set[int] = set()
        self.reported = 0
        of_class: dict[int, list[int]] = {}
        for index, (_, label) in enumerate(items):
            of_class.setdefault(label, []).append(index)
        self.remember(self.decode([own[0] for own in of_class.values()] if lazy else range(len(items))))
        for label, own in sorted(of_class.items()):
            if own[0] in self.damaged:
                self.remember(self.decode(own))
            if self.damaged.issuperset(own):
                raise InputError(
                    f"{classes[label]!r}: none of its {len(own)} images can be read, such as {self.name(own[0])}"
                )
        if not lazy:
            self.report_damaged()
            readable = [index for index in range(len(items)) if index not in self.damaged]
            self.items = [items[index] for index in readable]
            self.cache = {new: self.cache[old] for new, old in enumerate(readable) if old in self.cache}
            self.damaged = set()

    def decode(self, indices: Iterable[int]) -> Iterator[Decoded]:
        """Decode images that are not in memory, with a thread for each core; a worker process uses one thread only."""
        missing = [index for index in indices if index not in self.cache and index not in self.damaged]
        if len(missing) < 2 or get_worker_info():
            yield from map(self.try_to_decode, missing)
            return
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            decoded = pool.map(self.try_to_decode, missing)
            # one batch is decoded too fast for a progress bar
            yield from tqdm(decoded, "decode", len(missing), leave=False, disable=None, delay=1)
        finally:
            pool.shutdown(cancel_futures=True)  # else Ctrl-C waits for all images

    def try_to_decode(self, index: int) -> Decoded:
        """The pixels of an image; None if it can't be read.

        Raises:
            InputError: if its folder is no longer there, as when a disk was taken away, or if the disk fails.
        """
        source = self.items[index][0]
        try:
            with open_image(source) as image:
                return index, np.asarray(self.resize(as_shown(image, self.mode)))
        except Exception as error:  # what a damaged file raises differs between PIL's readers
            gone = isinstance(source, Path) and not source.parent.is_dir()
            if gone or (isinstance(error, OSError) and error.errno in FAILING):
                reason = "its folder is no longer there" if gone else one_line(error)
                raise InputError(f"{self.name(index)} can't be read: {reason}") from error
            return index, None

    def remember(self, decoded: Iterable[Decoded]) -> None:
        """Note damaged images, and keep the pixels of others while there is room."""
        for index, pixels in decoded:
            if pixels is None:
                self.damaged.add(index)
            elif index not in self.cache and self.bytes + pixels.nbytes <= CACHE_BYTES:
                self.bytes += pixels.nbytes
                self.cache[index] = pixels

    def report_damaged(self) -> None:
        """Print how many images can't be read, and the names of some, unless that was printed before."""
        if len(self.damaged) > self.reported:
            names = [self.name(index) for index in sorted(self.damaged)]
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            tqdm.write(f"skipped {len(names)} of {len(self.items)} images that cannot be read: {shown}")
            self.reported = len(names)

    def name(self, index: int) -> str:
        """How messages call an image."""
        source = self.items[index][0]
        return printable(source) if isinstance(source, Path) else f"number {getattr(source, 'number', index)}"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def readable(self) -> int:
        """The number of images that are not known to be damaged."""
        return len(self.items) - len(self.damaged)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int]:
        """One image (C, H, W) and its label; the next readable one where it is damaged."""
        epoch, index = key
        (sample,), decoded = self.__getitems__([(epoch or 0, index)])
        self.remember(decoded)
        return sample

    def __getitems__(self, keys: list[Key]) -> tuple[list[tuple[torch.Tensor, int]], list[Decoded]]:
        """The images of a batch, each (C, H, W) with its label, and what had to be decoded for them."""
        decoded = dict(self.decode(index for _, index in keys))
        samples = []
        for epoch, wanted in keys:
            index = wanted
            while (pixels := self.pixels(index, decoded)) is None and epoch is not None:
                index = (index + 1) % len(self)
            if pixels is not None:
                reseed(SAMPLE, self.seed, epoch or 0, wanted)
                samples.append((self.transform(Image.fromarray(pixels)), self.items[index][1]))
        return samples, [(index, pixels) for index, pixels in decoded.items() if pixels is None or self.has_room()]

    def pixels(self, index: int, decoded: dict[int, Optional[np.ndarray]]) -> Optional[np.ndarray]:
        """The pixels of an image, from memory, from what was ``decoded`` or from its file; None if it is damaged."""
        if index in self.cache:
            return self.cache[index]
        if index not in decoded and index not in self.damaged:
            decoded.update([self.try_to_decode(index)])
        return decoded.get(index)

    def has_room(self) -> bool:
        """Whether more pixels could be kept."""
        return self.bytes < CACHE_BYTES

    def batches(self, batch_size: int, epoch: Optional[int] = None) -> list[list[Key]]:
        """Keys of one epoch: shuffled whole batches, or all images in order where the epoch is None."""
        if epoch is None:
            order, stop = range(len(self)), len(self)
        else:
            generator = torch.Generator().manual_seed(seed_of(ORDER, self.seed, epoch))
            order, stop = torch.randperm(len(self), generator=generator).tolist(), len(self) // batch_size * batch_size
        return [[(epoch, i) for i in order[at : min(at + batch_size, stop)]] for at in range(0, stop, batch_size)]

    def loader(self, keys: list[list[Key]], workers: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Load batches, pixels (B, C, H, W) and labels (B,), in this process or by ``workers``.

        What a worker decodes comes back with its batch, so that later epochs have it in memory.
        """
        try:
            options = dict(num_workers=workers, collate_fn=stack, worker_init_fn=ignore_interrupt)
            for batch, decoded in DataLoader(self, batch_sampler=keys, **options):
                self.remember(decoded)
                if batch:
                    yield batch
        except InputError as error:
            raise InputError(str(error).splitlines()[-1].removeprefix(IN_A_WORKER)) from None
        finally:
            self.report_damaged()

    def digest(self, folders: Collection[Path] = ()) -> str:
        """Number of images and checksum of the names of files and of the folders they are in, for a copy the same.

        ``folders``: those that were given, whose own names don't count.
        """
        files = [source for source, _ in self.items if isinstance(source, Path)]
        names = [file.name if file.parent in folders else "/".join(file.parts[-2:]) for file in files]
        return f"{len(self)} images, names {zlib.crc32(repr(names).encode()):08x}"

    def checksum(self) -> str:
        """Checksum of all labels and file sizes and of the content of some images, to notice that pixels changed."""
        sizes = [(label, size_of(source)) for source, label in self.items]
        found = zlib.crc32(repr(sizes).encode())
        for source, _ in self.items[:: -(-len(self) // CHECKED)]:
            found = zlib.crc32(content_of(source), found)
        return f"{found:08x}"


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stack(loaded: tuple[list[tuple[torch.Tensor, int]], list[Decoded]]) -> tuple[Any, list[Decoded]]:
    """A batch of what ``Images`` loaded; None if none of its images can be read."""
    samples, decoded = loaded
    return default_collate(samples) if samples else None, decoded


def open_images(items: Items, classes: list[str], config: dict[str, Any], lazy: bool = False) -> Images:
    """Images as timm's validation prepares them."""
    resize, _, evaluate = transforms(config, "none", 0.0)
    return Images(items, classes, config["input_size"][0], resize, evaluate, 0, lazy)
