"""Which mixer is fastest at a resolution on this machine, and from how many tokens each is faster than softmax.

Measured, not looked up: ViT-Ti blocks with each mixer, in turn with softmax through ``scaled_dot_product_attention``,
at growing numbers of tokens up to the one that is asked for. Crossovers are interpolated between them. All mixers
are timed together, in one process for each size, which takes about a minute; --memory measures each in a process of
its own, and takes several times as long.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from .._checks import InputError, positive
from .._records import Record
from ..measure.statistics import crossover, crossover_text
from ..mixers import MIXERS
from .cost import add_machine, machine_of, sweep
from .cost_text import ratio
from .figures import paired_times

SIZES = 5


def image_sizes(img_size: int, patch_size: int) -> list[int]:
    """Image sizes, multiples of the patch, from about 100 patches to ``img_size``, evenly spaced on a log scale.

    Raises:
        InputError: for an image that the patches don't divide.

    Example:
        >>> image_sizes(1024, 16)
        [160, 256, 400, 640, 1024]
    """
    if img_size % patch_size:
        raise InputError(f"img_size={img_size} is no multiple of patch_size={patch_size}")
    side = img_size // patch_size
    low = min(10, side)
    sides = {round(low * (side / low) ** (i / (SIZES - 1))) for i in range(SIZES)}
    return [patch_size * s for s in sorted(sides)]


def jobs_of(sizes: list[int], trunk: str, settings: dict[str, Any]) -> list[Record]:
    """The jobs: softmax and each mixer at each image size; blocks are alike, so a few stand for all."""
    baseline = f"vit_tiny_patch16_224 {trunk}"
    models = [baseline, *(f"vix_{mixer}_tiny {trunk}" for mixer in MIXERS if mixer != "softmax")]
    shared = dict(attention="fused", compile="off", baseline=baseline)
    return [{**settings, **shared, "img_size": size, "model": model} for size in sizes for model in models]


def advice(records: list[Record]) -> str:
    """The answer in words, from the rows of ``plan``."""
    good = [record for record in records if record["error"] is None]
    if not good:
        raise InputError(f"nothing could be measured: {records[0]['error']}")
    asked, largest = (max(record["img_size"] for record in group) for group in (records, good))
    # in the order of times that were taken in turn: the rows' own are of different moments
    paired = paired_times([record for record in good if record["img_size"] == largest])
    here = sorted(paired, key=lambda record: record["latency_p50_ms"])
    lines = table(here, good)
    for record in records:
        if record["error"] is not None:
            lines.append(f"{mixer_of(record)}, {record['img_size']} px: failed: {record['error']}")
    start = f"nothing could be measured at {asked} px; at" if largest < asked else "At"
    answer = f"{start} {largest} px, {here[0]['tokens']:,} tokens: {fastest_of(here)}"
    sized = [record for record in here if record["peak_memory_mib"] is not None]
    if sized:
        smallest = min(sized, key=lambda record: record["peak_memory_mib"])
        answer += f", smallest {mixer_of(smallest)}"
    lines.append(
        f"\n{answer}. This is cost only. `timm-vix plan` measures what accuracy a trained model keeps, also with "
        "merged tokens; `timm-vix compare` measures what accuracy each mixer reaches in training."
    )
    return "\n".join(lines)


def table(here: list[Record], good: list[Record]) -> list[str]:
    """Its lines: a mixer's time at one size, and where it overtakes softmax, from the rows of all sizes.

    Memory has a column where it was measured.
    """
    with_memory = any(record["peak_memory_mib"] is not None for record in here)
    lines = [f"{'mixer':10}  {'ms':>9}  {'x softmax (spread)':32}{'      MiB' * with_memory}  overtakes softmax"]
    for record in here:
        when, spread, memory = "", "", ""
        if mixer_of(record) != "softmax":
            rows = [r for r in good if r["model"] == record["model"] and r["difference"] not in (None, "unknown")]
            if rows:
                tokens = [r["tokens"] for r in rows]
                ratios = ([r[key] for r in rows] for key in ("speedup", "speedup_low", "speedup_high"))
                when = crossover_text(tokens, crossover(tokens, *ratios))
            spread = ratio(record).replace(" x softmax", "")
        if with_memory:
            memory = f"{'' if record['peak_memory_mib'] is None else round(record['peak_memory_mib']):>9}"
        lines.append(f"{mixer_of(record):10}  {record['latency_p50_ms']:9.4g}  {spread:32}{memory}  {when}".rstrip())
    return lines


def fastest_of(here: list[Record]) -> str:
    """Which mixer is fastest, of rows of one size from the fastest on, or why that is not known."""
    mixers = [record for record in here if mixer_of(record) != "softmax"]
    faster = [record for record in mixers if record["difference"] == "faster"]
    if faster:
        even = [mixer_of(r) for r in faster[1:] if r["speedup_high"] >= faster[0]["speedup_low"]]
        others = f" ({', '.join(even)} as fast within the spread)" if even else ""
        return f"fastest is {mixer_of(faster[0])}{others}"
    if mixers and len(mixers) == len(here):
        return f"softmax could not be measured, fastest of the others is {mixer_of(mixers[0])}"
    if any(record["difference"] == "unknown" for record in mixers):
        return "too few rounds to tell what is faster than softmax (give --rounds 5 or more)"
    return "no mixer is measurably faster than softmax"


def mixer_of(record: Record) -> str:
    """The mixer in a model's name."""
    return record["model"].split("_")[1] if record["model"].startswith("vix_") else "softmax"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--img-size", type=positive, required=True, help="side of the images in pixels")
    add("--patch-size", type=positive, default=16, help="side of a patch in pixels; default: 16")
    add("--mode", choices=("infer", "train"), default="infer", help="forward pass or training step; default: infer")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products; default: float32")
    add("--batch-size", type=positive, default=1, help="images per call; default: 1")
    add("--depth", type=positive, default=2, help="number of blocks that are measured; default: 2")
    add("--memory", action="store_true", help="peak memory too, each model in a process of its own: slower")
    add("--out", type=Path, help="keep the rows here, and continue from them; default: nowhere")
    add_machine(parser)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and print the advice."""
    sizes = image_sizes(arguments.img_size, arguments.patch_size)
    trunk = f"depth={arguments.depth} patch_size={arguments.patch_size}"
    settings = {name: getattr(arguments, name) for name in ("mode", "dtype", "batch_size")}
    jobs = jobs_of(sizes, trunk, settings | machine_of(arguments))
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "advise.csv"
        try:
            records = sweep(jobs, out, retry_failed=arguments.retry_failed, together=not arguments.memory)
        except KeyboardInterrupt:
            lost = "nothing was kept: --out FILE keeps what is measured"
            raise KeyboardInterrupt(f"interrupted; {'the same command continues' if arguments.out else lost}") from None
    print(f"\n{arguments.mode}, batch {arguments.batch_size}, {arguments.dtype}, {jobs[0]['device']}, "
          f"{arguments.depth} blocks of ViT-Ti, patch {arguments.patch_size}\n{advice(records)}")  # fmt: skip
