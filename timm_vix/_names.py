"""Names of models as people type them: near names for a wrong one, keywords beside one, the softmax control of one."""

import ast
import difflib
from collections.abc import Iterable
from typing import Any, Optional

import timm


def near_names(name: str, known: Iterable[str], count: int = 4) -> str:
    """The ``count`` names most like ``name``, or like it as far as it goes, as one text; "none" where nothing is.

    Example:
        >>> near_names("deit_tinny", ["nest_tiny", "deit_tiny_patch16_224", "resnet50"])
        'deit_tiny_patch16_224, nest_tiny'
    """

    def likeness(other: str) -> float:
        return max(difflib.SequenceMatcher(None, other[:end], name).ratio() for end in (len(name), None))

    order = sorted((-likeness(other), len(other), other) for other in known)
    return ", ".join(other for unlike, _, other in order[:count] if unlike < -0.6) or "none"


def check_model(name: Any, argument: str = "model") -> None:
    """Raise ValueError, with near names, for the value of ``argument`` if timm knows no such model."""
    if not isinstance(name, str) or (":" not in name and not timm.is_model(name.split(".")[0])):
        raise ValueError(
            f"{argument}={name!r} is not registered in timm; near names: {near_names(str(name), timm.list_models())}"
        )


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``"NAME key=value ..."`` into a name and its keywords.

    Raises:
        ValueError: for a name that timm does not know, or a part without "=".

    Example:
        >>> parse_model("vix_nystrom_tiny num_landmarks=64")
        ('vix_nystrom_tiny', {'num_landmarks': 64})
    """
    name, *parts = text.split() or [""]
    check_model(name)
    keywords: dict[str, Any] = {}
    for part in parts:
        key, found, value = part.partition("=")
        if not found or not key:
            raise ValueError(f"model={text!r}: {part!r} is no key=value")
        try:
            keywords[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            keywords[key] = value
    return name, keywords


def softmax_of(name: str) -> Optional[str]:
    """The softmax model of the same trunk, stem and positions as one of ours; None for any other model.

    fnet2d mixes maps, so it has no such trunk; beside it stands the model of tokens with its stem and width.

    Example:
        >>> softmax_of("vix_nystrom_small"), softmax_of("hybrid_vin_tiny_rope"), softmax_of("vix_from_timm")
        ('vit_small_patch16_224', 'hybrid_vit_tiny_rope', None)
        >>> softmax_of("ccn_7"), softmax_of("pin_tiny"), softmax_of("fnet2d_cifar")
        ('cct_7', 'pin_tiny mixer=softmax', 'hybrid_vit_cifar')
    """
    name = name.split(".")[0]
    family, _, rest = name.partition("_")
    size = rest.partition("_")[2]
    if family in ("ccn", "ccp", "cct", "cvn", "cvp", "cvt"):
        return f"{family[:2]}t_{rest}"
    if name.startswith(("levin_", "levip_", "pin_", "pip_", "hybrid_pin_", "hybrid_pip_")):
        return f"{name} mixer=softmax"
    if family == "hybrid":
        return f"hybrid_vit_{size}"
    if family == "fnet2d":
        return f"hybrid_vit_{rest}"
    if family == "vix":
        twins = (f"vix_softmax_{size}", f"vit_{size}_patch16_224")
        return next((twin for twin in twins if timm.is_model(twin)), None)
    return None
