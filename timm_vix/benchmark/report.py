"""One HTML page, and its figures as PNG, from the tables of ``timm-vix cost`` and ``timm-vix compare``.

The page is a single file without links to others, and opens from disk. It begins with what to use at which size.
Damaged lines of a table are counted and left out.
"""

import argparse
import base64
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from .._checks import InputError
from .._files import write_whole
from .._records import Record, grouped, key_of
from . import compare, cost
from .answer import Cell, answer, fastest_sentence, speedups
from .figures import (
    AXES,
    COSTS,
    SPEEDUP,
    is_softmax,
    legend,
    over_tokens,
    png,
    png_of_page,
    run_name,
    series_name,
    series_of,
    trade_off,
)
from .tables import DEVICE, Tables, read_tables

COST_COLUMNS = (
    *("model", "attention", "img_size", "tokens", "batch_size", "mode", "dtype", "compile", "params_m", "gflops"),
    *("latency_p50_ms", "latency_p90_ms", "speedup", "speedup_low", "speedup_high", "difference", "images_per_s"),
    *("epoch_images", "epoch_s", "peak_memory_mib", "checkpoint_mib", "first_call_ms", "rounds"),
    *("device_name", "threads"),
)
BEST = ("best_images_per_s", "best_batch_size")
# rows with the same values here are in the same figures
COST_SETTING = ("mode", "dtype", "compile", *DEVICE, "batch_size", "baseline")
COMPARE_SETTING = ("dataset", "recipe", *DEVICE)
MACHINE = ("device_name", "device", "threads", "dtype", "torch", "timm", "timm_vix")
COMPARE_COLUMNS = ("model", "start", "seeds", *compare.MEANS, "epochs", "img_size", "batch_size")


@dataclass
class Figure:
    """One figure: its file beside the page, and its smaller image in the page."""

    name: str
    alt: str
    caption: str
    file: bytes
    image: bytes

    @property
    def data(self) -> str:
        return base64.b64encode(self.image).decode()


@dataclass
class Group:
    """The figures of one setting, which share a legend, with a sentence and a table."""

    title: str
    sentence: str
    figures: list[Figure]
    legend: list[dict[str, str]]
    table: dict[str, Any]
    note: str = ""


@dataclass
class Page:
    """What the template shows. ``lead`` has the one figure that stands beside the answer."""

    answer: str
    setting: str
    speedups: Optional[dict[str, Any]]
    lead: Optional[Group]
    comparisons: list[Group]
    costs: list[Group]

    def groups(self) -> list[Group]:
        return [*([self.lead] if self.lead else []), *self.comparisons, *self.costs]


def report(paths: list[Path], out: Path) -> list[Path]:
    """Write the page and its figures, and return what was written.

    Args:
        paths: CSV files of ``timm-vix cost`` and ``timm-vix compare``, in any order.
        out: The page; figures go beside it as ``<name>_<figure>.png``.

    Raises:
        ValueError: for a file that is no such table, or a page in a table's place; nothing is written.
        OSError: for a file that cannot be written.
    """
    return write_page(read_tables(paths), paths, out)


def write_page(tables: Tables, paths: list[Path], out: Path) -> list[Path]:
    """``report`` of tables that were read from these paths."""
    if not out.name or out.is_dir():
        raise InputError(f"out={out} is a folder; expected the name of a file, such as report.html")
    if out.resolve() in {path.resolve() for path in paths}:
        raise InputError(f"out={out} is one of the tables, which the page would replace; give another name")
    page = collect(tables)
    text = render(page, tables)
    figures = [figure for group in page.groups() for figure in group.figures]
    written = [out.with_name(f"{out.stem}_{name}.png") for name in distinct(figure.name for figure in figures)]
    for path, figure in zip(written, figures):
        write_whole(path, figure.file)
    write_whole(out, text.encode())
    return [out, *written]


def collect(tables: Tables) -> Page:
    """The answer, and all groups of figures; first the settings that answer, which are those with most to compare."""
    comparisons = [
        list(grouped(runs, ("model", "start")).values()) for runs in grouped(tables.runs, COMPARE_SETTING).values()
    ]
    costs = list(grouped(tables.costs, COST_SETTING).values())
    comparisons.sort(key=len, reverse=True)
    costs.sort(key=lambda rows: (rows[0]["mode"] == "infer", len(sizes_of(rows)), len(rows)), reverse=True)
    rows, runs = costs[0] if costs else [], comparisons[0] if comparisons else []
    of_runs = [comparison_group(models) for models in comparisons]
    of_costs = [cost_group(setting) for setting in costs if len(sizes_of(setting)) > 1]
    # accuracy over latency stands beside the answer or, where no model was trained, speed over resolution
    lead = None
    if first := next((group for group in [*of_runs, *of_costs] if group.figures), None):
        lead = Group(first.title, "", [first.figures.pop(0)], first.legend, {})
    title = cost_title(rows[0]) if rows else comparison_title(runs[0][0])
    measured = table(*speedups(rows, runs)) if any(row["speedup"] for row in rows) else None
    return Page(answer(rows, runs), title, measured, lead, of_runs, of_costs)


def sizes_of(rows: list[Record]) -> set[int]:
    """The image sizes that have a place on an axis of tokens."""
    return {row["img_size"] for row in rows if row["tokens"]}


