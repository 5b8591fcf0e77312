"""Checks of arguments: one clear error that names what was given and what is allowed."""

import argparse
import math
from collections.abc import Hashable
from typing import Optional, TypeGuard


class InputError(ValueError):
    """An input that can't be used: an argument, a file or a combination of them that the user gave.

    The message is one line that names what was given and what is allowed. The command line shows it without a
    traceback; any other exception is a defect and keeps its traceback.
    """


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an integer or a float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(name: str, value: object, lowest: int, highest: Optional[int] = None) -> None:
    """Raise InputError unless ``value`` is an integer in [lowest, highest]; None: without an upper bound."""
    limit = math.inf if highest is None else highest
    if not is_integer(value) or not lowest <= value <= limit:
        allowed = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        # an integer of NumPy couldn't be saved in JSON
        kind = "a Python int" if type(value).__module__ == "numpy" else "an integer"
        raise InputError(f"{name}={value!r}: expected {kind} {allowed}")


def check_number(name: str, value: object, lowest: float) -> None:
    """Raise InputError unless ``value`` is a finite number of at least ``lowest``."""
    if not is_number(value) or not lowest <= value < math.inf:
        kind = "a Python number" if type(value).__module__ == "numpy" else "a finite number"
        raise InputError(f"{name}={value!r}: expected {kind} of at least {lowest}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if not isinstance(value, Hashable) or value not in choices:  # an array is compared element by element
        raise InputError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def check_at_most_one(**settings: object) -> None:
    """Raise InputError if several of these settings were given; None, False and an empty text were not."""
    given = [name for name, value in settings.items() if value]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were {'both ' * (len(given) == 2)}given; allowed is one of them")


def positive(text: str) -> int:
    """An argument of the command line as a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a whole number above 0")
    return int(text)
