"""Train several models on one image folder by one recipe and several seeds, and measure what each costs and scores.

Each run is ``finetune`` in a process of its own: one that fails is a row with its reason, one that was stopped
continues where it was, one that is finished is not repeated. What a model costs is measured as by ``timm-vix cost``.

A run is identified by its images, model, initial weights, recipe and seed. It may be continued with another number of
threads or on another device. Its times are then those of the epochs that ran on the last device.
"""

import argparse
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional, Union

import torch

from .._checks import InputError, check_at_most_one, positive
from .._device import device_name, find_device, find_dtype, versions
from .._names import parse_model
from .._records import Columns, Record, aligned, append_record, check_writable, earlier_records, grouped, key_of
from ..data.datasets import as_folder
from ..data.folders import find_images, name_of
from ..measure.job import measure_in_process
from ..measure.process import call_in_process
from ..train.finetune_settings import FinetuneSettings
from ..train.settings import check_keywords_are_plain, description
from .baselines import baseline_of
from .cost import round_off
from .runs import Run, start_of, with_checksum

COLUMNS: Columns = dict(
    model=str,
    start=str,
    seed=int,
    dataset=str,
    top1=float,
    top5=float,
    epochs=int,
    train_s_per_epoch=float,
    infer_s_per_epoch=float,
    params_m=float,
    gflops=float,
    latency_p50_ms=float,
    step_p50_ms=float,
    peak_memory_infer_mib=float,
    peak_memory_train_mib=float,
    speedup_infer=float,
    speedup_train=float,
    baseline=str,
    img_size=int,
    batch_size=int,
    recipe=str,
    dtype=str,
    device=str,
    device_name=str,
    threads=int,
    torch=str,
    timm=str,
    timm_vix=str,
    error=str,
)
COSTS = (
    *("params_m", "gflops", "latency_p50_ms", "step_p50_ms", "peak_memory_infer_mib", "peak_memory_train_mib"),
    *("speedup_infer", "speedup_train", "baseline"),
)
MEANS = ("top1", "top5", "train_s_per_epoch", "infer_s_per_epoch", *COSTS[:-1])
# where costs are measured; with other values they can't be averaged
MACHINE = ("device", "device_name", "threads", "torch", "timm")
# keywords of ``finetune`` that make the recipe, and those that don't change a run
RECIPE: dict[str, type] = dict(
    img_size=int,
    batch_size=int,
    epochs=int,
    lr=float,
    warmup=float,
    weight_decay=float,
    layer_decay=float,
    drop_path=float,
    mixup=float,
    label_smoothing=float,
    augment=str,
    flip=float,
    amp=str,
)


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Run ``finetune`` with these keywords, and return what a row takes from it."""
    from ..train.finetune import finetune

    out = Path(settings["out"])
    started = (out / "checkpoint.pt").exists()
    _, history = finetune(**settings, resume=started)
    last = history[-1]
    here = [row for row in history if (row["device"], row["threads"]) == (last["device"], last["threads"])]
    timed = [row for row in here if "train_seconds" in row]  # not in epochs of an earlier version
    return dict(
        top1=last["top1"],
        top5=last["top5"],
        epochs=last["epoch"],
        train_s_per_epoch=median([row["train_seconds"] for row in timed]),
        infer_s_per_epoch=median([row["seconds"] - row["train_seconds"] for row in timed]),
        img_size=last["img_size"],
        batch_size=last["batch_size"],
        dtype=last["dtype"],
        threads=last["threads"],
    )


def median(values: list[float]) -> Optional[float]:
    """The median; None of no values."""
    return statistics.median(values) if values else None


def costs_of(model: str, num_classes: int, at: dict[str, Any]) -> dict[str, Any]:
    """What one image in inference and one batch in training cost; a failure is printed and leaves cells empty."""
    baseline = baseline_of(model)
    job = {**at, "model": f"{model} num_classes={num_classes}", "baseline": f"{baseline} num_classes={num_classes}"}
    infer = measure_in_process({**job, "mode": "infer", "batch_size": 1})
    step = measure_in_process({**job, "mode": "train"})
    for what, result in (("inference", infer), ("training", step)):
        if "error" in result:
            print(f"{model}: its cost in {what} could not be measured: {result['error']}", flush=True)
        elif result.get("no_baseline"):
            print(f"{baseline} could not be timed beside {model} in {what}: {result['no_baseline']}", flush=True)
    return dict(
        baseline=baseline,
        params_m=infer.get("params_m"),
        gflops=infer.get("gflops"),
        latency_p50_ms=infer.get("latency_p50_ms"),
        step_p50_ms=step.get("latency_p50_ms"),
        peak_memory_infer_mib=infer.get("peak_memory_mib"),
        peak_memory_train_mib=step.get("peak_memory_mib"),
        speedup_infer=infer.get("speedup"),
        speedup_train=step.get("speedup"),
    )


def compare(
    models: list[tuple[str, Union[str, bool]]],
    seeds: list[int],
    recipe: dict[str, Any],
    where: dict[str, Any],
    path: Path,
    runs: Path,
) -> list[Record]:
    """Train what ``path`` has no good row of, append a row for each run, and return the rows of all.

    Args:
        models: "NAME key=value ...", and the file of its initial weights; True: those that timm knows for the name;
            False: from scratch, or those of the folder or the place of the Hub that the name is.
        recipe: Keywords of ``finetune``, the same for all.
        where: Its ``data_dir``, ``data_root``, ``val_dir``, ``workers``, ``device`` and ``threads``.
        runs: Folder of unfinished runs and trained models.

    Raises:
        InputError: for data that cannot be used, or a file of another version; before anything is trained.
    """
    train_items, val_items, classes = find_images(where["data_dir"], where["val_dir"], data_root=where["data_root"])
    images = f"{name_of(where['data_dir'])} ({len(classes)} classes)"
    dataset = with_checksum(images, train_items, val_items)
    starts = {(model, weights): start_of(model, weights) for model, weights in models}
    recipe_text = " ".join(f"{key}={value}" for key, value in sorted(recipe.items()))
    records, damaged = earlier_records(path, COLUMNS)
    if damaged:
        print(f"{path}: {damaged} damaged lines are ignored")
    check_writable(path)
    here = dict(device_name=device_name(where["device"]), **versions())
    mine = []
    for seed in seeds:
        for model, weights in models:
            run = Run(dataset, model, starts[model, weights], recipe_text, seed)
            # rows of earlier versions have no checksums of files that are given
            named = Path(weights).name if isinstance(weights, str) else run.start
            names_only = run._replace(start=named, dataset=images)
            good = [r for r in records if r["error"] is None and key_of(r, Run._fields) in (run, names_only)]
            if good:
                row = good[-1] | run._asdict()
            else:
                print(f"{model}, seed {seed}, from {run.start}:", flush=True)
                row = run_one(model, weights, seed, recipe, where, runs / run.folder())
                if "error" not in row:
                    names = ("img_size", "batch_size", "dtype", "threads")
                    at = {"device": where["device"], **{name: row[name] for name in names}}
                    setting = dict(model=model, dataset=dataset, recipe=recipe_text, **at, **here)
                    whole = [r for r in records if r["latency_p50_ms"] and r["step_p50_ms"]]
                    same = [r for r in whole if {name: r[name] for name in setting} == setting]
                    costs = same[0] if same else costs_of(model, len(classes), at)
                    row |= {name: costs[name] for name in COSTS}
                row = round_off({**run._asdict(), **row, **here, "device": where["device"]})
                append_record(path, COLUMNS, row)
                row = {name: row.get(name) for name in COLUMNS}
                records.append(row)
            outcome = f"failed: {row['error']}" if row["error"] else f"top-1 {row['top1']:.2f} %"
            print(f"{model}, seed {seed}: {outcome}", flush=True)
            mine.append(row)
    return mine


def run_one(
    model: str, weights: Union[str, bool], seed: int, recipe: dict[str, Any], where: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Train one model in a process of its own: the columns of its row, or ``error`` with the reason."""
    name, keywords = parse_model(model)
    file = isinstance(weights, str)
    # a folder or a place of the Hub has weights, and its run may be continued with --pretrained or without
    start: dict[str, Any] = dict(checkpoint=weights) if file else dict(pretrained=weights or ":" in name)
    start["train_only"] = keywords.pop("train_only", None)
    settings = {**recipe, **where, **start, "model": name, "model_kwargs": keywords, "seed": seed, "out": str(out)}
    return call_in_process(train, settings, interactive=True)


