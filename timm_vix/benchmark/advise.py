"""Which mechanism is fastest and smallest at a resolution on this machine, and from how many tokens each pays.

Measured, not looked up: ViT-Ti blocks with each mixer, in turn with softmax through ``scaled_dot_product_attention``,
at growing numbers of tokens up to the one that is asked for. Crossovers are interpolated between them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from .._records import Record
from ..measure.statistics import crossover, crossover_text
from ..mixers import MIXERS
from .cost import add_machine, machine_of, positive, ratio, sweep
from .figures import paired_times

RUNGS = 5


def ladder(img_size: int, patch_size: int) -> list[int]:
    """Image sizes, multiples of the patch, from about 100 patches to ``img_size``, evenly spaced on a log scale.

    Raises:
        ValueError: for an image that the patches don't divide.

    Example:
        >>> ladder(1024, 16)
        [160, 256, 400, 640, 1024]
    """
    if img_size % patch_size:
        raise ValueError(f"img_size={img_size} is no multiple of patch_size={patch_size}")
    side = img_size // patch_size
    low = min(10, side)
    sides = {round(low * (side / low) ** (i / (RUNGS - 1))) for i in range(RUNGS)}
    return [patch_size * s for s in sorted(sides)]


def plan(sizes: list[int], trunk: str, settings: dict[str, Any]) -> list[Record]:
    """The jobs: softmax and each mixer at each image size; blocks are alike, so a few stand for all."""
    baseline = f"vit_tiny_patch16_224 {trunk}"
    models = [baseline, *(f"vix_{mixer}_tiny {trunk}" for mixer in MIXERS if mixer != "softmax")]
    shared = dict(attention="fused", compile="off", baseline=baseline)
    return [{**settings, **shared, "img_size": size, "model": model} for size in sizes for model in models]


def advice(records: list[Record]) -> str:
    """The answer in words, from the rows of ``plan``."""
    good = [record for record in records if record["error"] is None]
    if not good:
        raise ValueError(f"nothing could be measured: {records[0]['error']}")
    asked, largest = (max(record["img_size"] for record in group) for group in (records, good))
    # in the order of times that were taken in turn: the rows' own are of different moments
    paired = paired_times([record for record in good if record["img_size"] == largest])
    here = sorted(paired, key=lambda record: record["latency_p50_ms"])
    lines = [f"{'mechanism':10}  {'ms':>9}  {'x softmax (spread)':32}  {'MiB':>7}  overtakes softmax"]
    for record in here:
        name, when, spread, memory = mechanism(record), "", "", record["peak_memory_mib"]
        if name != "softmax":
            rows = [r for r in good if r["model"] == record["model"] and r["difference"] not in (None, "unknown")]
            if rows:
                tokens = [r["tokens"] for r in rows]
                ratios = ([r[key] for r in rows] for key in ("speedup", "speedup_low", "speedup_high"))
                when = crossover_text(tokens, crossover(tokens, *ratios))
            spread = ratio(record).replace(" x softmax", "")
        size = "" if memory is None else f"{memory:.0f}"
        lines.append(f"{name:10}  {record['latency_p50_ms']:9.4g}  {spread:32}  {size:>7}  {when}".rstrip())
    for record in records:
        if record["error"] is not None:
            lines.append(f"{mechanism(record)}, {record['img_size']} px: failed: {record['error']}")
    sized = [record for record in here if record["peak_memory_mib"] is not None]
    smallest = min(sized, key=lambda record: record["peak_memory_mib"], default=None)
    start = f"nothing could be measured at {asked} px; at" if largest < asked else "At"
    lines.append(f"\n{start} {largest} px, {here[0]['tokens']:,} tokens: {fastest_of(here)}")
    if smallest is not None:
        lines[-1] += f", smallest {mechanism(smallest)}"
    lines[-1] += ". Speed and size only: what each scores, `timm-vix compare` tells."
    return "\n".join(lines)


def fastest_of(here: list[Record]) -> str:
    """Which mechanism is fastest, of rows of one size from the fastest on, or why that is not known."""
    mixers = [record for record in here if mechanism(record) != "softmax"]
    faster = [record for record in mixers if record["difference"] == "faster"]
    if faster:
        even = [mechanism(r) for r in faster[1:] if r["speedup_high"] >= faster[0]["speedup_low"]]
        told = f" ({', '.join(even)} as fast within the spread)" if even else ""
        return f"fastest is {mechanism(faster[0])}{told}"
    if mixers and len(mixers) == len(here):
        return f"softmax could not be measured, fastest of the others is {mechanism(mixers[0])}"
    if any(record["difference"] == "unknown" for record in mixers):
        return "too few rounds to tell what is faster than softmax (give --rounds 5 or more)"
    return "no mechanism is measurably faster than softmax"


def mechanism(record: Record) -> str:
    """The mixer in a model's name."""
    return record["model"].split("_")[1] if record["model"].startswith("vix_") else "softmax"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--img-size", type=positive, required=True)
    add("--patch-size", type=positive, default=16)
    add("--mode", choices=("infer", "train"), default="infer")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--batch-size", type=positive, default=1)
    add("--depth", type=positive, default=2, help="blocks that are measured: 2")
    add("--out", type=Path, help="keep the rows here, and continue from them; default: nowhere")
    add_machine(parser)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and print the advice."""
    sizes = ladder(arguments.img_size, arguments.patch_size)
    trunk = f"depth={arguments.depth} patch_size={arguments.patch_size}"
    settings = {name: getattr(arguments, name) for name in ("mode", "dtype", "batch_size")}
    jobs = plan(sizes, trunk, settings | machine_of(arguments))
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "advise.csv"
        records = sweep(jobs, out, retry_failed=arguments.retry_failed)
    print(f"\n{arguments.mode}, batch {arguments.batch_size}, {arguments.dtype}, {jobs[0]['device']}, "
          f"{arguments.depth} blocks of ViT-Ti, patch {arguments.patch_size}\n{advice(records)}")  # fmt: skip
