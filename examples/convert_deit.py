"""What conversion keeps of DeiT-Tiny, and what it saves: top-1 on labelled photographs, operations, time and memory.

    python examples/convert_deit.py --images nips17_dev --weights deit_tiny_patch16_224.safetensors \\
        --transferred nystrom=runs/nystrom/hub linformer=runs/linformer/hub --plan examples/results/plan_photos_224.json

The folder holds labels.csv (file, imagenet_class) and images/. Rows are appended to
examples/results/convert_deit_tiny.csv as they come; what is there is not measured again. With --again time and memory
of what is there are, and of two rows of one model the last counts. With --deltas each transferred model is also written
there as NAME/delta.safetensors, its attention weights in bfloat16, with a card of what the rounded weights predict.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn
from tqdm import tqdm

import timm_vix
from timm_vix._checks import InputError
from timm_vix._device import device_name
from timm_vix._files import write_whole
from timm_vix._records import Columns, append_record, check_writable, earlier_records, key_of
from timm_vix._weights import check_weights
from timm_vix.cli import in_one_line
from timm_vix.data.decoding import as_shown
from timm_vix.data.folders import read_labels
from timm_vix.deploy.shipping import save_transferred
from timm_vix.measure.flops import count_flops
from timm_vix.measure.job import time_interleaved
from timm_vix.measure.statistics import compare_times
from timm_vix.train.hub import delta_card
from timm_vix.train.teacher import build_teacher

SOURCE = "deit_tiny_patch16_224"
# what a row is known by
KEY = ("model", "training", "img_size", "images")
# a dense_features.py row has these columns, too
CONVERTED: Columns = dict(model=str, training=str, img_size=int, tokens=int, images=int)
COSTS: Columns = dict(
    gflops=float,
    latency_ms=float,
    faster_than_softmax=float,
    gradient_memory_mib=float,
    device_name=str,
    threads=int,
    torch=str,
    timm=str,
)
COLUMNS: Columns = {**CONVERTED, **dict(top1=float, relative=float, agreement=float), **COSTS}
HUB = "the folder hub/ of a run of timm-vix transfer, and a name for its rows"
WINDOWS = dict(window_size=2)
UNTRAINED: dict[str, dict[str, Any]] = {
    "nystrom, last 6": dict(mixer="nystrom", layers="last-6", num_landmarks=49),
    "nystrom": dict(mixer="nystrom", num_landmarks=49),
    "nystrom, 64 landmarks": dict(mixer="nystrom", num_landmarks=64),
    "nystrom, 2x2 windows": dict(mixer="nystrom", num_landmarks=49, **WINDOWS),
    "linformer": dict(mixer="linformer", num_proj_tokens=49),
    "linformer, 2x2 windows": dict(mixer="linformer", num_proj_tokens=49, **WINDOWS),
    "nystrom, 4x4 windows": dict(mixer="nystrom", num_landmarks=49, window_size=4),
    "linformer, 4x4 windows": dict(mixer="linformer", num_proj_tokens=49, window_size=4),
    "performer, 256 features": dict(mixer="performer", num_features=256),
    "axial": dict(mixer="axial"),
    "axial, last 6": dict(mixer="axial", layers="last-6"),
    "axial, strips of 1": dict(mixer="axial", strip_width=1),
    "axial, strips of 4": dict(mixer="axial", strip_width=4),
    "axial, columns first": dict(mixer="axial", first="columns"),
    "atrous": dict(mixer="atrous"),
    "windows of 14x14, last 4 softmax": dict(mixer="atrous", layers="first-8", dilations=[1], window_size=14),
    "latent": dict(mixer="latent"),
    "retention": dict(mixer="retention"),
    "retention, last 6": dict(mixer="retention", layers="last-6"),
    "gpsa": dict(mixer="gpsa"),
    "softmax, half of the keys": dict(mixer="softmax", merge_keys=0.5),
    "softmax, merged to 50 %": dict(mixer="softmax", merge=0.5),
    "softmax, merged to 30 %": dict(mixer="softmax", merge=0.3),
    "softmax, merged to 15 %": dict(mixer="softmax", merge=0.15),
    "softmax, scaled logits": dict(mixer="softmax", scale_logits="log"),
    "softmax, merged to 15 %, scaled logits": dict(mixer="softmax", merge=0.15, scale_logits="log"),
    "axial, scaled logits": dict(mixer="axial", scale_logits="log"),
    "nystrom, 4x4 windows, scaled logits": dict(mixer="nystrom", num_landmarks=49, window_size=4, scale_logits="log"),
}


def softmax(weights: str, img_size: int) -> nn.Module:
    return build_teacher(SOURCE, weights=weights, img_size=img_size)[0].requires_grad_(True)


def read_images(folder: Path, count: int, transform: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` photographs with their labels."""
    items = read_labels(folder, 1000)[0][:count]
    images = []
    for path, _ in tqdm(items, "decode", leave=False, disable=None):
        with Image.open(path) as image:
            images.append(transform(as_shown(image, "RGB")))
    return torch.stack(images), torch.tensor([label for _, label in items])


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, title: str) -> torch.Tensor:
    parts = tqdm(images.split(20), title, leave=False, disable=None)
    return torch.cat([model(part).argmax(1) for part in parts])


@torch.no_grad()
def gigaflops(model: nn.Module, image: torch.Tensor) -> float:
    return count_flops(lambda: model(image)) / 1e9


