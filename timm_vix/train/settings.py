"""Settings of a run as dataclasses, from whose fields the checks, the command line and the documentation are made."""

import argparse
import functools
import inspect
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, Optional, TypeVar, Union, get_args, get_origin

from timm.utils import ParseKwargs

from .._checks import InputError, check_at_most_one

Ranges = Iterable[tuple[str, str, Callable[[Any], bool]]]
Function = TypeVar("Function", bound=Callable[..., Any])
# for the type of a field: what a value may be an instance of, and what that is called
TYPES: dict[type, tuple[type, str]] = {
    str: (str, "text"),
    bool: (bool, "True or False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    dict: (Mapping, "a mapping of keywords"),
}


class Range(NamedTuple):
    """The allowed values of a setting: in words, and as a function that returns whether a value is allowed."""

    words: str
    holds: Callable[[Any], bool]


ABOVE_0 = Range("above 0", lambda value: value > 0)
FROM_0 = Range("0 or more", lambda value: value >= 0)
FROM_0_BELOW_1 = Range("0 to below 1", lambda value: 0 <= value < 1)
FROM_0_TO_1 = Range("0 to 1", lambda value: 0 <= value <= 1)
ABOVE_0_TO_1 = Range("above 0, at most 1", lambda value: 0 < value <= 1)
BETWEEN_0_AND_1 = Range("above 0, below 1", lambda value: 0 < value < 1)


def one_of(*choices: str) -> Range:
    """The range of a setting that is one of some words."""
    return Range(", ".join(choices), lambda value: value in choices)


def setting(
    default: Any,
    meaning: str,
    allowed: Optional[Range] = None,
    may_change: bool = False,
    parse: Optional[Callable[[str], Any]] = None,
    nargs: Optional[str] = None,
    alias: Optional[str] = None,
) -> Any:
    """A field of ``Settings``.

    Args:
        default: Its value if none is given; ``MISSING`` makes it obligatory.
        meaning: One sentence for the documentation and the command line.
        allowed: The values besides None.
        may_change: Whether a run may be continued with another value.
        parse: How the command line reads it, where the field's type doesn't say.
        nargs: "+" for a list of words on the command line.
        alias: Another option of the command line with the same meaning.
    """
    metadata = dict(meaning=meaning, allowed=allowed, may_change=may_change, parse=parse, nargs=nargs, alias=alias)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """Base of dataclasses whose fields are all made by ``setting``; construction checks types and ranges.

    Raises:
        ValueError: for the first value that is wrong, with the values that are allowed.
    """

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                setattr(self, own.name, value)
            accepted, words = TYPES.get(type_of(own), (object, ""))
            # True is an integer for Python, and no number of epochs
            right = isinstance(value, accepted) and (accepted in (bool, object) or not isinstance(value, bool))
            or_none = " or None" if is_optional(own) else ""
            if not right and not (value is None and or_none):
                raise InputError(f"{own.name}={value!r}: allowed is {words}{or_none}")
            if isinstance(value, str) and not value:  # an empty path would be the folder of the shell
                raise InputError(f"{own.name}='': allowed is a text that isn't empty{or_none}")
            if accepted is Mapping and value is not None:
                check_keywords_are_plain(own.name, value)
        check_ranges(self, [(own.name, *allowed) for own in fields(self) if (allowed := own.metadata["allowed"])])
        for own in fields(self):
            kind, value = type_of(own), getattr(self, own.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{own.name}={value!r}: allowed is a finite number")
            if kind in (int, float) and value is not None:
                setattr(self, own.name, kind(value))  # numbers of NumPy as Python's, for JSON

    def recorded(self) -> dict[str, Any]:
        """The settings that must be the same when the run is continued."""
        return {own.name: getattr(self, own.name) for own in fields(self) if not own.metadata["may_change"]}


def check_keywords_are_plain(name: str, keywords: Mapping[str, Any]) -> None:
    """Raise InputError for a keyword that can be neither written to a file nor given to another process."""
    for keyword, value in keywords.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: {keyword}={value!r}: expected numbers, text, lists or mappings") from error


def is_optional(own: Field) -> bool:
    """Whether a field may be None."""
    return NoneType in get_args(own.type)


def type_of(own: Field) -> Any:
    """The one type of a field's values besides None; ``object`` where there are several."""
    types = (
        [kind for kind in get_args(own.type) if kind is not NoneType] if get_origin(own.type) is Union else [own.type]
    )
    return get_origin(types[0]) or types[0] if len(types) == 1 else object


class KeyValue(ParseKwargs):
    """timm's ``key=value`` arguments, with an error for one that is none; an option may be given several times."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Optional[str] = None
    ) -> None:
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"{option_string} {wrong[0]}: expected key=value")
        before = getattr(namespace, self.dest, None) or {}
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, {**before, **getattr(namespace, self.dest)})


def add_settings(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """Add an option for each field; those that aren't given stay out of the parsed namespace."""
    for own in fields(kind):
        # on a command line None is an option that isn't given
        meaning = description(own, "; default: ").replace("None: ", "not given: ").replace("None is ", "not given is ")
        options: dict[str, Any] = dict(help=meaning.replace("%", "%%"))
        options.update(default=argparse.SUPPRESS, required=own.default is MISSING)
        if type_of(own) is bool:
            options["action"] = "store_true"
        elif own.metadata["nargs"]:
            options["nargs"] = own.metadata["nargs"]
        elif type_of(own) is dict:
            options.update(nargs="*", action=KeyValue, metavar="KEY=VALUE")
        else:
            options["type"] = own.metadata["parse"] or type_of(own)
        names = [f"--{own.name.replace('_', '-')}", own.metadata["alias"]]
        parser.add_argument(*filter(None, names), **options)


def given_settings(arguments: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """What was given of the options that ``add_settings`` added, as keywords."""
    return {own.name: value for own in fields(kind) if (value := getattr(arguments, own.name, MISSING)) is not MISSING}


def description(own: Field, before_default: str) -> str:
    """Meaning, range and default of a field in one line."""
    allowed, meaning = own.metadata["allowed"], own.metadata["meaning"]
    text = f"{meaning} ({allowed.words})" if allowed else meaning
    silent = any(own.default is value for value in (MISSING, None, False))  # 0 equals False, but it is a default
    return text if silent else f"{text}{before_default}{own.default}"


def documented(kind: type[Settings]) -> Callable[[Function], Function]:
    """Decorator for a function that takes the fields of ``kind`` as arguments: they become its signature.

    A line ``{settings}`` in its docstring becomes their descriptions.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(kind)
        returned = inspect.signature(function).return_annotation
        function.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        wrap = functools.partial(textwrap.fill, width=112, initial_indent=" " * 8, subsequent_indent=" " * 12)
        lines = [wrap(f"{own.name}: {description(own, '; default: ')}.") for own in fields(kind)]
        if function.__doc__:  # python -OO has none
            function.__doc__ = function.__doc__.replace("        {settings}", "\n".join(lines))
        return function

    return decorate


def check_ranges(run: Any, ranges: Ranges) -> None:
    """Raise InputError for a setting out of its range; a setting that is None is not checked.

    ``ranges``: for each range the names of its settings, the allowed values in words, and a function that checks one.
    """
    for names, allowed, holds in ranges:
        for name in names.split():
            value = getattr(run, name)
            if value is not None and not holds(value):
                raise InputError(f"{name}={value}: allowed is {allowed}")


def local_folder(name: str) -> Optional[str]:
    """The folder of a model that timm loads by "local-dir:"; None for another name."""
    return name.removeprefix("local-dir:") if name.startswith("local-dir:") else None


def check_folder(out: Path, resume: bool, overwrite: bool, **starts: Optional[str]) -> None:
    """Raise ValueError for a folder of results that can't be continued, or that holds something to keep.

    ``starts``: by the names of their settings, the files and folders that the run starts from, or None. It needs them
    again when it is continued.
    """
    check_at_most_one(resume=resume, overwrite=overwrite)
    for name, start in starts.items() if overwrite else ():
        if start and Path(start).resolve().is_relative_to(out.resolve()):
            raise InputError(f"{name}={start} lies in out={out}, which overwrite replaces; give another out")
    if resume and not (out / "checkpoint.pt").is_file():
        raise InputError(f"resume: {out} holds no checkpoint.pt; start without resume")
    # a run that was killed while it wrote its first checkpoint leaves checkpoint.pt.partial
    found = sorted(out.iterdir()) if out.is_dir() else [out] * out.exists()
    held = [path for path in found if path.suffix != ".partial" or path.is_dir()]
    if held and not (resume or overwrite):
        raise InputError(
            f"out={out} already holds {held[0].name}; give resume to continue that run, overwrite to delete it, or "
            "another out"
        )