def comparison_group(runs: list[list[Record]]) -> Group:
    """Accuracy against each cost for one data set, recipe and machine, and the means over seeds."""
    title, figures = comparison_title(runs[0][0]), []
    for name, label in AXES.items():
        drawn = trade_off(runs, name)
        if drawn is not None:
            alt = f"Validation top-1 over {label} for {len(runs)} models, with the Pareto front"
            caption = f"Top-1 over {label}. Dashed: the Pareto front."
            file = f"trade_off_{slug(name)}_{slug(title)}"
            figures.append(Figure(file, f"{title}: {alt}", caption, png(drawn), png_of_page(drawn)))
    rows = []
    for group in runs:
        means = [compare.mean_text([record[name] for record in group]) for name in compare.MEANS]
        last = [group[0][name] for name in ("epochs", "img_size", "batch_size")]
        rows.append([group[0]["model"], group[0]["start"], len(group), *means, *last])
    names = [run_name(group[0]) for group in runs]
    recipe = f"Recipe: {runs[0][0]['recipe']}"
    return Group(title, "", figures, legend(names) if figures else [], table(COMPARE_COLUMNS, rows), recipe)


def cost_group(rows: list[Record]) -> Group:
    """Cost over resolution in one setting, and each model's exponents and crossover."""
    first = rows[0]
    title, figures = cost_title(first), []
    trends: dict[str, dict[str, str]] = {}
    for name, label in (SPEEDUP | COSTS).items():
        if not any(row[name] for row in rows):
            continue
        drawn, lines = over_tokens(rows, name)
        where = place(first)
        parts = (name, *(first[key] for key in ("mode", "dtype", "compile")), where, first["threads"])
        file = slug(" ".join(map(str, (*parts, first["batch_size"], first["baseline"]))))
        alt = f"{title}: {label} over tokens on logarithmic axes, one line for each of {len(lines)} models"
        crossovers = " Dotted: crossovers with softmax." * (name == "latency_p50_ms")
        caption = f"{label} over tokens.{crossovers}"
        figures.append(Figure(file, alt, caption, png(drawn), png_of_page(drawn)))
        for line in lines:
            trend = trends.setdefault(line["model"], dict(faster=""))
            trend[label] = line["exponent"]
            trend["faster"] = trend["faster"] or line["crossover"]
    head = ("model", *(f"exponent of {label}" for label in COSTS.values()), "faster than softmax")
    others = {series_name(row) for row in rows if not is_softmax(row)}
    body = [
        [name, *(t.get(label, "") for label in COSTS.values()), t["faster"] or "unknown" * (name in others)]
        for name, t in trends.items()
    ]
    return Group(title, fastest_sentence(rows), figures, legend(series_of(rows)), table(head, body))


def cost_title(row: Record) -> str:
    """What the rows of one setting of ``timm-vix cost`` have in common."""
    mode = dict(infer="inference", train="training").get(row["mode"], row["mode"])
    compiled = ", compiled" * (row["compile"] == "on")
    what = f"{mode}, {row['dtype']}{compiled}, batch {row['batch_size']}"
    return f"{row['baseline']}: {what}, {place(row)}, threads: {row['threads']}"


def comparison_title(row: Record) -> str:
    """The images and the machine of one setting of ``timm-vix compare``."""
    return f"{row['dataset']}, {place(row)}, threads: {row['threads']}"


def place(row: Record) -> str:
    """A device with its name, where that is known."""
    return f"{row['device']} ({row['device_name']})" if row["device_name"] else f"{row['device']}"


def all_costs(costs: list[Record]) -> dict[str, Any]:
    """The table of all rows, each with the speed at the best batch size of its setting."""
    setting = tuple(name for name in cost.KEY if name != "batch_size")
    best = {key: max(rows, key=lambda row: row["images_per_s"] or 0) for key, rows in grouped(costs, setting).items()}
    rows = []
    for record in costs:
        top = best[key_of(record, setting)]
        rows.append([*(record[name] for name in COST_COLUMNS), top["images_per_s"], top["batch_size"]])
    return table((*COST_COLUMNS, *BEST), rows)


def slug(text: str) -> str:
    """A part of a file's name, which may have 255 bytes."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:150]


def distinct(names: Iterable[str]) -> Iterator[str]:
    """The names, each with a number behind it if it came before."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> dict[str, Any]:
    """A table for the template, from values or cells. A column of numbers stands on the right."""
    names, body = list(head), [[cell if isinstance(cell, Cell) else cell_of(cell) for cell in row] for row in rows]
    numeric = [all(row[i].value is not None or is_number(row[i].text) for row in body) for i in range(len(names))]
    return dict(head=list(zip(names, numeric)), rows=body)


def cell_of(value: Any) -> Cell:
    """A cell of a table; one with a spread is sorted by its mean."""
    text = "" if value is None else str(value)
    return Cell(text, float(text.split()[0]) if " ± " in text and is_number(text) else None)


def is_number(text: str) -> bool:
    """Whether a column with this cell can be one of numbers; an empty cell is in any column."""
    try:
        float(text.split(" ± ")[0] or 0)
    except ValueError:
        return False
    return True


def render(page: Page, tables: Tables) -> str:
    """The page as HTML. Whatever a table says is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("timm_vix", "benchmark")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = [*tables.costs, *tables.runs]
    return environment.get_template("report.html").render(
        page=page,
        machines=table(MACHINE, sorted({tuple(str(row[name] or "") for name in MACHINE) for row in rows})),
        files=table(("file", "kind", "good rows", "failed", "damaged lines"), tables.files),
        failures=tables.failures,
        costs=all_costs(tables.costs) if tables.costs else None,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tables", nargs="+", type=Path, metavar="CSV", help="tables of timm-vix cost and timm-vix compare"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; default: report.html")


def main(arguments: argparse.Namespace) -> None:
    """Write the report that the command line asks for."""
    tables = read_tables(arguments.tables)
    written = write_page(tables, arguments.tables, arguments.out)
    for name, _, good, failed, damaged in tables.files:
        print(f"{name}: {good} good rows, {failed} failed, {damaged} damaged lines")
    print(f"{written[0]} and {len(written) - 1} figures beside it")
