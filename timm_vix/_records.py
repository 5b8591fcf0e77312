"""Rows of measurements: appended to a CSV one by one, and read back with damaged lines counted and left out.

A table is described by its columns, ``{name: str, int or float}``. An empty cell is None. No cell holds a line break,
and each line is read by itself, so that a line that was cut off inside quotation marks spoils no other.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ._checks import InputError
from ._files import write_whole

Columns = Mapping[str, type]
Record = dict[str, Any]


class LaterText(str):
    """The type of a last column of text that tables of earlier versions lack; it is empty in their rows."""


def key_of(record: Record, names: Iterable[str]) -> tuple:
    """The values of some columns."""
    return tuple(record[name] for name in names)


def grouped(records: Iterable[Record], names: Iterable[str]) -> dict[tuple, list[Record]]:
    """The records by their values of some columns, in the order in which they come."""
    names = tuple(names)
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(key_of(record, names), []).append(record)
    return groups


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as a table for the terminal; a line with fewer cells than the first widens no column."""
    whole = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*whole)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def line_of(values: Iterable[Any]) -> str:
    """One line of a CSV; a line break in a value becomes a space."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(["" if value is None else value for value in values])
    return " ".join(text.getvalue().splitlines()) + "\n"


def check_writable(path: Path) -> None:
    """Raise OSError if rows can't be appended, before anything is measured for them; no new file is left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        open(path, "ab").close()
        if is_new and path.stat().st_size == 0:  # another process may have added a row
            path.unlink()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def append_record(path: Path, columns: Columns, record: Record) -> None:
    """Add a row, with the header before the first one and a cut-off last line ended.

    Raises:
        OSError: in one line, with the file's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            text = line_of(record.get(name) for name in columns)
            if file.tell() == 0:
                text = line_of(columns) + text
            else:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = "\n" + text
            file.write(text.encode())  # mode "a": always at the end
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror}; the rows before are kept; the same command continues"
        ) from error


def earlier_columns(columns: Columns) -> list[str]:
    """The names of the columns that tables of earlier versions have as well."""
    return [name for name, kind in columns.items() if not issubclass(kind, LaterText)]


def add_later_columns(path: Path, columns: Columns) -> None:
    """Give a table of an earlier version the columns that it lacks, empty, so that rows with them can be appended.

    Raises:
        OSError: in one line, with the file's name; the table stays.
    """
    earlier = earlier_columns(columns)
    if path.exists() and lines_of(path) and header_of(path) == earlier != list(columns):
        cells = "," * (len(columns) - len(earlier)) + "\n"
        lines = [line_of(columns), *(row.rstrip("\r") + cells for row in lines_of(path)[1:])]
        write_whole(path, "".join(lines).encode())


def lines_of(path: Path) -> list[str]:
    """The lines of a file that aren't empty.

    Raises:
        InputError: for a file that is not there or cannot be read.
    """
    try:
        # utf-8-sig: a spreadsheet puts a mark of its own before the first column's name
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected a CSV file") from error
    return [line for line in text.split("\n") if line.strip()]


def header_of(path: Path) -> list[str]:
    """The column names of a CSV; empty for an empty file and for one that is no CSV.

    Raises:
        InputError: for a file that is not there or cannot be read.
    """
    try:
        return next(csv.reader(lines_of(path)[:1]), [])
    except csv.Error:
        return []


def earlier_records(path: Path, columns: Columns) -> tuple[list[Record], int]:
    """The rows to which others are to be appended, as ``read_records`` gives them; none for an empty file."""
    return read_records(path, columns, exact=True) if path.exists() and lines_of(path) else ([], 0)


def read_records(path: Path, columns: Columns, exact: bool = False) -> tuple[list[Record], int]:
    """The good rows, and the number of damaged lines.

    A line is damaged if it has too few or too many cells, or a cell that is not of its column's type, as a number that
    is not finite. Columns that are not asked for are left out.

    Args:
        exact: Ask for these columns and no other, since rows are to be appended, after ``add_later_columns``.

    Raises:
        InputError: for a file that cannot be read, or that lacks a column.
    """
    header = header_of(path)
    missing = [name for name in earlier_columns(columns) if name not in header]
    if missing or (exact and header not in (list(columns), earlier_columns(columns))):
        extra = [name for name in header if name not in columns]
        reasons = [f"it lacks {', '.join(missing)}"] * bool(missing) + [f"it has also {', '.join(extra)}"] * bool(extra)
        raise InputError(
            f"{path} was written by another version or program: "
            f"{'; '.join(reasons) or 'its columns are in another order'}"
        )
    records, damaged = [], 0
    for line in lines_of(path)[1:]:
        try:
            (cells,) = csv.DictReader([line], header, strict=True)
            if None in cells or None in cells.values():
                raise InputError("too many or too few cells")
            record = {name: kind(cells[name]) if cells.get(name) else None for name, kind in columns.items()}
            if not all(math.isfinite(value) for value in record.values() if isinstance(value, float)):
                raise InputError("a number that no measurement gives")
            records.append(record)
        except (ValueError, csv.Error):
            damaged += 1
    return records, damaged
