"""What folding DeiT-Tiny's norms keeps and saves: top-1 on labelled photographs and time, in float and int8.

    python examples/fold_norms.py --images nips17_dev --weights deit_tiny_patch16_224.safetensors \\
        --data-dir caltech101/train --steps 0 400

The layer norms become batch norms that are fitted to them. For each number of steps the model then learns, with these
statistics as they are, to predict what it predicted before, and the norms are folded into the next linear layers. With
--fade the layer norms fade while the model learns instead. No labels are needed for that. Each row is appended to
examples/results/fold_norms.csv, timed in turn with the original in eager mode; stopped at any time, the same command
continues. int8 is ONNX Runtime's, see ``timm-vix export``.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

import timm_vix
from timm_vix._checks import check_integer, check_number
from timm_vix._device import device_name, versions
from timm_vix._files import name_and_checksum
from timm_vix._records import Columns, append_record, check_writable, earlier_records, key_of
from timm_vix.cli import in_one_line
from timm_vix.conversion.handover import HandoverSchedule, finish_handover
from timm_vix.data.folders import find_unlabelled, labelled_folder, spread
from timm_vix.data.images import Images, normaliser, transforms
from timm_vix.deploy.check import accuracy, latency, open_labelled, read_calibration
from timm_vix.deploy.export import export_model
from timm_vix.train.checkpoint import Checkpoint
from timm_vix.train.interrupt import deferred_interrupt
from timm_vix.train.loop import Loop
from timm_vix.train.losses import Distillation
from timm_vix.train.teacher import build_teacher
from timm_vix.train.transfer_start import batches

SOURCE = "deit_tiny_patch16_224"
FITTED = 48  # images to which the batch norms are fitted
BATCHES = (1, 8)
# what a row is, and what it tells
KEY: Columns = dict(norms=str, steps=int, lr=float, batch_size=int, format=str, dtype=str, images=int, device_name=str)
KEY |= dict(threads=int)
COLUMNS: Columns = {
    **KEY,
    **dict(top1=float, agreement=float, size_mb=float, train_s=float),
    **{f"{name}_{batch}": float for batch in BATCHES for name in ("ms", "faster")},
    **dict(torch=str, timm=str, timm_vix=str),
}
FORMATS = (("eager", "float32"), ("onnx", "float32"), ("onnx", "int8"))


def times_beside(original: nn.Module, model: Any, config: dict[str, Any], rounds: int) -> dict[str, float]:
    """Milliseconds of a model for each batch, and how many times as fast as the original it is, timed in turn."""
    found = {}
    for batch in BATCHES:
        (times,) = latency(model, [original], torch.randn(batch, *config["input_size"]), rounds)
        found[f"ms_{batch}"] = round(times["latency_p50_ms"], 2)
        found[f"faster_{batch}"] = round(times["speedup"], 3)
    return found


def train(student: nn.Module, teacher: nn.Module, schedule: HandoverSchedule, config: dict, run: Any) -> float:
    """Let the student learn what the teacher predicts; return the seconds it took.

    With ``run.fade`` the schedule's layer norms fade meanwhile. Without, the statistics of its batch norms stay.
    """
    resize, augmented, _ = transforms(config, "light", 0.5)
    images = Images(find_unlabelled(run.data_dir), ["image"], config["input_size"][0], resize, augmented, 0, lazy=True)
    normalise, losses = normaliser(config, "cpu"), Distillation(teacher, student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=run.lr, weight_decay=0.0)
    scheduler = CosineLRScheduler(optimizer, schedule.steps, warmup_t=schedule.steps // 20, t_in_epochs=False)
    position: dict[str, Any] = dict(step=0, seconds=0.0)
    settings = dict(steps=schedule.steps, lr=run.lr, batch_size=run.batch_size, images=images.digest(), fade=run.fade)
    settings["weights"] = name_and_checksum(run.weights)
    name = f"{schedule.steps}_lr={run.lr:g}_batch={run.batch_size}{'_faded' * run.fade}.pt"
    checkpoint = Checkpoint(run.runs / name, settings, student, optimizer, position)
    if checkpoint.path.exists():
        checkpoint.restore(checkpoint.read())
        schedule.move_to(position["step"])
    keys = batches(images, run.batch_size, schedule.steps, 1)
    student.train(run.fade)
    with deferred_interrupt() as asked:
        loop = Loop(checkpoint, 50, asked, continued_by="the same command")
        for pixels, _ in loop.steps("training", images.loader(keys[position["step"] :]), schedule.steps):
            scheduler.step_update(position["step"])
            values = losses(normalise(pixels))
            loop.update(values.sum(), f"lower lr={run.lr}")
            schedule.step()
            loop.note(" ".join(f"{value:.3f}" for value in values.tolist()))
    checkpoint.save()
    student.eval()
    return position["seconds"]


def folded(teacher: nn.Module, config: dict[str, Any], steps: int, run: Any) -> tuple[nn.Module, float]:
    """A copy of the teacher whose norms are folded, after so many steps of training, and their seconds."""
    student, seconds = copy.deepcopy(teacher).requires_grad_(True), 0.0
    fitted_to = read_calibration(run.data_dir, FITTED, config)
    schedule = HandoverSchedule(max(steps, 1))
    timm_vix.replace_norms(student, fitted_to, schedule if steps and run.fade else None)
    if steps:
        seconds = train(student, teacher, schedule, config, run)
        if run.fade:
            finish_handover(student)
    timm_vix.fold_norms(student)
    return student.requires_grad_(False), seconds


def rows_of(
    model: nn.Module, teacher: nn.Module, config: dict[str, Any], jobs: list[dict], run: Any
) -> Iterator[dict[str, Any]]:
    """Accuracy and time of one model in each format, as they come."""
    photographs = open_labelled(run.images, teacher, run.count, config)
    calibration = read_calibration(run.data_dir, 100, config)
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            runner, size = model, sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
            if job["format"] != "eager":
                out = Path(folder) / f"{job['dtype']}.onnx"
                int8 = calibration if job["dtype"] == "int8" else None
                runner, written = export_model(
                    model, config, job["format"], job["dtype"], out, int8, threads=run.threads
                )
                size = written["size_mb"]
            scores = accuracy(dict(original=teacher, this=runner), photographs, config)
            row = dict(job, top1=round(scores["top1"]["this"], 2), agreement=round(scores["agreement"]["this"], 2))
            row["size_mb"] = round(size, 2)
            yield row | times_beside(teacher, runner, config, run.rounds)


def run_all(run: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    for name in ("batch_size", "count", "rounds", "threads"):
        check_integer(name, getattr(run, name), 1)
    for steps in run.steps:
        check_integer("steps", steps, 0)
    check_number("lr", run.lr, 0.0)
    torch.set_num_threads(run.threads)
    run.runs.mkdir(parents=True, exist_ok=True)
    check_writable(run.out)
    known, _ = earlier_records(run.out, COLUMNS)
    done = {key_of(row, KEY) for row in known}
    teacher, config = build_teacher(SOURCE, weights=run.weights)
    images = len(spread(labelled_folder(run.images, teacher)[0], run.count))
    shared = dict(images=images, device_name=device_name("cpu"), threads=run.threads)
    trained = [dict(norms="layer", steps=0, lr=None, batch_size=None)]
    trained += [
        dict(
            norms="faded, folded" if n and run.fade else "folded",
            steps=n,
            lr=run.lr if n else None,
            batch_size=run.batch_size if n else None,
        )
        for n in run.steps
    ]
    for training in trained:
        jobs = [{**training, "format": to, "dtype": dtype, **shared} for to, dtype in FORMATS]
        jobs = [job for job in jobs if key_of(job, KEY) not in done]
        if not jobs:
            continue
        model, seconds = teacher, 0.0
        if training["norms"] != "layer":
            model, seconds = folded(teacher, config, training["steps"], run)
        for row in rows_of(model, teacher, config, jobs, run):
            append_record(run.out, COLUMNS, row | dict(train_s=round(seconds, 1), **versions()))
            print({name: value for name, value in row.items() if value is not None}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="labelled photographs: labels.csv and images/")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-dir", required=True, type=Path, help="other images, to fit, train and calibrate on")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 400], help="of training; 0: none")
    parser.add_argument("--fade", action="store_true", help="let the layer norms fade while the model learns")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=1000, help="photographs")
    parser.add_argument("--rounds", type=int, default=25, help="least number of rounds of a latency")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/fold_norms"), help="folder of checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fold_norms.csv")
    in_one_line(run_all)(parser.parse_args())


if __name__ == "__main__":
    main()
