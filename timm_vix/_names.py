"""Names of models as people type them: near names for a wrong one, keywords beside one."""

import ast
import difflib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import timm

from ._checks import InputError


def weights_config(model: Any) -> dict[str, Any]:
    """timm's configuration of the weights of a model; empty for one that was built from its class."""
    return getattr(model, "pretrained_cfg", None) or {}


def near_names(name: str, known: Iterable[str]) -> str:
    """Up to four names that begin with ``name``, or else are most like it, as one text; "none" where no name is.

    Example:
        >>> near_names("deit_tinny", ["nest_tiny", "deit_tiny", "resnet50"]), near_names("resnet", ["resnet50"])
        ('deit_tiny, nest_tiny', 'resnet50')
    """
    known = list(known)
    longer = [other for other in known if name and other.startswith(name)]
    return ", ".join(longer[:4] or difflib.get_close_matches(name, known, 4)) or "none"


def check_model(name: Any, argument: str = "model") -> None:
    """Raise InputError, with near names, for the value of ``argument`` if timm knows no such model."""
    if not isinstance(name, str) or (":" not in name and not timm.is_model(name.split(".")[0])):
        raise InputError(
            f"{argument}={name!r} is not registered in timm; near names: {near_names(str(name), timm.list_models())}"
        )


def registered(name: str) -> str:
    """The name itself; raise InputError for one that timm does not know, see ``check_model``."""
    check_model(name)
    return name


def parse_model(text: str, find: Callable[[str], str] = registered) -> tuple[str, dict[str, Any]]:
    """Split ``"NAME key=value ..."`` into a name and its keywords.

    Args:
        find: returns the name that ``timm.create_model`` is to be given, or raises InputError for a wrong one.

    Raises:
        InputError: for a name that timm does not know, or a part without "=".

    Example:
        >>> parse_model("vix_nystrom_tiny num_landmarks=64")
        ('vix_nystrom_tiny', {'num_landmarks': 64})
    """
    # the path of a folder or file may have spaces, and "="
    whole, *rest = [text.strip()] if os.path.exists(text.strip()) else re.split(r"\s+(?=\w+=)", text.strip())
    path = whole.startswith("local-dir:") or os.path.exists(whole)
    name, *parts = [whole, *rest] if path else text.split() or [""]
    name = find(name)
    keywords: dict[str, Any] = {}
    for part in parts:
        key, found, value = part.partition("=")
        if not found or not key:
            raise InputError(f"model={text!r}: {part!r} is no key=value")
        try:
            keywords[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            keywords[key] = value
    return name, keywords
