"""How faithful the patch tokens of a converted backbone are to softmax's, and how much faster it is.

    python examples/dense_features.py --images IMAGES --weights vit_small_patch14_dinov2.safetensors \\
        --img-size 518 1036 --transferred nystrom=runs/dino/hub

The folder holds images at any depth; no labels are needed. Cosine and relative error are those of the normalised patch
tokens of ViT-S/14 (DINOv2). Rows are appended to examples/results/dense_features.csv as they come; what is there is not
measured again.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from convert_deit import CONVERTED, COSTS, HUB, KEY, gigaflops, kept_mib, latency, named_folder
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn
from tqdm import tqdm

import timm_vix
from timm_vix._device import device_name
from timm_vix._records import Columns, append_record, check_writable, earlier_records, key_of
from timm_vix._weights import check_weights
from timm_vix.cli import in_one_line
from timm_vix.data.decoding import as_shown
from timm_vix.data.folders import find_unlabelled
from timm_vix.train.teacher import build_teacher

SOURCE = "vit_small_patch14_dinov2"
COLUMNS: Columns = {**CONVERTED, **dict(cosine=float, relative_error=float), **COSTS}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "nystrom": dict(mixer="nystrom"),
    "nystrom, 4x4 windows": dict(mixer="nystrom", window_size=4),
    "nystrom, 144 landmarks, 4x4 windows": dict(mixer="nystrom", num_landmarks=144, window_size=4),
    "nystrom, 4x4 windows, last 6": dict(mixer="nystrom", window_size=4, layers="last-6"),
    "linformer, 4x4 windows": dict(mixer="linformer", window_size=4),
    "performer": dict(mixer="performer"),
    "axial": dict(mixer="axial"),
    "axial, last 6": dict(mixer="axial", layers="last-6"),
    "softmax, merged to 50 %": dict(mixer="softmax", merge=0.5),
    "softmax, merged to 30 %": dict(mixer="softmax", merge=0.3),
    "softmax, merged to 15 %": dict(mixer="softmax", merge=0.15),
    "softmax, half of the keys": dict(mixer="softmax", merge_keys=0.5),
}


def patch_tokens(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The normalised patch tokens of images, (B, H·W, C), in float32."""
    return model.forward_features(image)[:, model.num_prefix_tokens :].float()


@torch.inference_mode()
def all_tokens(model: nn.Module, images: list[torch.Tensor], title: str) -> torch.Tensor:
    """The patch tokens of all images, (images, H·W, C)."""
    return torch.cat(
        [patch_tokens(model, image.unsqueeze(0)) for image in tqdm(images, title, leave=False, disable=None)]
    )


def fidelity(tokens: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of patch tokens to softmax's, and their relative error."""
    cosine = torch.cosine_similarity(tokens, wanted, dim=2).mean()
    return float(cosine), float((tokens - wanted).norm() / wanted.norm())


def measure_all(given: argparse.Namespace) -> None:
    """Measure each model that has no row yet."""
    check_weights("weights", given.weights)
    check_writable(given.out)
    known = {key_of(row, KEY) for row in earlier_records(given.out, COLUMNS)[0]}
    if given.threads:
        torch.set_num_threads(given.threads)
    for size in given.img_size:

        def softmax(size: int = size) -> nn.Module:
            return build_teacher(SOURCE, dict(num_classes=0), given.weights, size)[0].requires_grad_(True)

        def converted(mixer: str, layers: Any = "all", size: int = size, **keywords: Any) -> nn.Module:
            model = softmax(size)
            timm_vix.convert(model, mixer, layers, **keywords)
            return model

        def loaded(folder: str, size: int = size) -> nn.Module:
            return timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()

        jobs: list[tuple[str, str, Callable[[], nn.Module]]] = [("softmax", "none", softmax)]
        jobs += [(name, "none", lambda o=options: converted(**o)) for name, options in CONVERSIONS.items()]
        jobs += [(n, "transfer", lambda f=folder: loaded(f)) for n, folder in given.transferred]
        paths = [path for path, _ in find_unlabelled(given.images)[: given.count]]
        jobs = [job for job in jobs if (job[0], job[1], size, len(paths)) not in known]
        if not jobs:
            print(f"{size} px: already in {given.out}", flush=True)
            continue
        baseline = softmax()
        config = resolve_input_data_config(baseline, dict(img_size=size))
        transform = create_transform(**{**config, "crop_pct": 1.0, "crop_mode": "squash"})
        images = []
        for path in paths:
            with Image.open(path) as image:
                images.append(transform(as_shown(image, "RGB")))
        wanted = all_tokens(baseline, images, f"softmax, {size} px")
        for name, training, build in jobs:
            model = build()
            cosine, error = fidelity(all_tokens(model, images, f"{name}, {size} px"), wanted)
            milliseconds, ratio = latency(model, baseline, images[0].unsqueeze(0), given.rounds)
            row = dict(
                model=name,
                training=training,
                img_size=size,
                tokens=baseline.patch_embed.num_patches + baseline.num_prefix_tokens,
                images=len(images),
                cosine=round(cosine, 4),
                relative_error=round(error, 4),
                gflops=round(gigaflops(model, images[0].unsqueeze(0)), 2),
                latency_ms=round(milliseconds, 1),
                faster_than_softmax=round(ratio, 2),
                gradient_memory_mib=round(kept_mib(model, images[0].unsqueeze(0).clone()), 1),
                device_name=device_name("cpu"),
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                timm=timm.__version__,
            )
            append_record(given.out, COLUMNS, row)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--transferred", nargs="*", default=[], type=named_folder, metavar="NAME=FOLDER", help=HUB)
    parser.add_argument("--img-size", type=int, nargs="+", default=[518, 1036])
    parser.add_argument("--count", type=int, default=50, help="images; the first ones")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, in turn with softmax")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dense_features.csv")
    in_one_line(measure_all)(parser.parse_args())


if __name__ == "__main__":
    main()
