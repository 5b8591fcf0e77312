"""How many tokens merge in each layer: the forms in which it is given, and numbers of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from .._checks import InputError, is_integer, is_number
from ..mixers._merging import num_left

Merge = Union[int, float, Sequence[int], Mapping[str, float]]
# what one layer does: merge so many patches; or down to a share of those at the start; or all above a threshold
Step = Union[int, float, Mapping[str, float]]

FORMS = (
    "expected the number of tokens that each layer merges (a Python int), a list with one number for each layer, the "
    "share of the patch tokens left in the end (a float above 0 and below 1), or {'threshold': t}, a cosine between -1 "
    "and 1; the integer 0 merges nothing"
)


def merge_steps(merge: Merge, depth: int) -> list[Step]:
    """What each of ``depth`` layers merges.

    Raises:
        ValueError: for a form or a number that isn't allowed.
    """
    if isinstance(merge, Mapping):
        t = merge.get("threshold")
        if set(merge) != {"threshold"} or not is_number(t) or not -1 <= t <= 1:
            raise InputError(f"merge={merge!r}: {FORMS}")
        return [dict(merge)] * depth
    if isinstance(merge, float):
        if not 0 < merge < 1:
            raise InputError(f"merge={merge!r}: {FORMS}")
        return [1 - (1 - merge) * (layer + 1) / depth for layer in range(depth)]
    if isinstance(merge, (list, tuple)):
        if len(merge) != depth:
            raise InputError(f"merge={merge!r} has {len(merge)} numbers; the model has {depth} layers")
        numbers: Sequence[Any] = merge
    else:
        numbers = [merge] * depth
    for number in numbers:
        if not is_integer(number) or number < 0:
            raise InputError(f"merge={merge!r}: {FORMS}")
    return list(numbers)


def num_merged(step: Step, at_start: int, left: int) -> int:
    """How many of ``left`` patch tokens a layer merges by a number or a share; the first layer has ``at_start``.

    At most half of them merge, since each pair has a token at an even and one at an odd place.
    """
    wanted = left - num_left(step, at_start) if isinstance(step, float) else int(step)  # type: ignore[arg-type]
    return max(0, min(wanted, left // 2))


def merged_in_layers(steps: list[Step], patches: int) -> list[Optional[int]]:
    """How many patch tokens merge in each layer, of so many at the start; None for a threshold."""
    left, found = patches, []
    for step in steps:
        found.append(None if isinstance(step, Mapping) else num_merged(step, patches, left))
        left -= found[-1] or 0
    return found


def first_merge(steps: list[Step]) -> Optional[int]:
    """The first layer that merges; None where none does."""
    return next((layer for layer, step in enumerate(steps) if step), None)
