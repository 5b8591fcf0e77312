"""Rows of measurements: appended to a CSV one by one, and read back with damaged lines counted and left out.

A table is described by its columns, ``{name: str, int or float}``. An empty cell is None; no cell holds a line break,
so a line that was cut off or overwritten spoils no other.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Columns = Mapping[str, type]
Record = dict[str, Any]


def key_of(record: Record, names: Iterable[str]) -> tuple:
    return tuple(record[name] for name in names)


def line_of(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(["" if value is None else value for value in values])
    return " ".join(text.getvalue().split("\n")) + "\n"


def check_writable(path: Path) -> None:
    """Raise OSError if rows can't be appended, before anything is measured for them; no new file is left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        open(path, "ab").close()
        if is_new:
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
            text = line_of([record.get(name) for name in columns])
            if file.tell() == 0:
                text = line_of(list(columns)) + text
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


def header_of(path: Path) -> list[str]:
    """The column names of a CSV; empty for an empty file.

    Raises:
        ValueError: for a file that is not there or cannot be read.
    """
    try:
        # utf-8-sig: a spreadsheet puts a mark of its own before the first column's name
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            return split(file.readline().rstrip("\r\n")) or []
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; expected a CSV file") from error


def split(line: str) -> list[str]:
    """The cells of one line; none if it is no CSV."""
    try:
        return next(csv.reader([line.replace("\0", "\ufffd")], strict=True), [])
    except csv.Error:
        return []


def read_records(path: Path, columns: Columns, exact: bool = False) -> tuple[list[Record], int]:
    """The good rows, and the number of damaged lines.

    A line is damaged if it has too few or too many cells, or a cell that is not of its column's type. Columns that are
    not asked for are left out.

    Args:
        exact: Ask for these columns and no other, since rows are to be appended.

    Raises:
        ValueError: for a file that cannot be read, or that lacks a column.
    """
    header = header_of(path)
    missing = [name for name in columns if name not in header]
    if missing or (exact and header != list(columns)):
        extra = [name for name in header if name not in columns]
        told = [f"it lacks {', '.join(missing)}"] * bool(missing) + [f"it has also {', '.join(extra)}"] * bool(extra)
        raise ValueError(
            f"{path} was written by another version or program: {'; '.join(told) or 'its columns are in another order'}"
        )
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8-sig", errors="replace").split("\n")[1:]:
        if not line.strip():
            continue
        cells = split(line.rstrip("\r"))
        try:
            if len(cells) != len(header) or "\ufffd" in line:
                raise ValueError
            values = dict(zip(header, cells))
            records.append({name: kind(values[name]) if values[name] else None for name, kind in columns.items()})
        except ValueError:
            damaged += 1
    return records, damaged
