"""Arguments that models of several families take: mixers, stems, and sizes of images, patches and stages."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Optional, Union

from timm.layers import to_2tuple
from torch import nn

from .._checks import InputError, check_choice, is_integer
from ..mixers import MIXERS
from ..mixers._keywords import all_keywords, check_keywords
from ..mixers._mechanism import AttentionMechanism
from ..stems import STEMS

StemMixer = Union[None, str, Mapping[str, Any]]


def stem_class(stem: str, stem_mixer: StemMixer) -> Callable[..., nn.Module]:
    """The class of a stem, with the mixer inside it.

    Raises:
        ValueError: for a mixer in a stem that has none.
    """
    if stem_mixer is None:
        return STEMS[stem]
    if stem != "t2t":
        raise InputError(f"stem_mixer={stem_mixer!r}: stem={stem!r} has no mixer inside; allowed is stem='t2t'")
    return partial(STEMS[stem], mixer=stem_mixer)


def first_convolution(stem: str, parent: str = "patch_embed") -> Optional[str]:
    """The first convolution of a stem of ``STEMS``, which timm adapts to other numbers of input channels.

    None: none that could be adapted, since layers before it have a width that depends on these.
    """
    places = {"linear": "proj", "conv": "proj.0.conv", "hmlp": "proj.0.conv", "sope": None, "t2t": None}
    place = places.get(stem, "proj.0")
    return None if place is None else f"{parent}.{place}"


def take_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the keywords of mixers, of any in ``MIXERS``, out of ``kwargs``."""
    names = all_keywords()
    return {name: kwargs.pop(name) for name in names & kwargs.keys()}


def projected_keywords(mixer: str, kwargs: dict[str, Any], separate: bool = False) -> dict[str, Any]:
    """Take the keywords of a mixer out of ``kwargs``, for a host that projects queries, keys and values itself.

    Args:
        separate: whether it has layers of their own for queries and keys, which would learn nothing where a mixer uses
            the values of patches only.

    Raises:
        ValueError: for an unknown mixer, one without queries and keys, or a keyword of another one.
    """
    kinds = {name: kind for name, kind in MIXERS.items() if issubclass(kind, AttentionMechanism)}
    check_choice("mixer", mixer, tuple(name for name in kinds if not (separate and kinds[name].uses_values_only)))
    keywords = take_keywords(kwargs)
    check_keywords(mixer, keywords)
    return keywords


def check_sizes(img_size: Any, patch_size: Any, padded: bool) -> None:
    """Raise ValueError unless patches tile the image (or the model pads it)."""
    for name, value in (("img_size", img_size), ("patch_size", patch_size)):
        sides = value if isinstance(value, (tuple, list)) else (value, value)
        if len(sides) != 2 or any(not is_integer(side) or side < 1 for side in sides):
            raise InputError(f"{name}={value!r}: expected a positive integer or a pair of them")
    image, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if not padded and any(i % p for i, p in zip(image, patch)):
        raise InputError(f"img_size={img_size} is no multiple of patch_size={patch_size}")


def check_stages(**values: Any) -> None:
    """Raise ValueError unless each value is a tuple of positive integers, one for each stage."""
    lengths = {len(numbers) if isinstance(numbers, (tuple, list)) else 0 for numbers in values.values()}
    if lengths == {0} or len(lengths) > 1 or any(not is_integer(n) or n < 1 for own in values.values() for n in own):
        given = ", ".join(f"{name}={numbers!r}" for name, numbers in values.items())
        raise InputError(f"{given}: expected tuples of positive integers, one for each stage")
