"""Write the measured tables of the README from the files in examples/results.

python examples/tables.py            # rewrites README.md between its <!-- table: NAME --> marks
python examples/tables.py --check    # fails if README.md differs from the results
"""

import argparse
import csv
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cost(mode: str) -> str:
    """Speed of a layer relative to softmax through SDPA, for each number of tokens."""
    table = [row for row in rows("mixers.csv") if row["mode"] == mode and row["dtype"] == "float32"]
    tokens = sorted({int(row["tokens"]) for row in table})
    cells = {(row["mixer"], int(row["tokens"])): row for row in table}
    body = []
    for mixer in dict.fromkeys(row["mixer"] for row in table):
        measured = [cells.get((mixer, n)) for n in tokens]
        if mixer == "softmax":
            body.append([mixer, *(f"{float(row['softmax_ms']):.0f} ms" if row else "" for row in measured)])
        else:
            body.append([f"`{mixer}`", *(f"{float(row['ratio']):.2f}" if row else "" for row in measured)])
    return markdown(["", *(f"{n:,} tokens" for n in tokens)], body)


def memory() -> str:
    """Peak memory of a training step of one layer and image, and its exponent in the number of tokens."""
    table = [row for row in rows("mixers.csv") if row["mode"] == "train" and int(row["tokens"]) > 1000]
    tokens = sorted({int(row["tokens"]) for row in table})
    cells = {(row["mixer"], int(row["tokens"])): float(row["peak_memory_mib"]) / int(row["batch"]) for row in table}
    body = []
    for mixer in dict.fromkeys(row["mixer"] for row in table):
        values = [cells[mixer, n] for n in tokens]
        slope = math.log(values[-1] / values[-2]) / math.log(tokens[-1] / tokens[-2])
        body.append([f"`{mixer}`", *(f"{value:.0f} MiB" for value in values), f"{slope:.2f}"])
    return markdown(["", *(f"{n:,} tokens" for n in tokens), "exponent"], body)


def finetuned(table: str) -> str:
    """Accuracy and time of the last epoch of each model."""
    last = {row["model"]: row for row in rows(f"finetune_{table}.csv")}
    body = [
        [
            f"`{model}`",
            f"{float(row['top1']):.1f}",
            f"{float(row['top5']):.1f}",
            row["epoch"],
            f"{float(row['parameters']) / 1e6:.2f}",
        ]
        for model, row in last.items()
    ]
    return markdown(["model", "top-1 %", "top-5 %", "epochs", "parameters (M)"], body)


TABLES = {
    "inference": lambda: cost("infer"),
    "training": lambda: cost("train"),
    "memory": memory,
    "caltech101": lambda: finetuned("caltech101"),
    "claims": lambda: finetuned("claims"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args()
    check, path = given.check, given.readme
    before = text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        if start not in text:
            print(f"error: README.md has no mark {start.strip()}", file=sys.stderr)
            return 2
        head, rest = text.split(start, 1)
        text = head + start + table() + end + rest.split(end, 1)[1]
    if check:
        if text != before:
            print("error: README.md differs from examples/results; run python examples/tables.py", file=sys.stderr)
        return int(text != before)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
