"""One HTML page, and its figures as PNG, from the tables of ``timm-vix cost`` and ``timm-vix compare``.

The page is a single file without links to others, and opens from disk. Damaged lines of a table are counted and left
out.
"""

import argparse
import base64
import html
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from .._files import write_whole
from .._records import Record, header_of, key_of, read_records
from . import compare, cost
from .figures import AXES, COSTS, SPEEDUP, over_tokens, png, trade_off

COST_COLUMNS = (
    *("model", "attention", "img_size", "tokens", "batch_size", "mode", "dtype", "compile", "params_m", "gflops"),
    *("latency_p50_ms", "latency_p90_ms", "speedup", "speedup_low", "speedup_high", "difference", "images_per_s"),
    *("epoch_s", "peak_memory_mib", "checkpoint_mib", "first_call_ms", "rounds", "device_name", "threads"),
)
BEST = ("best_images_per_s", "best_batch_size")
# what makes two rows the same measurement; machines of the same kind of device differ by their name
RUN_KEY = ("dataset", "model", "start", "recipe", "seed")
PLACE = ("device", "device_name", "threads")
COMPARE_COLUMNS = ("model", "start", "seeds", *compare.MEANS, "epochs", "img_size", "batch_size")
NOTES = (
    "GFLOPs count a multiply-add as two operations, for one image; with mode train they are those of a training "
    "step, backward included. speedup is the softmax baseline's time, through scaled_dot_product_attention, over the "
    "model's: the two are timed in turn, and low and high are the 10th and 90th percentile over the rounds. A spread "
    "that holds 1 is no difference: none; fewer than five rounds leave it unknown. unfused is softmax as two matrix "
    "products, as most papers have it. Memory "
    "is the peak of inference or of a training step, weights included. Of rows measured twice the last counts. "
    "ms per call over resolution are the baseline's, the median of all rows of a size, divided by the speedup, since "
    "rows are measured under different load; the table has each row's own."
)


def read_tables(paths: list[Path]) -> tuple[list[Record], list[Record], list[list[str]], list[str]]:
    """Rows of cost tables, rows of comparisons, and for each file its name, kind, good, failed and damaged rows; then
    a line for each failure that no later attempt made good.

    Raises:
        ValueError: for a file that is neither, or if there is no good row at all.
    """
    costs: list[Record] = []
    runs: list[Record] = []
    files = []
    failures: dict[tuple, str] = {}
    for path in paths:
        is_compare = "top1" in header_of(path)
        records, damaged = read_records(path, compare.COLUMNS if is_compare else cost.COLUMNS)
        good = [record for record in records if usable(record, is_compare)]
        failed = [record for record in records if record["error"] is not None]
        damaged += len(records) - len(good) - len(failed)
        (runs if is_compare else costs).extend(good)
        kind = "comparison" if is_compare else "cost"
        files.append([path.name, kind, str(len(good)), str(len(failed)), str(damaged)])
        for record in failed:
            failures[key_of(record, RUN_KEY if is_compare else cost.KEY)] = (
                f"{record['model']}, seed {record['seed']}, from {record['start']}: {record['error']}"
                if is_compare
                else cost.describe(record)
            )
    if not costs and not runs:
        raise ValueError(f"{', '.join(map(str, paths))}: no good row to report")
    done = {key_of(record, cost.KEY) for record in costs} | {key_of(record, RUN_KEY) for record in runs}
    told = [text for key, text in failures.items() if key not in done]
    return last_of_each(costs, cost.KEY), last_of_each(runs, RUN_KEY + PLACE), files, told


def last_of_each(records: list[Record], key: tuple[str, ...]) -> list[Record]:
    """The rows, and of those with the same key the last."""
    return list({key_of(record, key): record for record in records}.values())


def usable(record: Record, is_compare: bool) -> bool:
    """Whether a row has what every figure and table needs, and no number that nothing can be."""
    needed = ("dataset", "model", "start", "top1") if is_compare else (*cost.KEY, "baseline", "latency_p50_ms")
    filled = all(record[name] is not None for name in needed) and record["error"] is None
    return filled and all(0 <= value < float("inf") for value in record.values() if isinstance(value, (int, float)))


