"""The keywords that mixers take, and those that add nothing to softmax attention."""

from collections.abc import Mapping
from typing import Any

from .._checks import InputError, check_choice
from ..mixers import MIXERS

# Keywords with the values at which they have no effect. Softmax attention with these values is the host's own. A mixer
# that was saved before a keyword existed had this value.
ADDING_NOTHING: dict[str, Any] = dict(merge_keys=1.0, conv_residual=False, locality=0.0)


def mixer_keywords(mixer: str) -> list[str]:
    """The keywords that a mixer takes, e.g. ``["num_landmarks", "pinv_iterations", ...]`` for "nystrom".

    Raises:
        ValueError: for a name that isn't in ``MIXERS``.
    """
    check_choice("mixer", mixer, tuple(MIXERS))
    return MIXERS[mixer].keywords()


def all_keywords() -> set[str]:
    """The keywords of all mixers."""
    return {name for mixer in MIXERS for name in mixer_keywords(mixer)}


def check_keywords(mixer: str, keywords: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown mixer, or a keyword that it doesn't take."""
    allowed = mixer_keywords(mixer)
    for name, value in sorted(keywords.items(), key=str):  # a mapping from a user may have keys that are no text
        if name not in allowed:
            owners = " or ".join(f"mixer={other!r}" for other in MIXERS if name in mixer_keywords(other))
            belongs = f"; {name} belongs to {owners}" if owners else ""
            raise InputError(f"{name}={value!r}: mixer={mixer!r} takes {', '.join(allowed)}{belongs}")


def is_plain_softmax(mixer: str, keywords: Mapping[str, Any]) -> bool:
    """Whether a mixer is the attention that hosts have themselves, without anything added."""
    return mixer == "softmax" and {**ADDING_NOTHING, **keywords} == ADDING_NOTHING
