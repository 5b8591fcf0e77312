"""Which mixer each layer of a model has: the forms of ``layers`` that models, ``convert`` and plans take."""

from collections.abc import Mapping, Sequence
from typing import Any, Union

from .._checks import InputError, is_integer
from ..mixers._keywords import check_keywords, mixer_keywords

Layers = Union[str, Sequence[int], Mapping[Any, Any]]


def check_saved_form(layers: Any) -> None:
    """Raise ValueError for ``layers`` that timm can't write to a configuration when it saves the model."""
    if layers is not None and not isinstance(layers, (str, list, tuple, dict)):
        raise InputError(f"layers={layers!r}: expected text, a list of indices, or a mapping from index to mixer")


def layer_mixers(layers: Layers, depth: int, mixer: str, keywords: dict[str, Any]) -> dict[int, tuple[str, dict]]:
    """Mixer and keywords for each layer that ``layers`` names, see ``convert``.

    Raises:
        ValueError: for a form, a layer, a mixer or a keyword that isn't there.
    """
    forms = "expected 'all', 'first-n', 'last-n', 'every-n', a list of indices, or a mapping from index to mixer"
    chosen: dict[Any, Any]
    if isinstance(layers, str) and layers.endswith(".json"):  # ``convert`` has read its plans before
        raise InputError(f"layers={layers!r}: a plan is for timm_vix.convert and vix_from_timm; here {forms}")
    if isinstance(layers, str):
        form, _, count = layers.partition("-")
        if layers != "all" and not (
            form in ("first", "last", "every") and count.isdecimal() and 0 < int(count) <= depth
        ):
            raise InputError(f"layers={layers!r}: {forms}, with n from 1 to {depth}")
        n = depth if layers == "all" else int(count)
        indices = {"all": range(depth), "first": range(n), "last": range(depth - n, depth)}
        chosen = dict.fromkeys(indices.get(form, range(n - 1, depth, n)), mixer)
    elif isinstance(layers, Mapping):
        chosen = dict(layers)
    elif isinstance(layers, Sequence) and all(isinstance(layer, (int, str)) for layer in layers):
        chosen = dict.fromkeys(layers, mixer)
    else:
        raise InputError(f"layers={layers!r}: {forms}")
    if not chosen:
        raise InputError(f"layers={layers!r} names no layer: {forms}")
    found: dict[int, tuple[str, dict]] = {}
    for key, value in chosen.items():
        # a mapping that went through a JSON file has text for its keys
        index = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not is_integer(index) or not 0 <= index < depth:
            raise InputError(f"layers: {key!r} is no layer; the model has {depth}, from 0 to {depth - 1}")
        own = dict(value) if isinstance(value, Mapping) else {"mixer": value}
        name = own.pop("mixer", mixer)
        if index in found:
            raise InputError(f"layers={layers!r} names layer {index} twice")
        if not isinstance(name, str):
            raise InputError(
                f"layers: {value!r} at layer {index}: expected one mixer's name, or a mapping with 'mixer'"
            )
        check_keywords(name, own)
        takes = mixer_keywords(name)
        found[index] = name, {**{k: v for k, v in keywords.items() if k in takes}, **own}
    used = sorted({name for name, _ in found.values()})
    taken = {keyword for name in used for keyword in mixer_keywords(name)}
    check_keywords(used[0], {keyword: value for keyword, value in keywords.items() if keyword not in taken})
    return dict(sorted(found.items()))
