"""Figures as PNG files.

Colours are those of Okabe & Ito, which colour-blind readers tell apart; markers or hatches differ as well, so a
black-and-white print can be read too.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._checks import InputError
from ._files import write_whole

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
