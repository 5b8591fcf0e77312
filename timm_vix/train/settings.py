"""Checks of a run's settings that hold whatever the data is."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

from timm.utils import ParseKwargs

Ranges = Iterable[tuple[str, str, Callable[[Any], bool]]]


class KeyValue(ParseKwargs):
    """timm's ``key=value`` arguments, with an error for one that is none."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Optional[str] = None
    ) -> None:
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"{option_string} {wrong[0]}: expected key=value")
        super().__call__(parser, namespace, values, option_string)


def check_ranges(run: SimpleNamespace, ranges: Ranges) -> None:
    """Raise ValueError for a setting out of its range: names, what is allowed in words, and whether a value is.

    A setting that is None is not looked at.
    """
    for names, allowed, holds in ranges:
        for name in names.split():
            value = getattr(run, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value}: allowed is {allowed}")


def check_weights(name: str, path: Optional[str]) -> None:
    """Raise ValueError if a file of weights is named and not there."""
    if path and not Path(path).is_file():
        raise ValueError(f"{name}={path} is no file; allowed is a .safetensors or .pth file")


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise ValueError for a folder of results that can't be continued, or that holds something to keep."""
    if resume and overwrite:
        raise ValueError("resume and overwrite were both given; allowed is one of them")
    if resume and not (out / "checkpoint.pt").is_file():
        raise ValueError(f"resume: {out} holds no checkpoint.pt; start without resume")
    if not (resume or overwrite) and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={out} exists; resume continues it, overwrite replaces it, another folder keeps it")