def report(paths: list[Path], out: Path) -> list[Path]:
    """Write the page and its figures, and return what was written.

    Args:
        paths: CSV files of ``timm-vix cost`` and ``timm-vix compare``, in any order.
        out: The page; figures go beside it as ``<name>_<figure>.png``.

    Raises:
        ValueError: for a file that is no such table, or a page in a table's place; nothing is written.
        OSError: for a file that cannot be written.
    """
    if out.resolve() in {path.resolve() for path in paths}:
        raise ValueError(f"out={out} is one of the tables, which the page would replace; give another name")
    costs, runs, files, failures = read_tables(paths)
    figures: dict[str, bytes] = {}
    body = [measured_on(costs, runs, files, failures)]
    if runs:
        body.append(comparison_section(runs, figures))
    if costs:
        body.append(cost_section(costs, figures))
    page = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    written = [out.with_name(f"{out.stem}_{name}.png") for name in figures]
    for path, image in zip(written, figures.values()):
        write_whole(path, image)
    write_whole(out, page.replace("<!-- body -->", "\n".join(body)).encode())
    return [out, *written]


def measured_on(costs: list[Record], runs: list[Record], files: list[list[str]], failures: list[str]) -> str:
    """What was measured on what: machines, versions, files with their failed and damaged rows."""
    names = ("device_name", "device", "threads", "dtype", "torch", "timm", "timm_vix")
    machines = sorted({tuple(str(record[name] or "") for name in names) for record in [*costs, *runs]})
    counts = table(("file", "kind", "good rows", "failed", "damaged lines"), files)
    text = f"<h2>What was measured on what</h2>{table(names, machines)}{counts}<p class='note'>{html.escape(NOTES)}</p>"
    if failures:
        text += f"<p>Failed:</p><ul>{''.join(f'<li>{html.escape(failure)}</li>' for failure in failures)}</ul>"
    return text


def comparison_section(runs: list[Record], figures: dict[str, bytes]) -> str:
    """Accuracy against each cost, and the means over seeds: of each data set, recipe and machine apart."""
    settings: dict[tuple, dict[tuple, list[Record]]] = {}
    for record in runs:
        models = settings.setdefault(key_of(record, ("dataset", "recipe", *PLACE)), {})
        models.setdefault(key_of(record, ("model", "start")), []).append(record)
    parts = ["<h2>Accuracy against cost</h2>"]
    for number, ((dataset, recipe, device, machine, threads), models) in enumerate(settings.items(), 1):
        own = list(models.values())
        what = f"{dataset}, {place(device, machine)}, threads: {threads}"
        images = []
        for name, label in AXES.items():
            drawn = trade_off(own, name)
            if drawn is not None:
                title = f"trade_off_{slug(name)}" + (f"_{number}_{slug(dataset)}" if len(settings) > 1 else "")
                figures[title] = png(drawn)
                alt = f"Validation top-1 over {label} for {len(own)} models, with the Pareto front"
                images.append(picture(figures[title], alt, f"{what}: top-1 over {label}. Dashed: the Pareto front."))
        parts.append(f"<div class='figures'>{''.join(images)}</div>")
        rows = []
        for group in own:
            means = [compare.mean_text([record[name] for record in group]) for name in compare.MEANS]
            last = [str(group[0][name]) for name in ("epochs", "img_size", "batch_size")]
            rows.append([group[0]["model"], group[0]["start"], str(len(group)), *means, *last])
        parts.append(f"<h3>{html.escape(what)}</h3>{table(COMPARE_COLUMNS, rows)}")
        parts.append(f"<p class='note'>Recipe: {html.escape(str(recipe))}</p>")
    return "\n".join(parts)


