"""Fine-tune DeiT-Tiny with finer patches, with softmax and with cheaper attention, for equal epochs or equal time.

    python examples/finer_patches.py --data-dir caltech101 --weights deit_tiny_patch16_224.safetensors --epochs 1
    python examples/finer_patches.py --data-dir caltech101 --weights deit_tiny_patch16_224.safetensors --minutes 10
    python examples/finer_patches.py --data-dir caltech101 --weights ... --patch-size 4 --epochs 0   # only the costs

The folder holds train/ and val/ with class folders. timm resamples the patch embedding and the positions of the weights
to the finer patches. A training of --minutes takes as many steps as fit into that time of training, and its learning
rate follows the share of the time that has passed; validation isn't counted. What a step costs is measured first, in
turn with softmax and in processes of its own.

Rows are appended to examples/results/finer_caltech101.csv as they come. Stop it at any time; the same command goes on.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import timm
import torch

from timm_vix._checks import check_choice
from timm_vix._device import device_name, find_device, find_dtype
from timm_vix._files import name_and_checksum, one_line
from timm_vix._names import parse_model
from timm_vix._records import Columns, append_record, check_writable, earlier_records
from timm_vix.cli import in_one_line
from timm_vix.conversion.convert import convert
from timm_vix.data.datasets import Items
from timm_vix.data.folders import find_images
from timm_vix.data.images import normaliser
from timm_vix.data.seeds import STEP, seed_of
from timm_vix.measure.job import measure_in_process
from timm_vix.mixers import MIXERS
from timm_vix.train.build import build_model
from timm_vix.train.checkpoint import Checkpoint
from timm_vix.train.finetune import evaluate, objective_of, optimizer_of, prepare_images, seed_step, start_or_resume
from timm_vix.train.finetune_settings import FinetuneSettings
from timm_vix.train.interrupt import deferred_interrupt
from timm_vix.train.loop import Loop
from timm_vix.train.settings import ABOVE_0, check_ranges

COMPARED = ["softmax", "softmax merge=0.3", "nystrom window_size=4", "linformer", "performer", "axial"]
RECIPE: dict[str, Any] = dict(lr=1e-4, warmup=0.1, weight_decay=0.05, label_smoothing=0.1, augment="light")
# rows that agree in all of these share the costs of a step
PLACE: dict[str, type] = dict(
    mixer=str, keywords=str, source=str, img_size=int, patch_size=int, batch_size=int, dtype=str
)
PLACE |= dict(device_name=str, threads=int, torch=str, timm=str)
# what was asked for: so many epochs or minutes, on how many images
BUDGET: Columns = dict(budget=str, limit=float, train_images=int, val_images=int, seed=int)
TRAINED: Columns = dict(epochs=float, steps=int, seconds=float, top1=float)
SPEEDS = ("speedup", "speedup_low", "speedup_high")
COSTS: Columns = {
    **dict(tokens=int, rounds=int, peak_memory_mib=float),
    **{f"{mode}_{name}": float for mode in ("train", "infer") for name in ("ms_an_image", *SPEEDS)},
}
COLUMNS: Columns = {**PLACE, **BUDGET, **TRAINED, **COSTS}

Row = dict[str, Any]


class Data(NamedTuple):
    """Training images, validation images and the names of their classes."""

    train: Items
    val: Items
    classes: list[str]


def first_of_each_class(items: Items, number: Optional[int]) -> Items:
    """The first ``number`` images of every class; None: all."""
    seen: Counter[int] = Counter()
    chosen = []
    for item in items:
        seen[item[1]] += 1
        if number is None or seen[item[1]] <= number:
            chosen.append(item)
    return chosen


def model_text(row: Row, softmax: bool = False) -> str:
    """``"NAME key=value ..."`` of a row's model, or of the softmax model beside it."""
    name, *own = row["source"].split()
    own.append(f"patch_size={row['patch_size']}")
    if softmax or is_softmax(row):
        return " ".join([name, *own])
    return " ".join(["vix_from_timm", f"source={name}", f"mixer={row['mixer']}", *own, row["keywords"] or ""]).strip()


def is_softmax(row: Row) -> bool:
    """Whether a row's model is the source itself."""
    return row["mixer"] == "softmax" and not row["keywords"]


