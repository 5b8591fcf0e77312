"""Train softmax and efficient attention for semantic segmentation by one recipe: mIoU beside time and memory.

    python examples/segment.py --data-dir camvid --weights deit_tiny_patch16_224.safetensors
    python examples/segment.py --data-dir camvid --weights deit_tiny_patch16_224.safetensors --seconds 600
    python examples/segment.py --data-dir camvid --weights vit_small_patch14_dinov2.safetensors \\
        --model vit_small_patch14_dinov2 --patch-size 14 --img-size 350 476 --head linear

The folder is described in road_scenes.py. The backbone is timm's, in an encoder of segmentation_models_pytorch, whose
DPT is the head; its strides exclude patches of 14 pixels, for which there is --head linear. Each training appends a row
to --out, and what is there is not trained again. Stop it at any time: the same command continues.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from road_scenes import (
    CLASSES,
    IGNORED,
    Scene,
    Scenes,
    checksum_of,
    confusion,
    picture,
    predicted,
    read_scenes,
    resized,
    scores,
)
from segmenter import MIXERS, Objective, build, check_size, costs, optimizer_of
from torch import nn
from tqdm import tqdm

from timm_vix._checks import InputError, check_integer, check_number
from timm_vix._device import device_name, find_device, find_dtype, versions
from timm_vix._files import name_and_checksum, write_whole
from timm_vix._names import check_model
from timm_vix._records import append_record, check_writable, earlier_records, key_of
from timm_vix._weights import check_weights
from timm_vix.cli import in_one_line
from timm_vix.data.seeds import STEP, reseed
from timm_vix.train.checkpoint import Checkpoint
from timm_vix.train.interrupt import deferred_interrupt
from timm_vix.train.loop import Loop
from timm_vix.train.schedule import warmup_and_cosine

# what a training is, and the columns by which it is known
SETTINGS: dict[str, type] = dict(
    **dict(model=str, weights=str, mixer=str, keywords=str, img_size=str, patch_size=int, head=str),
    **dict(trained_blocks=int, images=int, data=str, budget=str, batch_size=int, lr=float, layer_decay=float),
    **dict(weight_decay=float, seed=int, dtype=str),
)
COLUMNS: dict[str, type] = SETTINGS | dict(
    **dict(tokens=int, epochs=float, train_s=float, val_images=int, miou=float, pixel_accuracy=float),
    **dict(step_ms=float, faster_training=float, peak_memory_mib=float, infer_ms=float, faster_inference=float),
    **dict(rounds=int, device_name=str, threads=int, torch=str, timm=str, timm_vix=str),
)
TICKS = 1000  # of the schedule of the learning rate in a training, whether its steps or its seconds are given


def train(net: nn.Module, scenes: Scenes, settings: dict[str, Any], run: argparse.Namespace, folder: Path) -> dict:
    """Train, from the last checkpoint if there is one; return the position at the end: steps and seconds."""
    optimizer, objective = optimizer_of(net, run), Objective(net, run)
    scheduler = warmup_and_cosine(optimizer, run.lr, TICKS, TICKS // 10)
    position: dict[str, Any] = dict(step=0, seconds=0.0)
    checkpoint = Checkpoint(folder / "checkpoint.pt", settings, net, optimizer, position)
    if checkpoint.path.exists():
        checkpoint.restore(checkpoint.read())
    total = math.ceil(run.epochs * scenes.per_epoch) if run.seconds is None else None  # None: the time decides

    def batches() -> Iterator[Scene]:
        for batch in scenes.batches(position["step"], total):
            if run.seconds and position["seconds"] >= run.seconds:
                return
            yield batch

    net.train()
    if run.trained_blocks == 0:
        net.encoder.eval()
    with deferred_interrupt() as asked:
        loop = Loop(checkpoint, run.checkpoint_every, asked, continued_by="the same command")
        for pixels, classes in loop.steps("train", batches(), total):
            step, seconds = position["step"], position["seconds"]
            reseed(STEP, run.seed, step)
            scheduler.step_update(round(TICKS * (seconds / run.seconds if total is None else (step + 0.5) / total)))
            loss = objective.loss(pixels, classes)
            loop.update(loss, f"lower lr={run.lr} or set amp=off")
            loop.note(f"loss={loss.item():.3f}" + (f", {seconds:.0f} of {run.seconds:g} s" if run.seconds else ""))
    checkpoint.save()
    return position


@torch.inference_mode()
def evaluate(net: nn.Module, scenes: list[Scene], run: argparse.Namespace) -> tuple[dict, list[torch.Tensor]]:
    """The scores over all scenes at their own size, from one confusion matrix; and the predicted classes of each."""
    objective, predictions = Objective(net.eval(), run), []
    matrix = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for image, truth in tqdm(scenes, "validate", leave=False, disable=None):
        prediction = predicted(objective.logits(resized(image, run.img_size).unsqueeze(0)), truth.shape)[0].cpu()
        matrix += confusion(truth, prediction)
        predictions.append(prediction.byte())
    return scores(matrix), predictions


def settings_of(run: argparse.Namespace, train: list[Scene], val: list[Scene]) -> dict[str, Any]:
    """The columns by which a row is known, but for its mixer; ``data`` has checksums of both splits."""
    height, width = run.img_size
    return dict(
        model=run.model,
        weights=name_and_checksum(run.weights) if run.weights else None,
        img_size=f"{height}x{width}",
        head=run.head,
        images=len(train),
        data=f"{checksum_of(train)} {checksum_of(val)}",
        budget=f"{run.epochs:g} epoch{'s' * (run.epochs != 1)}" if run.seconds is None else f"{run.seconds:g} s",
        dtype=str(run.dtype).removeprefix("torch."),
        **{name: getattr(run, name) for name in ("patch_size", "trained_blocks", "batch_size", "lr", "layer_decay")},
        **{name: getattr(run, name) for name in ("weight_decay", "seed")},
    )


def digest_of(settings: dict[str, Any]) -> str:
    """A few letters that differ between settings, so that the trainings of each have folders of their own."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def run_all(run: argparse.Namespace) -> None:
    """Train each model that has no row yet."""
    check_arguments(run)
    run.device = find_device(run.device)
    run.dtype = find_dtype(run.amp, run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    check_writable(run.out)
    train_scenes, val_scenes = (read_scenes(run.data_dir / split, run.count) for split in ("train", "val"))
    for split, part in (("train", train_scenes), ("val", val_scenes)):
        if not any((mask < IGNORED).any() for _, mask in part):
            raise InputError(f"{run.data_dir / split}: no mask has a pixel of a class, 0 to {IGNORED - 1}")
    scenes = Scenes(train_scenes, run.img_size, run.batch_size, run.seed)
    rows, _ = earlier_records(run.out, COLUMNS)
    known = {key_of(row, SETTINGS) for row in rows}
    common = settings_of(run, train_scenes, val_scenes)
    for mixer in run.mixers:
        keywords = " ".join(f"{name}={value}" for name, value in MIXERS[mixer].items()) or None
        settings = dict(common, mixer=mixer, keywords=keywords)
        if key_of(settings, SETTINGS) in known:
            print(f"{mixer}: already in {run.out}")
            continue
        folder = run.runs / f"{run.model}_{settings['budget'].replace(' ', '_')}_{digest_of(common)}_{mixer}"
        print(f"{mixer}: {folder}", flush=True)
        net = build(run, mixer)
        position = train(net, scenes, settings, run, folder)
        found, predictions = evaluate(net, val_scenes, run)
        shown = range(0, len(val_scenes), math.ceil(len(val_scenes) / 3))
        write_whole(folder / "predictions.png", picture([(*val_scenes[i], predictions[i]) for i in shown]))
        backbone = net.encoder.model
        row = dict(
            **settings,
            tokens=backbone.patch_embed.num_patches + backbone.num_prefix_tokens,
            epochs=round(position["step"] / scenes.per_epoch, 2),
            train_s=round(position["seconds"], 1),
            val_images=len(val_scenes),
            **{name: round(value, 2) for name, value in found.items()},
            **costs(run, mixer),
            **dict(device_name=device_name(run.device), threads=torch.get_num_threads(), **versions()),
        )
        append_record(run.out, COLUMNS, row)
        print(", ".join(f"{name}={row.get(name)}" for name in ("mixer", "miou", "train_s", "step_ms")), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--weights", type=Path, help="of the backbone; none: random weights")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a ViT of timm's")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="NAME")
    parser.add_argument("--head", choices=("dpt", "linear"), default="dpt")
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, nargs=2, default=[352, 480], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--count", type=int, help="only so many images of each split")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seconds", type=float, help="train as long as this instead, for equal wall-clock time")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the head")
    parser.add_argument("--layer-decay", type=float, default=0.75, help="of the rate, from a block to the one before")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--trained-blocks", type=int, help="train the last ones only; 0: a frozen backbone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--amp", choices=("auto", "bfloat16", "off"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="of timing, in turn with softmax")
    parser.add_argument("--checkpoint-every", type=int, default=20, help="steps")
    parser.add_argument("--runs", type=Path, default=Path("runs/segment"), help="folder of checkpoints and pictures")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "segment_camvid.csv")
    return parser.parse_args()


def check_arguments(run: argparse.Namespace) -> None:
    check_model(run.model)
    check_weights("weights", None if run.weights is None else str(run.weights))
    for name in ("batch_size", "patch_size", "rounds", "checkpoint_every", "count", "threads"):
        if getattr(run, name) is not None:
            check_integer(name, getattr(run, name), 1)
    for side in run.img_size:
        check_integer("img_size", side, 1)
    check_size(run)
    check_integer("seed", run.seed, 0)
    for name in ("epochs", "seconds"):
        if getattr(run, name) is not None:
            check_number(name, getattr(run, name), 0.01)
    for name in ("lr", "layer_decay", "weight_decay"):
        check_number(name, getattr(run, name), 0.0)


def main() -> None:
    in_one_line(run_all)(parse_arguments())


if __name__ == "__main__":
    main()