def cost_section(costs: list[Record], figures: dict[str, bytes]) -> str:
    """Cost over resolution for each setting with several sizes, and all rows."""
    names = ("mode", "dtype", "compile", "device", "device_name", "threads", "batch_size", "trunk")
    groups: dict[tuple, list[Record]] = {}
    for record in costs:
        values = dict(record, trunk=record["baseline"])
        groups.setdefault(tuple(values[name] for name in names), []).append(record)
    parts = ["<h2>Cost over resolution</h2>"]
    for key, group in groups.items():
        if len({record["img_size"] for record in group if record["tokens"]}) < 2:
            continue
        mode, dtype, compiled, device, machine, threads, batch, trunk = key
        where = place(device, machine)
        what = f"{mode}, {dtype}, batch {batch}, {where}, threads: {threads}{', compiled' * (compiled == 'on')}"
        images = []
        trends: dict[str, dict[str, str]] = {}
        for name, label in (COSTS | SPEEDUP).items():
            if not any(record[name] for record in group):
                continue
            drawn, lines = over_tokens(group, name)
            title = slug(f"{name} {mode} {dtype} {compiled} {where} {threads} {batch} {trunk}")
            figures[title] = png(drawn)
            alt = f"{label} over tokens on logarithmic axes, one line for each of {len(lines)} models"
            caption = f"{what}, beside {trunk}: {label}. Dotted: crossovers with softmax."
            images.append(picture(figures[title], alt, caption))
            for line in lines:
                trend = trends.setdefault(line["model"], dict(faster=""))
                trend[label] = line["exponent"]
                trend["faster"] = trend["faster"] or line["crossover"]
        parts += [f"<h3>{html.escape(f'{trunk}: {what}')}</h3><div class='figures'>{''.join(images)}</div>"]
        columns = [f"exponent of {label}" for label in COSTS.values()]
        slopes = [[model, *(t.get(label, "") for label in COSTS.values()), t["faster"]] for model, t in trends.items()]
        parts.append(table(("model", *columns, "faster than softmax"), slopes))
    if len(parts) == 1:
        parts.append("<p>Figures over resolution need rows of several image sizes in the same setting.</p>")
    best: dict[tuple, Record] = {}
    for record in sorted(costs, key=lambda record: record["images_per_s"] or 0):
        best[setting_of(record)] = record
    rows = []
    for record in costs:
        top = best[setting_of(record)]
        rows.append([*(record[name] for name in COST_COLUMNS), top["images_per_s"], top["batch_size"]])
    parts.append(
        f"<h2>All costs</h2><p>A click on a column's name sorts by it.</p>{table((*COST_COLUMNS, *BEST), rows)}"
    )
    return "\n".join(parts)


def place(device: str, machine: str) -> str:
    """A device with its name, where that is known."""
    return f"{device} ({machine})" if machine else f"{device}"


def setting_of(record: Record) -> tuple:
    """All that tells rows apart but the batch size."""
    return key_of(record, (name for name in cost.KEY if name != "batch_size"))


def slug(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table that can be sorted; numbers stand on the right."""
    names, body = list(head), [["" if cell is None else cell for cell in row] for row in rows]
    numeric = [all(is_number(row[i]) or row[i] == "" for row in body) for i in range(len(names))]
    kinds = [" class='number'" if is_numeric else "" for is_numeric in numeric]
    cells = "".join(
        f"<th scope='col'{kind}><button type='button'>{html.escape(name)}</button></th>"
        for name, kind in zip(names, kinds)
    )
    lines = "".join(
        "<tr>"
        + "".join(f"<td{kind}{value_of(cell)}>{html.escape(f'{cell}')}</td>" for cell, kind in zip(row, kinds))
        + "</tr>"
        for row in body
    )
    return f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"


def is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) or bool(re.fullmatch(r"[\d.e+-]+( ± [\d.e+-]+)?", str(cell)))


def value_of(cell: Any) -> str:
    """What a cell with a spread is sorted by: its mean."""
    return f" data-value='{cell.split()[0]}'" if isinstance(cell, str) and " ± " in cell else ""


def picture(image: bytes, alt: str, caption: str) -> str:
    data = base64.b64encode(image).decode()
    return (
        f"<figure><img alt='{html.escape(alt, quote=True)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="+", type=Path, metavar="CSV", help="of timm-vix cost and timm-vix compare")
    parser.add_argument("--out", type=Path, default=Path("report.html"))


def main(arguments: argparse.Namespace) -> None:
    """Write the report that the command line asks for."""
    _, _, files, _ = read_tables(arguments.tables)
    written = report(arguments.tables, arguments.out)
    for name, _, good, failed, damaged in files:
        print(f"{name}: {good} good rows, {failed} failed, {damaged} damaged lines")
    print(f"{written[0]} and {len(written) - 1} figures beside it")
