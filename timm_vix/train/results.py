"""The files of a training run: checkpoint, history, curve and Hub folder. Each is replaced as a whole, or stays."""

import csv
import io
import os
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
from timm.models import save_for_hf
from torch import nn

from .._files import one_line, write_whole


def clear(out: Path) -> None:
    """Make the folder, and remove what an earlier run left there and nothing else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoint.pt", "best.pt", "history.csv", "curve.png", "delta.safetensors"):
            (out / name).unlink(missing_ok=True)
        if (out / "hub").exists():
            shutil.rmtree(out / "hub")
    except OSError as error:
        raise OSError(f"out={out} cannot be written: {error.strerror}; choose a folder that can") from error


def restore(path: Path, settings: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights and optimizer, and return the position; raise ValueError if the settings differ."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as error:  # torch.load raises by kind of damage
        raise ValueError(f"resume: {path} cannot be read: {one_line(error)}") from error
    if differing := [f"{k}={saved.get(k)} before, {v} now" for k, v in settings.items() if saved.get(k) != v]:
        raise ValueError(f"resume: settings differ from those of {path}: {'; '.join(differing)}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["position"]


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """One row per epoch as CSV."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_whole(path, text.getvalue().encode())


def write_figure(path: Path, figure: Any) -> None:
    """A figure of matplotlib as PNG, as a whole."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())


def write_curve(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Training loss and validation top-1 over the epochs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    # blue and vermilion of Okabe & Ito: colour-blind readers tell them apart
    panels = ("train_loss", "training loss", "#0072B2", "o"), ("top1", "validation top-1 (%)", "#D55E00", "s")
    for axes, (key, label, color, marker) in zip(figure.subplots(1, 2), panels):
        axes.plot([r["epoch"] for r in history], [r[key] for r in history], color=color, marker=marker, markersize=4)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    write_figure(path, figure)


def write_layer_errors(path: Path, rows: list[list[Any]], layers: list[int], title: str) -> None:
    """Each layer's error at the start and the end of attention transfer's first stage, means of ten steps."""
    errors = [values for stage, _, values in rows if stage == 1]
    if not errors:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    # orange and blue of Okabe & Ito, hatched apart for print
    for part, label, color, hatch, shift in (
        (errors[:10], "start", "#E69F00", "//", -0.2),
        (errors[-10:], "end", "#0072B2", "", 0.2),
    ):
        means = torch.tensor(part).mean(0).tolist()
        axes.bar([layer + shift for layer in layers], means, 0.4, label=label, color=color, hatch=hatch)
    # a mixer that is exact on this grid leaves no error, and a logarithm nothing to draw
    scale = "log" if torch.tensor(errors).gt(0).any() else "linear"
    axes.set(xlabel="layer", ylabel="relative squared error of the block", yscale=scale, title=title, xticks=layers)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    write_figure(path, figure)


def write_hub(
    folder: Path, model: nn.Module, data_config: dict[str, Any], card: str, label_names: Optional[list[str]] = None
) -> None:
    """Weights, configuration and card, as the Hub and timm's ``local-dir:`` want them."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        names = dict(label_names=label_names) if label_names else None
        save_for_hf(model, partial, names, safe_serialization=True, data_config=data_config)
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        message = f"cannot write {folder}: {one_line(error)}; checkpoint.pt has the weights; make room, then resume"
        raise OSError(message) from error


def model_card(
    name: str,
    license: str,
    ours: bool,
    start: str,
    data: str,
    last: dict[str, Any],
    recipe: dict[str, Any],
    picked: bool = False,
) -> str:
    """Model card in the Hub's format; ``last`` is the last row of the history, or the one that was picked."""
    which = "best on these images" if picked else "last epoch, and no epoch was picked"
    settings = "\n".join(f"- {key}: {value}" for key, value in recipe.items() if value is not None)
    return f"""---
library_name: timm
pipeline_tag: image-classification
license: {license}
tags:
- image-classification
- timm{chr(10) + "- timm_vix" if ours else ""}
---
# {name}

`{name}` ({last["parameters"] / 1e6:.2f} M parameters, {last["img_size"]} px), trained from {start} on {data}.

| on the validation images | % |
|---|---|
| top-1 | {last["top1"]:.2f} |
| top-5 | {last["top5"]:.2f} |

These are the figures of epoch {last["epoch"]}, the {which}.

```python
import timm{", timm_vix" if ours else ""}
model = timm.create_model("local-dir:THIS/FOLDER", pretrained=True)  # or "hf-hub:USER/NAME"
```

## Recipe

{settings}

## Limits

The model answers every image with one of the classes in `config.json`. It was measured on one split with one seed, and
on nothing from elsewhere. The terms of the training images and of the initial weights apply.
"""
