"""Figures of training runs."""

from typing import Any

import torch

from .._figures import BLUE, ORANGE, VERMILION, canvas, plain_text


def learning_curve(history: list[dict[str, Any]], title: str) -> Any:
    """Training loss and validation top-1 over the epochs."""
    figure, pairs = canvas(8, 3.2, 2)
    panels = ("train_loss", "training loss", BLUE, "o"), ("top1", "validation top-1 (%)", VERMILION, "s")
    for axes, (key, label, color, marker) in zip(pairs, panels):
        axes.plot([r["epoch"] for r in history], [r[key] for r in history], color=color, marker=marker, markersize=4)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(plain_text(title))
    return figure


def layer_errors(errors: list[list[float]], layers: list[int], title: str) -> Any:
    """Each layer's error at the start and the end of attention transfer's first stage, means of ten steps.

    Args:
        errors: For each step one number for each of the ``layers``.
    """
    figure, axes = canvas(8, 3.2)
    for part, label, color, hatch, shift in (
        (errors[:10], "start", ORANGE, "//", -0.2),
        (errors[-10:], "end", BLUE, "", 0.2),
    ):
        means = torch.tensor(part).mean(0).tolist()
        axes.bar([layer + shift for layer in layers], means, 0.4, label=label, color=color, hatch=hatch)
    # a mixer that is exact on this grid leaves no error, and a logarithm nothing to draw
    scale = "log" if torch.tensor(errors).gt(0).any() else "linear"
    axes.set(xlabel="layer", ylabel="relative squared error of the block", yscale=scale, xticks=layers)
    axes.set_title(plain_text(title))
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure
