"""What to use at which size, from the rows of one setting: the sentence and the table that a report opens with."""

import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Optional

from .._records import Record
from .figures import is_softmax, series_name, series_of

# A model that scores this many points of top-1 less than the best is not recommended, however fast it is.
ACCEPTED_LOSS = 5.0


@dataclass
class Cell:
    """A cell of a table: its text, what it is sorted by if that is not the text, and "fastest", "faster" or ""."""

    text: str
    value: Optional[float] = None
    mark: str = ""


def fastest(
    rows: list[Record], allowed: Optional[Collection[str]] = None, with_baseline: bool = True
) -> dict[int, str]:
    """The fastest model of each image size; the softmax baseline where no other is faster.

    A model is faster if its speedup is above 1 and not called "none" or "slower" (``measure.statistics.verdict``).

    Args:
        rows: Rows of one setting, timed beside the same baseline. Those without a speedup are left out.
        allowed: The models that may be chosen besides the baseline; None: all.
        with_baseline: Whether the baseline may be chosen; otherwise a slower model is, and sizes without one are left
            out.
    """
    winners: dict[int, Record] = {}
    for row in rows:
        size = row["img_size"]
        is_candidate = is_faster(row) if with_baseline else is_other(row)
        is_candidate = is_candidate and (allowed is None or row["model"] in allowed)
        if is_candidate and (size not in winners or row["speedup"] > winners[size]["speedup"]):
            winners[size] = row
    sizes = sorted({row["img_size"] for row in rows if row["speedup"] is not None})
    if not with_baseline:
        sizes = [size for size in sizes if size in winners]
    return {size: winners[size]["model"] if size in winners else rows[0]["baseline"] for size in sizes}


def is_other(row: Record) -> bool:
    """Whether a row shows another mixer than softmax attention, timed beside it."""
    return row["attention"] == "fused" and not is_softmax(row) and row["speedup"] is not None


def is_faster(row: Record) -> bool:
    """Whether a row shows a mixer that is faster than softmax attention; with few rounds by the ratio alone."""
    return is_other(row) and row["speedup"] > 1 and row["difference"] not in ("none", "slower")


def by_size(winners: dict[int, str], rows: list[Record]) -> str:
    """E.g. "vit_tiny_patch16_224 (softmax attention) at 224 px and vix_linformer_tiny at 384 to 1,024 px".

    A size of ``rows`` without a winner parts the sizes before it from those after it.
    """
    baseline, before = rows[0]["baseline"], None
    spans: list[tuple[str, list[int]]] = []
    for size in sorted({row["img_size"] for row in rows}):
        model = winners.get(size)
        if model is not None and model != before:
            spans.append((model, []))
        if model is not None:
            spans[-1][1].append(size)
        before = model
    return join(
        f"{model}{' (softmax attention)' * (model == baseline)} at {span_text(sizes)}" for model, sizes in spans
    )


def span_text(sizes: list[int]) -> str:
    """Measured sizes that follow each other: "224 px", "224 and 384 px", "224 to 512 px"."""
    ends = [f"{size:,}" for size in (sizes[0], sizes[-1])]
    return f"{(' and ' if len(sizes) == 2 else ' to ').join(ends[: len(sizes)])} px"


def join(parts: Iterable[str]) -> str:
    """E.g. "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def mean_top1(runs: list[list[Record]]) -> dict[str, float]:
    """Top-1 of each model of a comparison, the mean over seeds, by its name without the tag of its weights.

    Of a model that was trained from several initial weights, the best counts.
    """
    means: dict[str, float] = {}
    for group in runs:
        model = without_tag(group[0]["model"])
        means[model] = max(means.get(model, 0.0), statistics.mean(record["top1"] for record in group))
    return means


def without_tag(model: str) -> str:
    """A model's name and keywords, without the tag of its weights; a folder and a place of the Hub have no tag."""
    name, _, keywords = model.partition(" ")
    if ":" in name:
        return model
    return f"{name.partition('.')[0]} {keywords}".strip()


def fastest_sentence(rows: list[Record]) -> str:
    """The fastest model of each size in one setting."""
    winners = fastest(rows)
    if not winners:
        return "No row of this setting was timed beside softmax attention."
    return f"Fastest: {by_size(winners, rows)}."


def answer(rows: list[Record], runs: list[list[Record]]) -> str:
    """One sentence on what to use at which size.

    Args:
        rows: Rows of one setting of ``timm-vix cost``, or none.
        runs: Rows of one setting of ``timm-vix compare``, those of a model together, or none. They limit the choice to
            models within ``ACCEPTED_LOSS`` of the best, where they tell the accuracy of any model of ``rows``.
    """
    if not rows or not fastest(rows):
        return accuracy_sentence(runs) if runs else "No model was timed beside softmax attention: none is recommended."
    baseline, winners = rows[0]["baseline"], fastest(rows)
    top1 = mean_top1(runs)
    known = {
        model: top1[own] for model in (baseline, *(row["model"] for row in rows)) if (own := without_tag(model)) in top1
    }
    if not known:
        text = f"Use {by_size(winners, rows)}, the fastest here"
        return f"{text}; {accuracy_sentence(runs, 'the most accurate')}" if runs else f"{text}."
    best, score = best_of(runs)
    allowed = [model for model, top1 in known.items() if top1 >= score - ACCEPTED_LOSS]
    chosen = fastest(rows, allowed, with_baseline=baseline in allowed or baseline not in known)
    limit = f"lose at most {ACCEPTED_LOSS:g} points of top-1 to the best, {best} with {score:.1f} % on {where(runs)}"
    if not chosen:
        return f"None of the models that were timed here is known to {limit}."
    text = f"Use {by_size(chosen, rows)}: the fastest of the models that {limit}"
    if baseline in chosen.values() and baseline not in known:
        text += f"; the accuracy of {baseline} isn't known, but no other is faster there"
    if winners != chosen:
        text += f"; without regard to accuracy, {by_size(winners, rows)} would be faster"
    return f"{text}."


def accuracy_sentence(runs: list[list[Record]], start: str = "The most accurate") -> str:
    """The best model of a comparison."""
    best, score = best_of(runs)
    return f"{start} of {len(runs)} models trained on {where(runs)} is {best} with {score:.1f} % top-1."


def best_of(runs: list[list[Record]]) -> tuple[str, float]:
    """Name and top-1 of the most accurate model of a comparison."""
    means = [statistics.mean(record["top1"] for record in group) for group in runs]
    best = max(range(len(runs)), key=lambda i: means[i])
    return runs[best][0]["model"], means[best]


def where(runs: list[list[Record]]) -> str:
    """The images of a comparison: "caltech101 at 160 px"."""
    first = runs[0][0]
    size = f" at {first['img_size']:,} px" if first["img_size"] else ""
    return f"{first['dataset'].partition(' (')[0]}{size}"


def speedups(rows: list[Record], runs: list[list[Record]]) -> tuple[list[str], list[list[Cell]]]:
    """Head and rows of a table: each model's speed over softmax at each size, and its top-1 where that is known."""
    sizes = sorted({row["img_size"] for row in rows})
    winners, top1 = fastest(rows), mean_top1(runs)
    body = []
    for name in series_of(rows):
        own = {row["img_size"]: row for row in rows if series_name(row) == name}
        cells = [Cell(name)]
        for size in sizes:
            row = own.get(size)
            if row is None or row["speedup"] is None:
                cells.append(Cell(""))
                continue
            mark = "faster" if is_faster(row) else ""
            mark = "fastest" if mark and winners[size] == row["model"] else mark
            few = " ?" if row["difference"] == "unknown" else ""
            digits = 2 if row["speedup"] < 10 else 1
            cells.append(Cell(f"{row['speedup']:.{digits}f}{few}", row["speedup"], mark))
        if top1:
            accuracy = top1.get(without_tag(name))
            cells.append(Cell("" if accuracy is None else f"{accuracy:.1f}"))
        body.append(cells)
    return ["model", *(f"{size:,} px" for size in sizes), *["top-1 (%)"] * bool(top1)], body
