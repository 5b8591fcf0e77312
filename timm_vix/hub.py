"""Model cards for the Hub, written from a results file and from nothing else."""

import csv
from pathlib import Path

COLUMNS = (
    *("system", "recipe", "paper", "top1", "top5", "held_out_top1", "epoch", "epochs", "patch_size", "tokens"),
    *("images_per_second", "peak_memory_mib", "seed", "parameters", "device", "dtype", "batch_size", "torch", "timm"),
)


def card(row: dict[str, str]) -> str:
    """The card of one row of ``examples/results/reproduce_vix.csv``."""
    memory = f"{float(row['peak_memory_mib']):,.0f} MiB" if row["peak_memory_mib"] else "not measured"
    measured = {
        "top-1, test images": f"{float(row['top1']):.2f} %",
        "top-5, test images": f"{float(row['top5']):.2f} %",
        "top-1, held-out images": f"{float(row['held_out_top1']):.2f} %",
        "top-1 of the paper": f"{row['paper']}" if row["paper"] else "not published",
        "parameters": f"{int(row['parameters']):,}",
        "tokens": f"{row['tokens']} (patches of {row['patch_size']} px)",
        "epochs": f"{row['epochs']}, of which epoch {row['epoch']} was best on the held-out images",
        "training": f"{float(row['images_per_second']):,.0f} images a second, peak memory of a step {memory}",
        "on": f"{row['device']}, {row['dtype']}, batch {row['batch_size']}, seed {row['seed']}, "
        f"torch {row['torch']}, timm {row['timm']}",
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

The model answers every image with one of these classes. One seed was trained; differences of half a point mean
nothing. Nothing was measured on other images, and the terms of CIFAR-10's images apply to what was learnt from them.
"""


def write_cards(results: Path, folder: Path) -> list[Path]:
    """Write a card for each row of a results file, and return their paths.

    Raises:
        ValueError: for a file that lacks columns, naming them.
        OSError: for a file that cannot be read or written.
    """
    with results.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if missing := [name for name in COLUMNS if rows and name not in rows[0]]:
        raise ValueError(f"{results} lacks the columns {', '.join(missing)}; expected what reproduce_vix.py writes")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in rows:
        run = f"patch{row['patch_size']}-{row['recipe']}-{row['epochs']}epochs"
        paths.append(folder / f"{row['system']}-{run}.md")
        paths[-1].write_text(card(row), encoding="utf-8")
    return paths
