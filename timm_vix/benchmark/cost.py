"""What models cost: one row of a CSV for each model, image size, batch size, mode, dtype and compile setting.

Each row is measured in a fresh process, in turn with softmax attention. The softmax baselines have rows of their own:
"fused", where a fused kernel of ``scaled_dot_product_attention`` ran, and "unfused", as two matrix products. A baseline
that calls no such kernel, as timm's LeViT, has only the latter. Other models have one row, "fused", in which torch
chooses the kernels of what softmax they hold. Rows are appended as they come, so a sweep that was stopped continues
with the same command and repeats nothing.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch

from .._checks import InputError, positive
from .._device import device_name, find_device, versions
from .._records import (
    Columns,
    LaterText,
    Record,
    add_later_columns,
    append_record,
    check_writable,
    earlier_records,
    key_of,
)
from ..measure.job import JOB, measure_in_process, measure_together
from ..measure.process import call_in_process
from .baselines import attention_of, baseline_of
from .cost_text import describe, summary
from .runs import files_of

KEY = (
    *("model", "attention", "baseline", "img_size", "batch_size", "mode", "dtype", "compile"),
    *("device", "device_name", "threads"),
)
KNOWN_BY = (*KEY, "files")  # a row of files that changed stands for no other
# name: type; GFLOPs count a multiply-add as two and are those of one image, with mode=train of a whole training step
COLUMNS: Columns = dict(
    model=str,
    attention=str,
    img_size=int,
    tokens=int,
    batch_size=int,
    mode=str,
    dtype=str,
    compile=str,
    params_m=float,
    gflops=float,
    latency_p50_ms=float,
    latency_p90_ms=float,
    images_per_s=float,
    epoch_images=int,
    epoch_s=float,
    peak_memory_mib=float,
    checkpoint_mib=float,
    first_call_ms=float,
    baseline=str,
    baseline_p50_ms=float,
    speedup=float,
    speedup_low=float,
    speedup_high=float,
    difference=str,
    rounds=int,
    device=str,
    device_name=str,
    threads=int,
    torch=str,
    timm=str,
    timm_vix=str,
    error=str,
    files=LaterText,  # those that the names of model and baseline hold, with checksums
)


def jobs_of(models: list[str], settings: dict[str, list], baseline: Optional[str], softmax: list[str]) -> list[Record]:
    """The jobs of a sweep: all combinations of the settings in the order given, softmax first in each.

    Args:
        settings: For each of "img_size", "dtype", "compile", "mode" and "batch_size" a list of values.
        softmax: Of "fused" and "unfused", how the baselines run in rows of their own, see ``attention_of``.
    """
    rows = []
    references = {model: baseline_of(model, baseline) for model in models}  # of a folder or the Hub it is read there
    for reference in dict.fromkeys(references.values()):
        rows += [(reference, kind, reference) for kind in attention_of(reference, softmax)]
    for model, reference in references.items():
        # a model that is its own baseline is softmax too
        (kind,) = attention_of(model, ["fused"]) if model == reference else ["fused"]
        rows.append((model, kind, reference))
    names = ("img_size", "dtype", "compile", "mode", "batch_size")
    combinations = itertools.product(*(dict.fromkeys(settings[name]) for name in names))
    return [
        dict(model=model, attention=kind, baseline=reference, **dict(zip(names, values)))
        for values in combinations
        for model, kind, reference in dict.fromkeys(rows)
    ]


def sweep(
    jobs: list[Record], path: Path, epoch_images: int = 0, retry_failed: bool = False, together: bool = False
) -> list[Record]:
    """Measure the jobs that ``path`` has no row of from this machine, append each row, and return the rows of all jobs.

    A row of fewer rounds than the job asks for doesn't count, nor one of a plan or folder that has changed.

    Args:
        epoch_images: Images of an epoch, for its time; 0: left as it is. A row that has the time of another number is
            appended again with that of this one, from the speed that was measured; of equal rows the last counts.
        retry_failed: Measure jobs again whose row is a failure.
        together: Time all models of a size in one process, see ``measure_together``.

    Raises:
        InputError: for a file of another version.
        OSError: for a file that cannot be written.
    """
    files = {names: files_text(*names) for names in {(job["model"], job["baseline"]) for job in jobs}}
    jobs = [
        {**job, "device_name": device_name(job["device"]), "files": files[job["model"], job["baseline"]]}
        for job in jobs
    ]
    known = known_rows(jobs, path, retry_failed, together)
    left = [job for job in jobs if key_of(job, KNOWN_BY) not in known]
    if len(left) < len(jobs):
        others = sum(any(record[name] != version for name, version in versions().items()) for record in known.values())
        note = f", {others} of them by other versions of torch, timm or timm_vix" if others else ""
        print(f"{path}: {len(jobs) - len(left)} of {len(jobs)} rows are there already{note}")
    other_epochs = [
        key
        for key, record in known.items()
        if record["epoch_images"] != epoch_images and epoch_of(record, epoch_images)
    ]
    if left or other_epochs:
        check_writable(path)
        add_later_columns(path, COLUMNS)
    for key in other_epochs:
        known[key] |= epoch_of(known[key], epoch_images)
        append_record(path, COLUMNS, known[key])
    if other_epochs:
        print(f"{path}: {len(other_epochs)} of them are added again with the time of {epoch_images} images an epoch")
    start = time.perf_counter()
    for number, (job, found) in enumerate(measured(left, together), 1):
        if job["attention"] == "fused" and job["model"] == job["baseline"] and found.get("fused") is False:
            found = dict(error="attention='fused': no fused kernel took its attention; allowed is 'unfused'")
        record = round_off({**job, **versions(), **found})  # a failure has its machine and versions too
        if found.get("no_baseline"):
            print(f"{job['baseline']} could not be timed beside {job['model']}: {found['no_baseline']}", flush=True)
        record |= epoch_of(record, epoch_images)
        append_record(path, COLUMNS, record)
        known[key_of(job, KNOWN_BY)] = {name: record.get(name) for name in COLUMNS}
        minutes = (time.perf_counter() - start) / 60
        rest = f"{minutes:.1f} min, about {minutes / number * (len(left) - number):.0f} to go"
        print(f"[{len(jobs) - len(left) + number}/{len(jobs)}] {describe(record)}  [{rest}]", flush=True)
    return [known[key_of(job, KNOWN_BY)] for job in jobs]


def epoch_of(record: Record, images: int) -> Record:
    """The columns of an epoch of so many images at a row's speed; none for no images, and for a failure."""
    speed = record.get("images_per_s")
    return dict(epoch_images=images, epoch_s=round(images / speed, 1)) if images and speed else {}


def files_text(model: str, baseline: str) -> Optional[str]:
    """Names and checksums of the files that a model and its baseline hold; None for no file."""
    return " ".join(dict.fromkeys(files_of(model) + files_of(baseline))) or None


def known_rows(jobs: list[Record], path: Path, retry_failed: bool, together: bool) -> dict[tuple, Record]:
    """The rows of ``path`` that stand for one of the jobs, by their keys."""
    records, damaged = earlier_records(path, COLUMNS)
    rounds = {key_of(job, KNOWN_BY): job.get("rounds", JOB["rounds"]) for job in jobs}
    known = {}
    for record in records:
        key, failed = key_of(record, KNOWN_BY), record["error"] is not None
        if failed and key in known:
            continue  # what was measured once stays known
        if not failed and record["latency_p50_ms"] is None:
            damaged += 1
        elif key in rounds:
            # what was timed together has no first call, and no memory
            enough = (record["rounds"] or 0) >= rounds[key] and (together or record["first_call_ms"] is not None)
            if not retry_failed if failed else enough:
                known[key] = record
    if damaged:
        print(f"{path}: {damaged} damaged lines are ignored")
    return known


def measured(jobs: list[Record], together: bool) -> Iterator[tuple[Record, Record]]:
    """The jobs with what was measured of them, one by one or those of a size in one process."""
    if not together:
        yield from ((job, measure_in_process(job)) for job in jobs)
        return
    # a process for each size: one that is ended for want of memory takes no answers of other sizes with it
    for _, group in itertools.groupby(jobs, lambda job: job["img_size"]):
        same_size = list(group)
        found = call_in_process(measure_together, same_size)
        yield from zip(same_size, found if isinstance(found, list) else [found] * len(same_size))


def round_off(record: Record) -> Record:
    """Round all floats to five significant digits."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in record.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name of timm.list_models(), or 'NAME key=value ...'")
    add("--img-size", type=positive, nargs="+", default=[224], help="sides of the images in pixels; default: 224")
    add("--batch-size", type=positive, nargs="+", default=[1], help="images per call; default: 1")
    add("--mode", nargs="+", choices=("infer", "train"), default=["infer"], help="what is timed; default: infer")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="of matmuls; default: float32")
    add("--compile", nargs="+", choices=("off", "on"), default=["off"], help="use torch.compile; default: off")
    add(
        "--baseline",
        metavar="MODEL",
        help="what is timed beside each model; default: the softmax model "
        f"of the same trunk for one of ours, {JOB['baseline']} for any other",
    )
    add(
        "--softmax",
        nargs="*",
        choices=("fused", "unfused"),
        default=["fused", "unfused"],
        help="softmax baselines that get rows of their own; default: both; --softmax alone: none",
    )
    add("--epoch-images", type=positive, default=50000, help="images of an epoch, for its time; default: 50000")
    keeps = "rows are appended; what is there is not measured again; default: cost.csv"
    add("--out", type=Path, default=Path("cost.csv"), help=keeps)
    add_machine(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The arguments about where, how long and how often is measured."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=positive, help="number of CPU threads; default: torch's number")
    parser.add_argument(
        "--rounds", type=positive, default=JOB["rounds"], help="least number of paired rounds; default: 9"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=JOB["seconds"],
        help="time in seconds that further rounds may fill, if --rounds take less; default: 5",
    )
    parser.add_argument("--retry-failed", action="store_true", help="measure again what failed")


def machine_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``add_machine`` asked for, as part of a job."""
    device = find_device(arguments.device)
    threads = arguments.threads or torch.get_num_threads()
    return dict(device=device, threads=threads, rounds=arguments.rounds, seconds=arguments.seconds)


def main(arguments: argparse.Namespace) -> None:
    """Run the sweep that the command line asks for, and print its table."""
    machine = machine_of(arguments)
    settings = {name: getattr(arguments, name) for name in ("img_size", "dtype", "compile", "mode", "batch_size")}
    jobs = [job | machine for job in jobs_of(arguments.models, settings, arguments.baseline, arguments.softmax)]
    records = sweep(jobs, arguments.out, arguments.epoch_images, arguments.retry_failed)
    print(f"\n{summary(records)}\n\n{arguments.out}: {len(records)} rows of this sweep")
    failed = [record for record in records if record["error"] is not None]
    if len(failed) == len(records):
        raise InputError(f"no row could be measured: {failed[0]['error']}")
