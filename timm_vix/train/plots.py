"""Figures of training runs as PNG files.

Colours are those of Okabe & Ito, which colour-blind readers tell apart; markers or hatches differ as well, so a
black-and-white print can be read too.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._checks import InputError
from .._files import write_whole

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
BLACK, BLUE, VERMILION, ORANGE = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[5]


class MatplotlibIsMissing(InputError):
    """Nothing can be drawn."""


def canvas(width: float = 7.5, height: float = 4.8, columns: int = 1) -> tuple[Any, Any]:
    """An empty figure of so many inches, and its axes: one pair, or an array of ``columns`` pairs side by side.

    Raises:
        MatplotlibIsMissing: a ValueError that says what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MatplotlibIsMissing("figures need matplotlib; pip install 'timm-vix[examples]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def png(figure: Any, dots_per_inch: int = 110) -> bytes:
    """The figure as a file, the same for the same figure."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return image.getvalue()


def write_figure(path: Path, draw: Callable[..., Any], *arguments: Any) -> None:
    """Write what ``draw(*arguments)`` returns as PNG; without matplotlib, say so and write nothing."""
    try:
        figure = draw(*arguments)
    except MatplotlibIsMissing as error:
        print(f"no {path.name}: {error}")
        return
    write_whole(path, png(figure, 150))


def plain_text(name: str) -> str:
    """The name without mathematics: a dollar sign would start a formula."""
    return name.replace("$", r"\$")


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
