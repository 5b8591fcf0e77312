"""What models cost: one row of a CSV for each model, image size, batch size, mode, dtype and compile setting.

Each row is measured in a fresh process (``measure.py``), against softmax attention through
``scaled_dot_product_attention``; the softmax baselines, fused and unfused, have rows of their own. Rows are appended as
they come, so a sweep that was stopped continues with the same command and repeats nothing.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any, Optional

import torch

from .._device import device_name, find_device, versions
from .._names import parse_model, softmax_of
from .._records import Columns, Record, append_record, check_writable, header_of, key_of, read_records
from ..conversion.replace import mixer_keywords
from ..measure.process import JOB, run
from ..mixers import MIXERS

KEY = (
    *("model", "attention", "baseline", "img_size", "batch_size", "mode", "dtype", "compile"),
    *("device", "device_name", "threads"),
)
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
)
# keywords that the softmax model of the same trunk is not given: these and those of the mixers;
# where that is timm's own ViT, what only ours have too
NOT_TRUNK = {"mixer", "layers", "source", "train_only"} | {name for mixer in MIXERS for name in mixer_keywords(mixer)}
OURS_ONLY = {"stem", "rope", "block"}
NOTE = (
    "ms and MiB at the smallest batch; with mode=train a training step. x softmax: speed over the softmax baseline\n"
    "through scaled_dot_product_attention, timed in turn; none: its spread (10th to 90th percentile) holds 1; few\n"
    "rounds: fewer than five, of which none is called a difference."
)


def baseline_of(spec: str, given: Optional[str] = None) -> str:
    """The softmax model that a model is timed against, with the keywords of the trunk."""
    name, keywords = parse_model(spec)
    if given:
        parse_model(given)
        return given
    twin = keywords.get("source", "deit_tiny_patch16_224") if name == "vix_from_timm" else softmax_of(name)
    if twin is None:
        return JOB["baseline"]
    foreign = NOT_TRUNK | (OURS_ONLY if twin.startswith("vit_") else set())
    # as they were written: a tuple's own text has spaces
    return " ".join([twin, *(part for part in spec.split()[1:] if part.partition("=")[0] not in foreign)])


def plan(models: list[str], settings: dict[str, list], baseline: Optional[str], softmax: list[str]) -> list[Record]:
    """The jobs of a sweep: all combinations of the settings in the order given, softmax first in each.

    Args:
        settings: For each of "img_size", "dtype", "compile", "mode" and "batch_size" a list of values.
        softmax: Of "fused" and "unfused", how the baselines run in rows of their own.
    """
    rows = []
    for reference in dict.fromkeys(baseline_of(model, baseline) for model in models):
        rows += [(reference, kind, reference) for kind in softmax]
    rows += [(model, "fused", baseline_of(model, baseline)) for model in models]
    names = ("img_size", "dtype", "compile", "mode", "batch_size")
    combinations = itertools.product(*(dict.fromkeys(settings[name]) for name in names))
    return [
        dict(model=model, attention=kind, baseline=reference, **dict(zip(names, values)))
        for values in combinations
        for model, kind, reference in dict.fromkeys(rows)
    ]


def sweep(jobs: list[Record], path: Path, epoch_images: int = 0, retry_failed: bool = False) -> list[Record]:
    """Measure the jobs that ``path`` has no row of from this machine, append each row, and return the rows of all jobs.

    A row of fewer rounds than the job asks for doesn't count.

    Args:
        epoch_images: Images of an epoch, for its time; 0: left empty.
        retry_failed: Measure jobs again whose row is a failure.

    Raises:
        ValueError: for a file of another version.
        OSError: for a file that cannot be written.
    """
    jobs = [{**job, "device_name": device_name(job["device"])} for job in jobs]
    known: dict[tuple, Record] = {}
    if path.exists() and header_of(path):
        records, damaged = read_records(path, COLUMNS, exact=True)
        whole = [record for record in records if record["error"] or record["latency_p50_ms"] is not None]
        damaged += len(records) - len(whole)
        asked = {key_of(job, KEY): job.get("rounds", JOB["rounds"]) for job in jobs}
        for record in whole:
            key, failed = key_of(record, KEY), record["error"] is not None
            if key in asked and (not retry_failed if failed else (record["rounds"] or 0) >= asked[key]):
                known[key] = record
        if damaged:
            print(f"{path}: {damaged} damaged lines are ignored, and measured again")
    left = sum(key_of(job, KEY) not in known for job in jobs)
    if left < len(jobs):
        others = sum(any(record[name] != version for name, version in versions().items()) for record in known.values())
        told = f", {others} of them by other versions of torch, timm or timm_vix" if others else ""
        print(f"{path}: {len(jobs) - left} of {len(jobs)} rows are there already{told}")
    if left:
        check_writable(path)
    start, done = time.perf_counter(), 0
    for number, job in enumerate(jobs, 1):
        if key_of(job, KEY) in known:
            continue
        record = round_off({**job, **versions(), **run(job)})  # a failure has its machine and versions too
        if epoch_images and record.get("images_per_s"):
            record |= dict(epoch_images=epoch_images, epoch_s=round(epoch_images / record["images_per_s"], 1))
        append_record(path, COLUMNS, record)
        known[key_of(job, KEY)] = {name: record.get(name) for name in COLUMNS}
        done += 1
        minutes = (time.perf_counter() - start) / 60
        rest = f"{minutes:.1f} min, about {minutes / done * (left - done):.0f} to go"
        print(f"[{number}/{len(jobs)}] {describe(record)}  [{rest}]", flush=True)
    return [known[key_of(job, KEY)] for job in jobs]


def round_off(record: Record) -> Record:
    """Five digits are more than a clock knows."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in record.items()}


def describe(record: Record) -> str:
    """One line about one row."""
    what = f"{record['model']}{', unfused' * (record['attention'] == 'unfused')}"
    what += f", {record['img_size']} px, batch {record['batch_size']}, {record['mode']}, {record['dtype']}"
    what += ", compiled" * (record["compile"] == "on")
    if record.get("error"):
        return f"{what}: failed: {record['error']}"
    memory = record.get("peak_memory_mib")
    return (
        f"{what}: {record['latency_p50_ms']:.4g} ms, {ratio(record)}, {memory if memory is None else round(memory)} MiB"
    )


def ratio(record: Record) -> str:
    """Times the baseline's speed, with the spread, and whether that is a difference."""
    if record.get("speedup") is None:
        return "no baseline"
    if record.get("speedup_low") is None:
        return f"{record['speedup']:.2f} x softmax ({'one round' if record['rounds'] == 1 else 'two rounds'})"
    text = f"{record['speedup']:.2f} x softmax ({record['speedup_low']:.2f} to {record['speedup_high']:.2f})"
    return text + {"none": ": none", "unknown": ": few rounds"}.get(record["difference"], "")


def summary(records: list[Record]) -> str:
    """A table for the terminal: one line for each model and setting, batch sizes joined."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        names = ("img_size", "mode", "dtype", "compile", "model", "attention")
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    head = [
        "px",
        "mode",
        "dtype",
        "compile",
        "model",
        "ms (p90)",
        "x softmax (spread)",
        "images/s at best batch",
        "MiB",
    ]
    lines = [head]
    for (size, mode, dtype, compiled, model, kind), group in groups.items():
        good = [record for record in group if record["error"] is None]
        name = model if kind == "fused" else f"{model}, unfused"
        start = [str(size), mode, dtype, compiled, name]
        if not good:
            lines.append([*start, f"failed: {group[0]['error']}"[:90]])
            continue
        first, best = (
            min(good, key=lambda record: record["batch_size"]),
            max(good, key=lambda record: record["images_per_s"]),
        )
        memory = "" if first["peak_memory_mib"] is None else f"{first['peak_memory_mib']:.0f}"
        lines.append(
            [
                *start,
                f"{first['latency_p50_ms']:.4g} ({first['latency_p90_ms']:.4g})",
                ratio(first).replace(" x softmax", ""),
                f"{best['images_per_s']:.4g} at {best['batch_size']}",
                memory,
            ]
        )
    widths = [max(len(line[i]) for line in lines if i < len(line) and len(line) > 6) for i in range(len(head))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    return f"{table}\n\n{NOTE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name of timm.list_models(), or 'NAME key=value ...'")
    add("--img-size", type=positive, nargs="+", default=[224])
    add("--batch-size", type=positive, nargs="+", default=[1])
    add("--mode", nargs="+", choices=("infer", "train"), default=["infer"])
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    add("--compile", nargs="+", choices=("off", "on"), default=["off"])
    add("--baseline", metavar="MODEL", help="what is timed beside each model; default: softmax of the same size")
    add("--softmax", nargs="*", choices=("fused", "unfused"), default=["fused", "unfused"], help="baselines' own rows")
    add("--epoch-images", type=positive, default=50000, help="images of an epoch, for its time: 50000")
    add("--out", type=Path, default=Path("cost.csv"), help="rows are appended; what is there is not measured again")
    add_machine(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The arguments about where, how long and how often is measured."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=positive, help="of the CPU; default: torch's number")
    parser.add_argument("--rounds", type=positive, default=JOB["rounds"], help="least number of paired rounds: 9")
    parser.add_argument("--seconds", type=float, default=JOB["seconds"], help="that a row's further rounds may take: 5")
    parser.add_argument("--retry-failed", action="store_true", help="measure again what failed")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a whole number above 0")
    return int(text)


def machine_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``add_machine`` asked for, as part of a job."""
    device = find_device(arguments.device)
    threads = arguments.threads or torch.get_num_threads()
    return dict(device=device, threads=threads, rounds=arguments.rounds, seconds=arguments.seconds)


def main(arguments: argparse.Namespace) -> None:
    """Run the sweep that the command line asks for, and print its table."""
    machine = machine_of(arguments)
    settings = {name: getattr(arguments, name) for name in ("img_size", "dtype", "compile", "mode", "batch_size")}
    jobs = [job | machine for job in plan(arguments.models, settings, arguments.baseline, arguments.softmax)]
    records = sweep(jobs, arguments.out, arguments.epoch_images, arguments.retry_failed)
    print(f"\n{summary(records)}\n\n{arguments.out}: {len(records)} rows of this sweep")
    failed = [record for record in records if record["error"] is not None]
    if len(failed) == len(records):
        raise ValueError(f"no row could be measured: {failed[0]['error']}")
