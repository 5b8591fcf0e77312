"""What a plan measures, as rows of a CSV: a stopped run continues where it was."""

from pathlib import Path
from typing import Any, Optional

from .._records import Columns, append_record, earlier_records

# an empty cell wasn't measured; what is a plan, or a block of it, in JSON
COLUMNS: Columns = dict(
    run=str, what=str, agreement=float, distance=float, gflops=float, kept=float, milliseconds=float, speedup=float
)


class Measurements:
    """The rows of a table by run and what was measured.

    Args:
        path: of the CSV, to which rows are appended.

    Raises:
        ValueError: for a table of another program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, damaged = earlier_records(path, COLUMNS)
        if damaged:
            print(f"{path}: {damaged} damaged lines are measured again")

    def of_run(self, run: str, *names: str) -> dict[str, dict[str, Any]]:
        """The named figures of a run, by what was measured; rows that lack one are left out.

        Args:
            run: text that identifies everything the figures depend on besides what was measured.
        """
        chosen = [row for row in self.rows if row["run"] == run and None not in (row[name] for name in names)]
        return {row["what"]: {name: row[name] for name in names} for row in chosen}

    def add(self, run: str, what: str, **figures: Optional[float]) -> None:
        """Append a row."""
        row = dict.fromkeys(COLUMNS) | dict(run=run, what=what, **figures)
        append_record(self.path, COLUMNS, row)
        self.rows.append(row)
