"""The arguments of a saved conversion, where the caller of ``create_model`` gives some of them anew.

timm hands on what it had saved and what its caller gives as one set of arguments. Mixers by layer, as they were
resolved, hold all keywords of their mixers; so what the caller gives has to be told from what was saved, and put into
them.
"""

from collections.abc import Mapping
from typing import Any

from .._checks import InputError
from ..mixers import MIXERS
from .record import RESOLVED

UNSET = object()


def saved_arguments(conversion: Any, saved: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Mixer, layers, keywords, merge and scale_logits of a saved model, with those that the caller gives.

    Args:
        conversion: what ``record_arguments`` recorded: "given", the arguments with which the model was created, and
            "found", their resolved values; None for a model that was converted after it had been created.
        saved: the arguments in the configuration of the model.
        arguments: those of the present call.

    Raises:
        ValueError: for a conversion that is no such mapping.
    """
    given, found = recorded(conversion, saved, arguments)
    # timm saves the arguments that were given, and the resolved values of the others
    changed = {name for name, value in arguments.items() if value not in (given.get(name), found.get(name))}
    result = {name: (arguments if name in changed else found)[name] for name in RESOLVED}
    if not changed & {"mixer", "layers", "keywords"}:
        return {**result, "keywords": {}}
    new = {k: value for k, value in arguments["keywords"].items() if given["keywords"].get(k, UNSET) != value}
    mixer = (arguments if "mixer" in changed else given)["mixer"]
    if mixer is None and found["mixer"] != "softmax":  # as which it was resolved
        mixer = found["mixer"]
    layers = result["layers"] or given["layers"]
    keywords = arguments["keywords"]
    if "layers" in changed:
        layers, keywords = with_saved_keywords(layers, mixer, keywords, shared_keywords(found["layers"], new))
    elif "mixer" in changed and isinstance(layers, Mapping):
        layers = list(layers)
    elif isinstance(layers, Mapping):
        layers = {index: {**layer, **taken(layer.get("mixer"), new)} for index, layer in by_layer(layers).items()}
    # of the keywords that were saved, those that a mixer takes; new ones that none takes are told by ``convert``
    used = mixers_of(layers, mixer)
    keywords = {k: v for k, v in keywords.items() if k in new or any(taken(name, {k: v}) for name in used)}
    return {**result, "mixer": mixer, "layers": layers, "keywords": keywords}


def recorded(conversion: Any, saved: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict, dict]:
    """The arguments with which a saved model was created, and their resolved values."""
    found: Any
    if conversion is None:
        found = {name: saved.get(name) for name in RESOLVED}
        return {**found, "mixer": None, "keywords": {}}, found
    if conversion == {}:  # an earlier version recorded nothing more of a model with softmax in all layers
        found = dict(mixer="softmax", layers="all", merge=None, scale_logits=None)
        return {**arguments, "mixer": "softmax"}, found
    given, found = (conversion.get(part) if isinstance(conversion, dict) else None for part in ("given", "found"))
    if (
        not isinstance(given, dict)
        or not isinstance(found, dict)
        or not (given.keys() >= arguments.keys() and found.keys() == {*RESOLVED})
        or not isinstance(given["keywords"], dict)
    ):
        raise InputError(
            f"conversion={conversion!r}: expected the mapping with 'given' and 'found' that a saved model has"
        )
    return given, found


def taken(mixer: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that a mixer takes."""
    names = MIXERS[mixer].keywords() if isinstance(mixer, str) and mixer in MIXERS else []
    return {name: value for name, value in keywords.items() if name in names}


def by_layer(layers: Any) -> dict[Any, Mapping]:
    """A mapping from layers to mixers with a mapping for each layer; none for another form of ``layers``."""
    entries = layers if isinstance(layers, Mapping) else {}
    return {index: entry if isinstance(entry, Mapping) else {"mixer": entry} for index, entry in entries.items()}


def mixers_of(layers: Any, mixer: Any) -> list[Any]:
    """The mixers that ``layers`` names, and the one for layers without a name."""
    mixer = mixer or "nystrom"
    return [entry.get("mixer", mixer) for entry in by_layer(layers).values()] or [mixer]


def shared_keywords(layers: Any, new: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each mixer of resolved layers the keywords that all its layers share, under the new ones that it takes."""
    shared: dict[str, dict[str, Any]] = {}
    for layer in by_layer(layers).values():
        mixer, own = str(layer.get("mixer")), {name: value for name, value in layer.items() if name != "mixer"}
        former = shared.get(mixer, own)
        shared[mixer] = {name: value for name, value in own.items() if former.get(name, UNSET) == value}
    return {mixer: {**own, **taken(mixer, new)} for mixer, own in shared.items()}


def with_saved_keywords(
    layers: Any, mixer: Any, keywords: dict[str, Any], shared: dict[str, dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """New layers and the keywords for them, with those that their mixers had in the saved model."""
    if not isinstance(layers, Mapping):
        return layers, {**shared.get(mixer or "nystrom", {}), **keywords}
    own = by_layer(layers)
    return {index: {**shared.get(str(entry.get("mixer")), {}), **entry} for index, entry in own.items()}, keywords