def summary(records: list[Record]) -> str:
    """A table for the terminal: mean and standard deviation over the seeds."""
    head = ["model", "start", "seeds", *MEANS]
    lines = [head]
    for (model, start), group in grouped(records, ("model", "start")).items():
        good = [record for record in group if record["error"] is None]
        if not good:
            lines.append([model, start, f"failed: {group[0]['error']}"[:100]])
            continue
        # accuracies are of all runs, costs of those on the machine of the last
        here = [record for record in good if key_of(record, MACHINE) == key_of(good[-1], MACHINE)]
        means = (mean_text([r[name] for r in (good if name in ("top1", "top5") else here)]) for name in MEANS)
        lines.append([model, start, str(len(good)), *means])
    return aligned(lines)


def mean_text(values: list[Optional[float]]) -> str:
    """The mean, with the standard deviation where there are several values that differ."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.4g}"
    return mean if len(set(known)) < 2 else f"{mean} ± {statistics.stdev(known):.2g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="names of timm.list_models(), or 'NAME key=value ...'")
    add("--data-dir", required=True, metavar="DIR", help="class folders, train/ and val/ with them, or hfds/NAME etc.")
    add("--data-root", metavar="DIR", help="where timm's reader of hfds/NAME, torch/NAME etc. has its files")
    add("--val-dir", metavar="DIR", help="class folders that validate, where they are elsewhere")
    add("--checkpoint", "--weights", metavar="FILE", help="initial weights of the MODELs: .safetensors or .pth")
    add("--pretrained", action="store_true", help="start the MODELs from the weights that timm knows for each name")
    add("--from-scratch", nargs="+", default=[], metavar="MODEL", help="further models, from random weights")
    add("--seeds", type=int, nargs="+", default=[0], help="a run for each; default: 0")
    meanings = {own.name: description(own, "; default: ") for own in fields(FinetuneSettings)}
    for name, kind in RECIPE.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=meanings[name].replace("%", "%%"))
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=positive, help="number of CPU threads; default: torch's number")
    add("--workers", type=int, default=0, help="processes that load images; default: 0")
    add("--runs", type=Path, default=Path("runs/compare"), help="folder of models; default: runs/compare")
    keeps = "rows are appended; finished runs are not repeated; default: compare.csv"
    add("--out", type=Path, default=Path("compare.csv"), help=keeps)


def main(arguments: argparse.Namespace) -> None:
    """Run the comparison that the command line asks for, and print its table."""
    if not arguments.models and not arguments.from_scratch:
        raise InputError("no model given; expected names of timm.list_models(), such as vix_nystrom_tiny")
    check_at_most_one(checkpoint=arguments.checkpoint, pretrained=arguments.pretrained)
    recipe = {name: getattr(arguments, name) for name in RECIPE if getattr(arguments, name) is not None}
    if saved := [model for model in arguments.from_scratch if ":" in parse_model(model)[0]]:
        raise InputError(f"from_scratch={saved[0]} has weights of its own; allowed are names of timm.list_models()")
    device = find_device(arguments.device)
    recipe["amp"] = "bfloat16" if find_dtype(recipe.get("amp", "auto"), device) == torch.bfloat16 else "off"
    for model in [*arguments.models, *arguments.from_scratch]:
        name, keywords = parse_model(model)  # a wrong name shows before a data set is fetched
        check_keywords_are_plain(f"model={name}", keywords)
        baseline_of(model)  # likewise a folder whose configuration can't be read
    data_dir = as_folder(arguments.data_dir, arguments.data_root, arguments.runs / "data")
    where = dict(data_dir=data_dir, val_dir=arguments.val_dir, workers=arguments.workers, device=device)
    where["data_root"] = arguments.data_root if data_dir == arguments.data_dir else None  # a folder was made of it
    where["threads"] = arguments.threads or torch.get_num_threads()
    seeds = list(dict.fromkeys(arguments.seeds))
    name, _ = parse_model([*arguments.models, *arguments.from_scratch][0])
    for seed in seeds:  # a wrong value of the recipe shows before anything is trained
        # each run has a folder of its own in arguments.runs, where models of earlier comparisons may lie
        FinetuneSettings(**recipe, **where, model=name, seed=seed, out=str(arguments.runs / "new"), overwrite=True)
    weights = arguments.pretrained if arguments.checkpoint is None else arguments.checkpoint
    models = [(model, weights) for model in arguments.models] + [(model, False) for model in arguments.from_scratch]
    records = compare(list(dict.fromkeys(models)), seeds, recipe, where, arguments.out, arguments.runs)
    print(f"\n{summary(records)}\n\n{arguments.out}: {len(records)} runs of this comparison")
    failed = [record for record in records if record["error"] is not None]
    if len(failed) == len(records):
        raise InputError(f"no model could be trained: {failed[0]['error']}")
