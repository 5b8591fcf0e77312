"""The README says what was measured."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check(readme: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "tables.py"), "--check"]
    if readme is not None:
        command += ["--readme", str(readme)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_its_tables_are_those_of_the_results():
    done = check()
    assert done.returncode == 0, done.stderr


def test_another_figure_is_noticed(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `nystrom` | 0."))
    (tmp_path / "README.md").write_text(text.replace(row, row.replace("0.", "9.", 1)), encoding="utf-8")
    done = check(tmp_path / "README.md")
    assert done.returncode == 1
    assert "differs" in done.stderr