def kept_mib(model: nn.Module, image: torch.Tensor) -> float:
    """Memory of the tensors that one image's gradient needs besides the weights, each counted once."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(image)  # alive, so that no storage is given out twice
    return sum(kept.values()) / 2**20 if y.requires_grad else 0.0


@torch.inference_mode()
def latency(model: nn.Module, baseline: nn.Module, image: torch.Tensor, rounds: int = 15) -> tuple[float, float]:
    """Median time of one image in ms, and of the ratio baseline / model, timed in turn."""
    job = dict(device="cpu", rounds=rounds, seconds=0)
    times = time_interleaved([lambda: model(image), lambda: baseline(image)], job)
    found = compare_times(*times.T)
    return found["latency_p50_ms"], found["speedup"]


def costs(model: nn.Module, baseline: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    milliseconds, ratio = latency(model, baseline, image)
    return dict(
        gflops=round(gigaflops(model, image), 3),
        latency_ms=round(milliseconds, 1),
        faster_than_softmax=round(ratio, 2),
        gradient_memory_mib=round(kept_mib(model, image), 1),
        device_name=device_name("cpu"),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
    )


def write_delta(
    hub: str, folder: Path, weights: str, images: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor
) -> None:
    """Save a transferred model as a delta, with a card of what it predicts; ``reference`` is what softmax predicts."""
    with TemporaryDirectory() as temporary:
        saved = Path(temporary) / "delta.safetensors"
        model, keywords = save_transferred(hub, saved, weights)
        content = saved.read_bytes()
    predicted = predict(model, images, folder.name)
    right, before, same = (
        f"{100 * float(hits.float().mean()):.1f} % of {len(images)} photographs"
        for hits in (predicted == labels, reference == labels, predicted == reference)
    )
    figures = {"top-1": right, "top-1 of the original": before, "predicts what the original predicts": same}
    megabytes = len(content) / 1e6
    (folder / "README.md").unlink(missing_ok=True)  # no card stands beside weights that it doesn't describe
    write_whole(folder / "delta.safetensors", content)
    write_whole(folder / "README.md", f"{delta_card(keywords, megabytes, figures)}\n".encode())
    print(f"{folder}: {megabytes:.2f} MB, top-1 {right}", flush=True)


def named_folder(text: str) -> tuple[str, str]:
    """The two parts of NAME=FOLDER; the name may hold a "="."""
    name, _, folder = text.rpartition("=")
    if not name or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a folder of timm-vix transfer")
    return name, folder


def measure_all(given: argparse.Namespace) -> None:
    """Measure each model that has no row yet, or with --again time and memory of those that have one."""
    check_weights("weights", given.weights)
    check_writable(given.out)
    rows = {key_of(row, KEY): row for row in earlier_records(given.out, COLUMNS)[0]}
    if given.threads:
        torch.set_num_threads(given.threads)
    size = given.img_size
    baseline = softmax(given.weights, size)
    config = resolve_input_data_config(baseline, dict(img_size=size))
    images, labels = read_images(given.images, given.count, create_transform(**config))

    def converted(mixer: Optional[str] = None, layers: Any = "all", **options: Any) -> nn.Module:
        model = softmax(given.weights, size)
        timm_vix.convert(model, mixer, layers, **options)
        return model

    def loaded(folder: str) -> nn.Module:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()

    jobs: list[tuple[str, str, Callable[[], nn.Module]]] = [("softmax", "none", lambda: baseline)]
    untrained = {name: UNTRAINED[name] for name in given.models or UNTRAINED}
    jobs += [(name, "none", lambda o=options: converted(**o)) for name, options in untrained.items()]
    jobs += [(name, "transfer", lambda f=folder: loaded(f)) for name, folder in given.transferred]
    if given.plan:
        jobs.append((f"plan ({given.plan.stem})", "none", lambda: converted(layers=str(given.plan))))
    # with --again no accuracy is wanted
    reference = labels if given.again and not given.deltas else predict(baseline, images, "softmax")
    accuracy = 100 * float((reference == labels).float().mean())
    if accuracy < 5:  # a model that is lost at this size is still far above chance
        raise InputError(f"{SOURCE} itself is right on {accuracy:.1f} % of {given.images}: other labels")
    image = images[:1].clone()  # a slice would keep all images for the gradient
    if given.deltas:
        for name, folder in given.transferred:
            write_delta(folder, given.deltas / name, given.weights, images, labels, reference)
    for name, training, build in jobs:
        row = dict(model=name, training=training, img_size=size, images=len(images))
        known = rows.get(key_of(row, KEY))
        if bool(known) != given.again:
            print(f"{name}, {training}: {'already' if known else 'not yet'} in {given.out}", flush=True)
            continue
        model = build()
        if known:
            row = known
        else:
            predicted = predict(model, images, name)
            top1 = 100 * float((predicted == labels).float().mean())
            row |= dict(
                tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
                top1=round(top1, 2),
                relative=round(100 * top1 / accuracy, 1),
                agreement=round(100 * float((predicted == reference).float().mean()), 1),
            )
        row |= costs(model, baseline, image)
        append_record(given.out, COLUMNS, row)
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--transferred", nargs="*", default=[], type=named_folder, metavar="NAME=FOLDER", help=HUB)
    parser.add_argument("--deltas", type=Path, metavar="DIR", help="save the transferred models there as deltas")
    parser.add_argument("--plan", type=Path, help="what timm-vix plan wrote")
    parser.add_argument("--models", nargs="+", choices=UNTRAINED, metavar="NAME", help="only these, untrained")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true", help="append what has a row, its time and memory measured anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert_deit_tiny.csv")
    given = parser.parse_args()
    if given.again:  # which begins with the first row
        in_one_line(measure_all, "interrupted")(given)
    else:
        in_one_line(measure_all)(given)


if __name__ == "__main__":
    main()
