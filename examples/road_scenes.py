"""Scenes with a class for each pixel: reading and checking them, their augmentation, what is scored and drawn.

A folder holds train/ and val/, each with images/*.jpg and masks/*.png of the same names. A mask is an image of 8-bit
class indices: 0 to 10, or 11 for pixels without a class, which count neither in the loss nor in the score.
"""

import io
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from timm_vix._checks import InputError
from timm_vix._files import one_line
from timm_vix.data.folders import find_unlabelled
from timm_vix.data.seeds import ORDER, SAMPLE, reseed, seed_of

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
IGNORED = len(CLASSES)
# one colour a class, as CamVid is usually drawn, and black
PALETTE = np.array(
    [
        *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [0, 0, 192], [128, 128, 0]),
        *([192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192], [0, 0, 0]),
    ],
    np.uint8,
)

Scene = tuple[torch.Tensor, torch.Tensor]  # pixels (3, H, W) and classes (H, W), both uint8


def read_scenes(folder: Path, most: Optional[int] = None) -> list[Scene]:
    """The images of a split with their masks, the first ``most`` by name.

    Raises:
        InputError: for a folder without images, an image or a mask that is missing, damaged or of another size, and
            a class above 11.
    """
    paths = [path for path, _ in find_unlabelled(folder / "images")][:most]
    return [read_scene(path, folder / "masks" / f"{path.stem}.png") for path in tqdm(paths, folder.name, disable=None)]


def read_scene(image_path: Path, mask_path: Path) -> Scene:
    """An image and its mask."""
    if not mask_path.is_file():
        raise InputError(f"{mask_path} does not exist; expected a mask for {image_path}")
    image, mask = read_image(image_path), read_image(mask_path)
    if mask.mode not in ("L", "P"):
        raise InputError(f"{mask_path} has pixels of mode {mask.mode}; expected 8-bit class indices (L or P)")
    if mask.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (mask.size, image.size)]
        raise InputError(f"{mask_path} has {sizes[0]} pixels, and its image {sizes[1]}; expected the same size")
    classes = np.array(mask)
    if classes.max() > IGNORED:
        raise InputError(f"{mask_path} holds class {classes.max()}; allowed are 0 to {IGNORED} (none)")
    return v2.functional.pil_to_tensor(image.convert("RGB")), torch.from_numpy(classes)


def read_image(path: Path) -> Image.Image:
    """A decoded image file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # Pillow raises by kind of damage
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error


def checksum_of(scenes: list[Scene]) -> str:
    """A checksum of all images and masks."""
    checksum = 0
    for part in (part for scene in scenes for part in scene):
        checksum = zlib.crc32(part.contiguous().numpy().data, checksum)
    return f"{checksum:08x}"


class Scenes:
    """Training scenes whose randomness has no state, so that a run that was killed continues with the same batches.

    Each is cropped (at least half of its area), resized to ``size`` (height and width in pixels), and flipped and
    coloured at random; all of it is a function of (seed, epoch, scene).
    """

    def __init__(self, scenes: list[Scene], size: tuple[int, int], batch_size: int, seed: int) -> None:
        self.scenes, self.batch_size, self.seed = scenes, min(batch_size, len(scenes)), seed
        self.per_epoch = len(scenes) // self.batch_size
        aspect = size[1] / size[0]
        crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), ratio=(0.85 * aspect, 1.15 * aspect), antialias=True)
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3)])

    def batches(self, first: int, last: Optional[int]) -> Iterator[Scene]:
        """The batches from step ``first`` to before ``last``: pixels (B, 3, h, w), classes (B, h, w); None: endless."""
        for step in count(first) if last is None else range(first, last):
            epoch, place = divmod(step, self.per_epoch)
            generator = torch.Generator().manual_seed(seed_of(ORDER, self.seed, epoch))
            order = torch.randperm(len(self.scenes), generator=generator).tolist()
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            images, masks = zip(*(self.augmented(index, epoch) for index in chosen))
            yield torch.stack(images), torch.stack(masks)

    def augmented(self, index: int, epoch: int) -> Scene:
        reseed(SAMPLE, self.seed, epoch, index)
        image, mask = self.scenes[index]
        return self.augment(tv_tensors.Image(image), tv_tensors.Mask(mask))


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A whole image at the size that the model takes."""
    return v2.functional.resize(image, list(size), antialias=True)


def predicted(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The class of each pixel at the size of the mask: (B, classes, h, w) to (B, H, W)."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).argmax(1)


def confusion(truth: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Pixels of each true class (row) that were given each class (column), without those that have none."""
    counted = truth != IGNORED
    pairs = len(CLASSES) * truth[counted].long() + prediction[counted]
    return torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), len(CLASSES))


def scores(matrix: torch.Tensor) -> dict[str, float]:
    """Mean intersection over union in percent, over the classes that occur or were predicted; and pixel accuracy."""
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - hits
    occurring = union > 0
    miou = (hits[occurring] / union[occurring]).mean()
    return dict(miou=100 * float(miou), pixel_accuracy=100 * float(hits.sum() / matrix.sum()))


def picture(scenes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], width: int = 240) -> bytes:
    """A PNG with a row a scene: the image, the true classes and the predicted ones. Black has no class."""
    rows = []
    for image, *masks in scenes:
        height = round(width * image.shape[1] / image.shape[2])
        parts = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height))]
        for classes in masks:
            colours = Image.fromarray(PALETTE[classes.numpy()])
            parts.append(colours.resize((width, height), Image.Resampling.NEAREST))
        rows.append(np.concatenate([np.asarray(part) for part in parts], axis=1))
    file = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).quantize(128).save(file, "PNG", optimize=True)  # few colours: a small file
    return file.getvalue()