def measure_costs(row: Row, device: str, rounds: int) -> Row:
    """``COSTS`` of a training step and of inference, each in turn with softmax in a process of its own.

    Raises:
        ValueError: for a model that cannot be measured.
    """
    job = {name: row[name] for name in ("img_size", "batch_size", "dtype", "threads")}
    job |= dict(model=model_text(row), baseline=model_text(row, softmax=True))
    job |= dict(device=device, rounds=rounds, seconds=0.0)
    costs: Row = {}
    for mode in ("infer", "train"):
        found = measure_in_process({**job, "mode": mode})
        if "error" in found:
            raise ValueError(f"{mode} of {job['model']} could not be measured: {found['error']}")
        costs[f"{mode}_ms_an_image"] = found["latency_p50_ms"] / row["batch_size"]
        costs |= {f"{mode}_{name}": found.get(name) for name in SPEEDS}
    costs |= {name: found[name] for name in ("tokens", "rounds", "peak_memory_mib")}  # memory of the training step
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in costs.items()}


def settings_of(row: Row, given: argparse.Namespace, device: str) -> FinetuneSettings:
    """The settings of a training, which goes on where it has a checkpoint; ``epochs`` isn't looked at."""
    name, keywords = parse_model(model_text(row, softmax=True))
    names = ("source", "mixer", "keywords", "img_size", "patch_size", "train_images", "val_images", "batch_size")
    names += ("dtype", "budget", "limit", "seed")
    text = " ".join(f"{name}={row[name]}" for name in names if row[name] is not None)
    out = Path(given.runs) / re.sub(r"[^\w.=-]+", "_", text)
    return FinetuneSettings(
        model=name,
        model_kwargs=keywords,
        checkpoint=given.weights,
        device=device,
        checkpoint_every=20,
        out=str(out),
        resume=(out / "checkpoint.pt").exists(),
        **{name: getattr(given, name) for name in ("data_dir", "img_size", "batch_size", "seed", "threads")},
        **RECIPE,
    )


def train(run: FinetuneSettings, row: Row, data: Data) -> Row:
    """Train or continue a model until its budget is spent, then validate it.

    Args:
        row: with mixer, keywords, budget and the time of a step, see ``COLUMNS``.

    Returns:
        The columns ``TRAINED``.

    Raises:
        KeyboardInterrupt: for Ctrl-C, after the step was finished and a checkpoint saved.
    """
    dtype = find_dtype(run.amp, run.device)
    torch.manual_seed(seed_of(STEP, run.seed))
    net, config = build_model(run, dtype, len(data.classes))
    if not is_softmax(row):
        convert(net, row["mixer"], **parse_model(f"{run.model} {row['keywords'] or ''}")[1])
    images, val = prepare_images(run, config, *data)
    batch_size = min(run.batch_size, len(images))
    steps, limit = len(images) // batch_size, row["limit"]
    by_time = row["budget"] == "minutes"
    # by time this is the length of the progress bar, and ends nothing
    expected = 60_000 * limit / (row["train_ms_an_image"] * batch_size) if by_time else limit * steps
    expected = max(1, round(expected))
    optimizer, scheduler = optimizer_of(net, replace(run, epochs=1), expected)
    position: Row = dict(step=0, seconds=0.0, loss=0.0)
    settings = dict(run.recorded(), images=f"{images.digest()}; {val.digest()}", amp=str(dtype))
    settings["checkpoint"] = name_and_checksum(run.checkpoint)
    settings |= {name: row[name] for name in ("mixer", "keywords", "budget", "limit")}
    checkpoint = Checkpoint(Path(run.out) / "checkpoint.pt", json.loads(json.dumps(settings)), net, optimizer, position)
    start_or_resume(checkpoint, run)
    objective = objective_of(net, run, config, len(data.classes), dtype)

    def spent() -> float:
        """The share of the budget."""
        return position["seconds"] / (60 * limit) if by_time else position["step"] / expected

    def batches() -> Iterator[Any]:
        """Batches, epoch after epoch, until the budget is spent."""
        while spent() < 1:
            epoch, step = divmod(position["step"], steps)
            for batch in images.loader(images.batches(batch_size, epoch)[step:]):
                yield batch
                if spent() >= 1:
                    return

    with deferred_interrupt() as asked:
        loop = Loop(checkpoint, run.checkpoint_every, asked, continued_by="the same command")
        net.train()
        for pixels, labels in loop.steps("training", batches(), expected):
            seed_step(run, *divmod(position["step"], steps))
            scheduler.step_update(spent() * expected)
            loss = objective(pixels, labels)
            loop.update(loss, f"lower the learning rate, {run.lr}")
            position["loss"] += loss.item()
            mean, minutes = position["loss"] / (position["step"] + 1), position["seconds"] / 60
            loop.note(f"{minutes:.1f} min, {spent():.0%} of {limit:g} {row['budget']}, loss={mean:.3f}")
        checkpoint.save()
        top1, _ = evaluate(net, val, run, dtype, normaliser(config, run.device), loop.stop_if_asked)
    epochs = round(position["step"] / steps, 3)
    return dict(epochs=epochs, steps=position["step"], seconds=round(position["seconds"], 1), top1=round(top1, 2))


