"""Model cards for the Hub, written from a results file and from nothing else."""

from pathlib import Path

from .._records import Columns, Record, read_records

COLUMNS: Columns = dict(
    system=str,
    keywords=str,
    recipe=str,
    paper=str,
    top1=float,
    top5=float,
    held_out_top1=float,
    epoch=int,
    epochs=int,
    patch_size=int,
    tokens=int,
    images_per_second=float,
    faster_than_softmax=float,
    peak_memory_mib=float,
    seconds=float,
    seed=int,
    parameters=int,
    device=str,
    dtype=str,
    threads=int,
    batch_size=int,
    torch=str,
    timm=str,
)
# a system without a number in the paper, a step that could not be measured
MAY_BE_EMPTY = {"paper", "images_per_second", "faster_than_softmax", "peak_memory_mib"}


def read_rows(path: Path) -> tuple[list[Record], int]:
    """The good rows of a results file, and the number of damaged lines.

    Raises:
        ValueError: for a file that cannot be read, or that has other columns, naming them.
    """
    records, damaged = read_records(path, COLUMNS, exact=True)
    needed = COLUMNS.keys() - MAY_BE_EMPTY
    good = [record for record in records if all(record[name] is not None for name in needed)]
    return good, damaged + len(records) - len(good)


def seed_suffix(seed: int) -> str:
    """What a seed adds to the name of a run or card: nothing for 0, which most rows have."""
    return f"-seed{seed}" if seed else ""


def card(row: Record) -> str:
    """The card of one row of ``examples/results/reproduce_vix.csv``."""
    speed, memory = (
        "not measured" if row[name] is None else f"{row[name]:,.0f} {unit}"
        for name, unit in (("images_per_second", "images a second"), ("peak_memory_mib", "MiB"))
    )
    number, _, of_log = (row["paper"] or "").partition(" ")
    paper = f"{number} %, with 1,024 tokens and 40 or more epochs" if number else "not published"
    if of_log:
        paper += "; the best epoch on the test images, from the log of its code"
    measured = {
        "top-1, test images": f"{row['top1']:.2f} %",
        "top-5, test images": f"{row['top5']:.2f} %",
        "top-1, held-out images": f"{row['held_out_top1']:.2f} %",
        "top-1 of the paper": paper,
        "parameters": f"{row['parameters']:,}",
        "tokens": f"{row['tokens']} (patches of {row['patch_size']} px)",
        "keywords": f"`{row['keywords']}`",
        "epochs": f"{row['epochs']}, of which epoch {row['epoch']} was best on the held-out images",
        "training": f"{speed}, peak memory of a step {memory}",
        "on": f"{row['device']}, threads: {row['threads']}, {row['dtype']}, batch {row['batch_size']}, "
        f"seed {row['seed']}, torch {row['torch']}, timm {row['timm']}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
    return f"""---
library_name: timm
pipeline_tag: image-classification
license: apache-2.0
datasets:
- cifar10
tags:
- image-classification
- timm
- timm_vix
---
# {row["system"]}, {row["recipe"]} recipe

`{row["system"]}` of timm_vix, a model of Vision X-formers ([arXiv 2107.02239](https://arxiv.org/abs/2107.02239)),
trained from random weights on CIFAR-10.

| measured | |
|---|---|
{table}

```python
import timm, timm_vix
model = timm.create_model("hf-hub:USER/{row["system"]}", pretrained=True)
```

## Intended use

Comparing token mixers, and trying them out on 32 px photographs of CIFAR-10's ten classes: aeroplanes, automobiles,
birds, cats, deer, dogs, frogs, horses, ships and lorries.

## Limits

The model answers every image with one of these classes. One seed was trained; differences of a point mean
nothing. Nothing was measured on other images, and the terms of CIFAR-10's images apply to what was learnt from them.
"""


def write_cards(results: Path, folder: Path) -> list[Path]:
    """Write a card for each good row of a results file, and return their paths.

    Raises:
        ValueError: for a file that cannot be read, or that has other columns, naming them.
        OSError: for a file that cannot be written.
    """
    rows, _ = read_rows(results)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in rows:
        run = f"patch{row['patch_size']}-{row['recipe']}-{row['epochs']}epochs" + seed_suffix(row["seed"])
        paths.append(folder / f"{row['system']}-{run}.md")
        paths[-1].write_text(card(row), encoding="utf-8")
    return paths
