"""The rows of a report, read from tables of ``timm-vix cost`` and ``timm-vix compare``."""

from dataclasses import dataclass
from pathlib import Path

from .._checks import InputError
from .._records import Record, header_of, key_of, read_records
from . import compare, cost
from .cost_text import describe
from .runs import Run

# rows of a run that agree in these, too, are the same measurement
DEVICE = ("device", "device_name", "threads")


@dataclass
class Tables:
    """What was read: good rows, what failed and was not measured later, and for each file its counts."""

    costs: list[Record]
    runs: list[Record]
    files: list[list[str]]  # name, kind, good rows, failed rows, damaged lines
    failures: list[str]


def read_tables(paths: list[Path]) -> Tables:
    """Read the tables; of rows measured twice the last counts.

    Raises:
        ValueError: for a file that is neither of the two kinds, or if there is no good row at all.
    """
    costs: list[Record] = []
    runs: list[Record] = []
    files = []
    failures: dict[tuple, str] = {}
    for path in paths:
        is_compare = "top1" in header_of(path)
        records, damaged = read_records(path, compare.COLUMNS if is_compare else cost.COLUMNS)
        good = [record for record in records if is_usable(record, is_compare)]
        failed = [record for record in records if record["error"] is not None]
        damaged += len(records) - len(good) - len(failed)
        (runs if is_compare else costs).extend(good)
        kind = "comparison" if is_compare else "cost"
        files.append([path.name, kind, str(len(good)), str(len(failed)), str(damaged)])
        for record in failed:
            failures[key_of(record, Run._fields if is_compare else cost.KEY)] = (
                f"{record['model']}, seed {record['seed']}, from {record['start']}: {record['error']}"
                if is_compare
                else describe(record)
            )
    if not costs and not runs:
        raise InputError(f"{', '.join(map(str, paths))}: no good row to report")
    done = {key_of(record, cost.KEY) for record in costs} | {key_of(record, Run._fields) for record in runs}
    left = [text for key, text in failures.items() if key not in done]
    return Tables(last_of_each(costs, cost.KEY), last_of_each(runs, Run._fields + DEVICE), files, left)


def last_of_each(records: list[Record], key: tuple[str, ...]) -> list[Record]:
    """The rows, and of those with the same key the last."""
    return list({key_of(record, key): record for record in records}.values())


def is_usable(record: Record, is_compare: bool) -> bool:
    """Whether a row has what every figure and table needs, and no number that cannot be."""
    needed = ("dataset", "model", "start", "top1") if is_compare else (*cost.KEY, "baseline", "latency_p50_ms")
    filled = all(record[name] is not None for name in needed) and record["error"] is None
    return filled and all(0 <= value < float("inf") for value in record.values() if isinstance(value, (int, float)))
