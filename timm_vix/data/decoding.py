"""A single image: opened from a file, an array or a data set, brought upright and into 8 bits."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .datasets import Sample, Source


def image_mode(channels: int) -> str:
    """PIL's mode of the images for a model of so many channels."""
    return "RGB" if channels == 3 else "L"


def open_image(source: Source) -> Image.Image:
    """An image of any source; its pixels may be still to be decoded."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    return source.open() if isinstance(source, Sample) else Image.open(source)


def as_shown(image: Image.Image, mode: str) -> Image.Image:
    """An image upright and in 8 bits, of PIL's mode "RGB" or "L".

    A camera that was turned stores the pixels as the sensor saw them, and the rotation in the EXIF data. It is applied
    here. Grey values of 16 bits are scaled down, since PIL would clip them at 255, and floating-point ones of at most 1
    are scaled up, since PIL would round them to 0 and 1.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * 255 if grey.max(initial=0) <= 1 else grey
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey // 257 if grey.max(initial=0) > 255 else grey).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def size_of(source: Source) -> int:
    """The size of an image's file in bytes; 0 where it has none."""
    try:
        return source.stat().st_size if isinstance(source, Path) else 0
    except OSError:  # a link to nothing
        return 0


def content_of(source: Source) -> bytes:
    """The bytes of an image's file, or its pixels; none where it can't be read."""
    try:
        if isinstance(source, Path):
            return source.read_bytes()
        with open_image(source) as image:
            return image.tobytes()
    except Exception:  # a damaged image raises as its reader likes
        return b""
