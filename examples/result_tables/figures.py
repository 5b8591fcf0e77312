"""The figures beside the tables: cost over resolution, and the longer trainings on CIFAR-10."""

import itertools
from collections.abc import Iterator
from typing import Any

from reproduction.cards import CURVE, read_rows

from timm_vix._figures import canvas, png
from timm_vix._files import write_whole
from timm_vix._records import Record, key_of, read_records
from timm_vix.benchmark.cost import COLUMNS
from timm_vix.benchmark.figures import legend_below, over_tokens, styles, trade_off

from . import RESULTS, read
from .cost import LEAST_ROUNDS, has_amx, is_shown
from .training import is_long

IMAGES = 45_000  # of an epoch of CIFAR-10: the others are held out
LEAST_SYSTEMS = 3  # of one patch size; fewer are compared in the table


def draw_all() -> None:
    """Write every figure to examples/results."""
    for name, figure in itertools.chain(costs(), trainings()):
        write_whole(RESULTS / f"{name}.png", png(figure))


def costs() -> Iterator[tuple[str, Any]]:
    """Speed of inference beside softmax, and memory of training, over resolution; of what the README's table has."""
    records, _ = read_records(RESULTS / "cost_cpu.csv", COLUMNS)
    wanted = [r for r in records if (r["dtype"], r["baseline"]) == ("float32", "vit_tiny_patch16_224")]
    wanted = [r for r in wanted if r["batch_size"] == 1 and not r["error"] and is_shown(r["model"])]
    wanted = [r for r in wanted if not has_amx(r["device_name"])]  # one processor, that of the README's tables
    timed = [r for r in wanted if r["mode"] == "infer" and r["rounds"] >= LEAST_ROUNDS]
    trained = [r for r in wanted if r["mode"] == "train"]
    for name, rows, column in (("speed", timed, "speedup"), ("memory", trained, "peak_memory_mib")):
        yield f"cost_{name}", over_tokens(rows, column)[0]


def trainings() -> Iterator[tuple[str, Any]]:
    """For each patch size with some longer trainings: accuracy over time, over parameters and over operations."""
    rows = [row for row in read_rows(RESULTS / "reproduce_vix.csv")[0] if is_long(row)]
    if not rows:
        return
    epochs = [row for row in read_records(RESULTS / "reproduce_vix_curves.csv", CURVE)[0] if is_long(row)]
    for patch_size in sorted({row["patch_size"] for row in epochs}, reverse=True):
        hours = hours_per_epoch(patch_size)
        mine = [row for row in epochs if row["patch_size"] == patch_size and row["system"] in hours]
        if len({row["system"] for row in mine}) < LEAST_SYSTEMS:
            continue
        yield f"cifar10_patch{patch_size}_time", over_time(mine, hours)
        groups: dict[str, list[Record]] = {}
        for row in (row for row in rows if row["patch_size"] == patch_size):
            point = dict(model=row["system"], start="", top1=row["top1"], gflops=row["gflops"])
            groups.setdefault(row["system"], []).append(point | dict(params_m=row["parameters"] / 1e6))
        for cost, name in (("params_m", "parameters"), ("gflops", "operations")):
            yield f"cifar10_patch{patch_size}_{name}", trade_off(list(groups.values()), cost, "test top-1 (%)")


def hours_per_epoch(patch_size: int) -> dict[str, float]:
    """The hours of an epoch of each system, by the time of its steps, which were timed in turn on one machine.

    The seconds of the trainings themselves depend on what else the machine did.
    """
    rows = [row for row in read("step_times.csv") if int(row["patch_size"]) == patch_size]
    return {row["system"]: IMAGES / int(row["batch_size"]) * float(row["ms"]) / 3.6e6 for row in rows}


def over_time(epochs: list[Record], hours: dict[str, float]) -> Any:
    """Accuracy on the held-out images over the hours of training: a line for each system's first seed.

    Args:
        epochs: Rows of one patch size, see ``CURVE``.
        hours: of an epoch of each system.
    """
    runs: dict[str, list[Record]] = {}
    for row in sorted(epochs, key=lambda row: key_of(row, ("system", "seed", "epoch"))):
        run = runs.setdefault(row["system"], [])
        if not run or row["seed"] == run[0]["seed"]:
            run.append(row)
    best = sorted(runs, key=lambda system: -runs[system][-1]["held_out_top1"])
    looks = styles(best)
    figure, axes = canvas(7.5, 5.6)
    for system in best:
        passed = [row["epoch"] * hours[system] for row in runs[system]]
        top1 = [row["held_out_top1"] for row in runs[system]]
        axes.plot(passed, top1, label=system, markersize=4, linewidth=1.2, **looks[system])
    threads = max(row["threads"] for row in epochs)
    axes.set(
        xlabel=f"hours of training on {threads} CPU thread{'s' * (threads > 1)}, from the time of a step",
        ylabel="top-1 on held-out images (%)",
    )
    axes.grid(alpha=0.3)
    legend_below(figure)
    return figure
