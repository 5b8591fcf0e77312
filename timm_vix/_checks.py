"""Checks of arguments: one clear error that names what was given and what is allowed."""

import math
from typing import Optional


def check_integer(name: str, value: object, lowest: int, highest: Optional[int] = None, meaning: str = "") -> None:
    """Raise ValueError unless ``value`` is an integer in [lowest, highest]; ``meaning`` says what highest counts."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}: expected an integer of at least {lowest}")
    if value < lowest:
        raise ValueError(f"{name}={value}: expected an integer of at least {lowest}")
    if highest is not None and value > highest:
        raise ValueError(f"{name}={value} exceeds the {highest} {meaning}")


def check_number(name: str, value: object, lowest: float) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least ``lowest``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a finite number of at least {lowest}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