def find_row(rows: list[Row], wanted: Row, names: Columns) -> Optional[Row]:
    """The first row that agrees in some columns with the one that is wanted."""
    return next((row for row in rows if all(row[name] == wanted[name] for name in names)), None)


def add_rows(rows: list[Row], wanted: Row, data: Data, given: argparse.Namespace, device: str) -> None:
    """Measure and train what is wanted; append a row of the costs, unless they are known, and one of the training."""
    run = settings_of(wanted, given, device)  # wrong settings show before anything is measured

    def add(row: Row) -> None:
        append_record(given.out, COLUMNS, row)
        rows.append(row)
        print({name: value for name, value in row.items() if value is not None}, flush=True)

    known = find_row(rows, wanted, PLACE)
    if known is None:
        costs = measure_costs(wanted, device, given.rounds)
        known = {**dict.fromkeys(COLUMNS), **wanted, **costs, "budget": "epochs", "limit": 0.0}
        add(known)
    if wanted["limit"] > 0:
        row = {**known, **wanted}
        add({**row, **train(run, row, data)})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--weights", required=True, help="of the source, .safetensors or .pth")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--epochs", type=float, help="of each training; 0 measures the costs and trains nothing")
    budget.add_argument("--minutes", type=float, help="of each training, without validation")
    parser.add_argument("--patch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--mixers", nargs="+", default=COMPARED, metavar="MIXER", help='"softmax", "NAME key=value"')
    parser.add_argument("--per-class", type=int, help="training images of each class, the first; default: all")
    parser.add_argument("--val-per-class", type=int, help="the same of validation")
    parser.add_argument("--source", default="deit_tiny_patch16_224", help="a ViT of timm, with keywords if wanted")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of timing, in turn with softmax")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", default="runs/finer", help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "finer_caltech101.csv")
    return parser.parse_args()


def check(given: argparse.Namespace) -> None:
    """Raise InputError for what of the command line is out of its range."""
    finite = ("epochs minutes", "a finite number of 0 or more", lambda value: 0 <= value < math.inf)
    sizes = ("patch_size", "1 or more", lambda values: min(values) >= 1)
    check_ranges(given, [finite, sizes, ("per_class val_per_class rounds threads", *ABOVE_0)])
    for mixer in given.mixers:
        check_choice("mixers", mixer.partition(" ")[0], tuple(MIXERS))


def run_all(given: argparse.Namespace) -> None:
    """Measure and train what has no row yet."""
    failed: list[str] = []
    check(given)
    device = find_device(given.device)
    torch.set_num_threads(given.threads)
    check_writable(given.out)
    rows, damaged = earlier_records(given.out, COLUMNS)
    if damaged:
        print(f"{given.out}: {damaged} damaged lines are ignored")
    train_items, val_items, classes = find_images(given.data_dir)
    train_items = first_of_each_class(train_items, given.per_class)
    data = Data(train_items, first_of_each_class(val_items, given.val_per_class), classes)
    shared = dict(
        **{name: getattr(given, name) for name in ("source", "img_size", "batch_size", "threads", "seed")},
        dtype=str(find_dtype("auto", device)).removeprefix("torch."),
        device_name=device_name(device),
        torch=str(torch.__version__),
        timm=timm.__version__,
        budget="epochs" if given.minutes is None else "minutes",
        limit=given.epochs if given.minutes is None else given.minutes,
        train_images=len(data.train),
        val_images=len(data.val),
    )
    for patch_size, mixer in itertools.product(given.patch_size, given.mixers):
        name, _, keywords = mixer.partition(" ")
        wanted = dict(mixer=name, keywords=keywords or None, patch_size=patch_size, **shared)
        title = f"{mixer}, patch {patch_size}, {wanted['limit']:g} {wanted['budget']}"
        if find_row(rows, wanted, {**PLACE, **BUDGET}):
            print(f"{title}: already in {given.out}")
            continue
        print(f"{title}:", flush=True)
        try:
            add_rows(rows, wanted, data, given, device)
        except (ValueError, OSError, RuntimeError) as error:  # the others may do, and the same command tries again
            print(f"error: {title}: {one_line(error)}", file=sys.stderr, flush=True)
            failed.append(title)
    if failed:
        print(f"without a row: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    in_one_line(run_all)(parse())


if __name__ == "__main__":
    main()
