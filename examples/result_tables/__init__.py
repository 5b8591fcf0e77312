"""What all tables share: reading a results file, its layout as Markdown, and on what its rows were measured."""

import csv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "results"

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of a file in examples/results, but for those that record a failure."""
    with (RESULTS / name).open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if not row.get("error")]


def markdown(head: list[str], body: list[list[str]], below: str = "") -> str:
    """A table, and a line below it."""
    lines = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])
    return f"{lines}\n\n{below}" if below else lines


def cell(row: Row, name: str, digits: int = 0, unit: str = "") -> str:
    """A number with its unit; nothing where it wasn't measured."""
    return f"{float(row[name]):,.{digits}f}{unit}" if row[name] else ""


def measured(rows: Iterable[Row]) -> str:
    """On what the rows were measured: device, threads, dtype and versions, as far as their file records them."""
    rows = list(rows)
    devices = values(rows, "device_name")
    if devices and not all(row.get("device_name") for row in rows):
        devices.append("a processor that was not recorded")
    devices = devices or values(rows, "device")
    facts = [", ".join(devices)] * bool(devices)
    facts += [f"{number} CPU thread{'s' * (number != '1')}" for number in values(rows, "threads")]
    facts += values(rows, "dtype")
    # what follows the plus names the build, e.g. +cu132, which says nothing about a run on a processor
    facts += [
        f"{library} {version.split('+')[0]}" for library in ("torch", "timm") for version in values(rows, library)
    ]
    rounds = sorted({int(number) for number in values(rows, "rounds")})
    if rounds:
        facts.append(f"{rounds[0]} to {rounds[-1]} rounds" if len(rounds) > 1 else f"{rounds[0]} rounds")
    return f"*Measured on: {', '.join(facts)}.*"


def values(rows: Iterable[Row], column: str) -> list[str]:
    """The different values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))


def number_list(numbers: Iterable[str]) -> str:
    """The numbers with commas, and "and" before the last."""
    *first, last = numbers
    return f"{', '.join(first)} and {last}" if first else last
