"""The figures of a report, as PNG: cost over tokens on logarithmic axes, accuracy over cost with its Pareto front.

Colours are those of Okabe & Ito, which colour-blind readers tell apart; each model has a marker of its own as well, so
a black-and-white print can be read too.
"""

import statistics
from collections.abc import Iterable
from typing import Any, Optional

from .._figures import COLOURS, canvas, plain_text, png
from .._records import Record
from ..measure.statistics import crossover, crossover_text, exponent, pareto

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
COSTS = dict(latency_p50_ms="ms per call", peak_memory_mib="peak memory (MiB)")
# both are timed in turn: other programmes on the machine slow both, so the ratio is steadier than the times
SPEEDUP = dict(speedup="times softmax's speed")
AXES = dict(
    latency_p50_ms="latency, batch 1 (ms)",
    peak_memory_train_mib="peak memory of a training step (MiB)",
    gflops="GFLOPs (a multiply-add is two)",
    params_m="parameters (M)",
)


def series_name(record: Record) -> str:
    """How a row is called in figures."""
    return record["model"] if record["attention"] == "fused" else f"{record['model']}, unfused"


def is_softmax(record: Record) -> bool:
    """Whether a row is a softmax baseline."""
    return record["model"] == record["baseline"]


def run_name(record: Record) -> str:
    """How a trained model is called in figures: with its start where that is random weights."""
    return f"{record['model']}{' (scratch)' * (record['start'] == 'scratch')}"


def series_of(records: list[Record]) -> list[str]:
    """The names of all lines of a figure over resolution, softmax first."""
    return list(dict.fromkeys(map(series_name, sorted(records, key=is_softmax, reverse=True))))


def styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour and a marker for each name, by its place: figures of the same names share one legend."""
    return {
        name: dict(color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)])
        for number, name in enumerate(dict.fromkeys(names))
    }


def legend(names: Iterable[str]) -> list[dict[str, str]]:
    """The legend of a group of figures, for the page: name, colour and the marker's outline as points of an SVG."""
    from matplotlib.markers import MarkerStyle

    entries = []
    for name, style in styles(names).items():
        marker: Any = MarkerStyle(style["marker"])
        (outline,) = marker.get_path().transformed(marker.get_transform()).to_polygons()
        points = " ".join(f"{x:.2f},{-y:.2f}" for x, y in outline)
        entries.append(dict(name=name, color=style["color"], points=points))
    return entries


def paired_times(records: list[Record]) -> list[Record]:
    """Rows whose time is the softmax baseline's median over all rows of their size, divided by the speedup.

    The rows' own times were measured at different moments, under other load; the speedup was measured in turn. A row
    without a speedup keeps its own time.
    """
    baseline: dict[int, list[float]] = {}
    for record in records:
        if record["baseline_p50_ms"]:
            baseline.setdefault(record["img_size"], []).append(record["baseline_p50_ms"])
    return [
        dict(record, latency_p50_ms=statistics.median(baseline[record["img_size"]]) / record["speedup"])
        if record["speedup"] and record["img_size"] in baseline
        else record
        for record in records
    ]


def over_tokens(records: list[Record], cost: str) -> tuple[Any, list[dict[str, str]]]:
    """Figure of one cost over resolution, and for each model its exponent and crossover.

    The x axis has the tokens of the softmax baseline, also for models that have other tokens or none.

    Args:
        records: Rows of one mode, dtype and so on, with one row for a model and resolution.
        cost: "latency_p50_ms", see ``paired_times``, "peak_memory_mib", or "speedup": with its spread, and without an
            exponent.
    """
    figure, axes = canvas()
    lines = []
    looks = styles(series_of(records))
    known = {r["img_size"]: r["tokens"] for r in sorted(records, key=is_softmax) if r["tokens"]}
    records = paired_times(records) if cost == "latency_p50_ms" else records
    records = [r for r in records if r[cost] and r["img_size"] in known]
    for name in series_of(records):
        rows = sorted((r for r in records if series_name(r) == name), key=lambda r: r["img_size"])
        tokens, values = [known[r["img_size"]] for r in rows], [r[cost] for r in rows]
        power = None if cost == "speedup" else exponent(tokens, values)
        label = plain_text(name) if power is None else f"{plain_text(name)}: N^{power:.2f}"
        axes.plot(tokens, values, label=label, markersize=6, linewidth=1.5, **looks[name])
        if cost == "speedup":
            spread = [[r["speedup_low"] or r[cost] for r in rows], [r["speedup_high"] or r[cost] for r in rows]]
            axes.vlines(tokens, *spread, color=looks[name]["color"], linewidth=1)
        line = dict(model=name, exponent="" if power is None else f"{power:.2f}", crossover="")
        timed = [r for r in rows if r["speedup_low"] is not None]
        if cost == "latency_p50_ms" and not is_softmax(rows[0]) and timed:
            tokens = [known[r["img_size"]] for r in timed]
            ratios = ([r[key] for r in timed] for key in ("speedup", "speedup_low", "speedup_high"))
            found = crossover(tokens, *ratios)
            line["crossover"] = crossover_text(tokens, found)
            if found[0] is not None and found[0] > min(tokens):
                axes.axvline(found[0], color=looks[name]["color"], linestyle=":", linewidth=1)
        lines.append(line)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens N of the softmax baseline\nimage side (px)",
        ylabel=(COSTS | SPEEDUP)[cost],
    )
    sides = sorted({r["img_size"] for r in records})
    axes.set_xticks([known[side] for side in sides], [f"{known[side]:,}\n{side:,}" for side in sides])
    axes.xaxis.minorticks_off()
    plain_numbers(axes.yaxis)
    axes.grid(alpha=0.3)
    legend_below(figure)
    return figure, lines


def trade_off(runs: list[list[Record]], cost: str, accuracy: str = "validation top-1 (%)") -> Optional[Any]:
    """Figure of top-1 over one cost: a point for each model, its mean over seeds, with the Pareto front drawn."""
    looks = styles(run_name(group[0]) for group in runs)
    known = [group for group in runs if any(record[cost] for record in group)]
    if not known:
        return None
    figure, axes = canvas()
    costs = [statistics.mean(record[cost] for record in group if record[cost]) for group in known]
    means = [statistics.mean(record["top1"] for record in group) for group in known]
    for group, x, y in zip(known, costs, means):
        top1 = [record["top1"] for record in group]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        name = run_name(group[0])
        point = dict(fmt=looks[name]["marker"], color=looks[name]["color"], markersize=8, capsize=3)
        axes.errorbar(x, y, yerr=spread or None, label=plain_text(name), **point)
    front = pareto(costs, means)
    best = [[values[i] for i in front] for values in (costs, means)]
    axes.plot(*best, color="#7F7F7F", linestyle="--", linewidth=1, zorder=0, label="Pareto front")
    axes.set(xscale="log", xlabel=AXES[cost], ylabel=accuracy)
    plain_numbers(axes.xaxis)
    axes.grid(alpha=0.3, which="both")
    legend_below(figure)
    return figure


def legend_below(figure: Any) -> None:
    """The legend outside of the axes, where it hides no point."""
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)


def plain_numbers(axis: Any) -> None:
    """20,000 instead of 2 x 10^4; where the range is small, between the powers of ten as well."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: Optional[int] = None) -> str:
            low, high = sorted(axis.get_view_interval())
            # two powers of ten leave no room between them, and 9 touches 10
            is_crowded = high > 100 * low or f"{x:e}".startswith("9")
            # matplotlib knows which of the others have room
            return f"{x:,.9g}" if not is_crowded and super().__call__(x, pos) else ""

    axis.set_major_formatter("{x:,.9g}")
    axis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))


def png_of_page(figure: Any) -> bytes:
    """The figure as the page shows it: without its legend, since a group has one, and small enough that its numbers
    can be read on a phone. The figure is changed."""
    for own in list(figure.legends):
        own.remove()
    figure.set_size_inches(4.8, 3.5)
    return png(figure, dots_per_inch=200)
