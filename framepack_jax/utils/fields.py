"""Check dataclasses by the types of their fields, and load them from JSON objects.

    steps: Annotated[int, Range(at_least=1, at_most=1000)] = 25
    sampler: Literal["unipc", "euler"] = "unipc"

Fields are numbers, texts, paths, choices, tuples, mappings, optionals and other dataclasses.
Numbers must be finite. A float takes an int, a `Path` takes a text, a tuple takes a list.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
# Name and value of a field, as an error message states them.
Label = Callable[[str, Any], str]
MAX_SHOWN = 60
DESCRIPTIONS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    None: "none",
    type(None): "none",
}


class FieldError(ValueError):
    """A field that is unknown or missing, or whose value is not of its type, choices or range."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, or of each number in a tuple; `above` and `below` are exclusive."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Return the bounds as words behind "a number": "from 0 to below 1"."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {_number(self.at_least)} to {_number(self.at_most)}"
        if self.at_least is not None and self.below is not None:
            return f"from {_number(self.at_least)} to below {_number(self.below)}"
        if self.at_least is not None:
            return f"of {_number(self.at_least)} or more"
        words = {"above": self.above, "at most": self.at_most, "below": self.below}
        return ", ".join(f"{word} {_number(n)}" for word, n in words.items() if n is not None)


def as_field(name: str, value: Any) -> str:
    """Label a field of a file: "optimizer.b1 = 2"."""
    return f"{name} = {value!r:.{MAX_SHOWN}}"


def as_flag(name: str, value: Any) -> str:
    """Label a field that a command-line flag sets: "--optimizer.b1 2"."""
    return f"--{name.replace('_', '-')} {value!s:.{MAX_SHOWN}}"


def check(config: "DataclassInstance", label: Label = as_flag, prefix: str = "") -> None:
    """Check every field of a dataclass, and of the dataclasses in it. Raises FieldError."""
    for name, hint in _hints(type(config)).items():
        _converted(hint, getattr(config, name), f"{prefix}{name}", label, False)


def load(
    cls: type[T],
    values: Any,
    label: Label = as_field,
    prefix: str = "",
    *,
    ignore_unknown: bool = False,
) -> T:
    """Make a dataclass from a JSON object; absent fields keep their defaults.

    Args:
        label: how error messages state a field's name and value.
        prefix: what comes before each name in error messages, such as "optimizer.".
        ignore_unknown: skip fields that the class does not have.

    Raises FieldError, and what the class itself raises.
    """
    given = convert(cls, values, label, prefix, ignore_unknown=ignore_unknown)
    for field in dataclasses.fields(cls):
        default = (field.default, field.default_factory)
        if field.name not in given and default == (dataclasses.MISSING,) * 2:
            raise FieldError(f"{prefix}{field.name} is missing")
    return cls(**given)


def convert(
    cls: type["DataclassInstance"],
    values: Any,
    label: Label = as_field,
    prefix: str = "",
    *,
    ignore_unknown: bool = False,
) -> dict[str, Any]:
    """Return the values of a JSON object as the fields of `cls` take them. Raises FieldError."""
    if not isinstance(values, Mapping):
        name = prefix.removesuffix(".") or cls.__name__
        raise FieldError(f"{label(name, values)}: expected an object")
    hints = _hints(cls)
    if (unknown := sorted(set(values) - hints.keys())) and not ignore_unknown:
        raise FieldError(f"unknown fields {unknown}; known are {', '.join(hints)}")
    return {
        name: _converted(hints[name], value, f"{prefix}{name}", label, ignore_unknown)
        for name, value in values.items()
        if name in hints
    }


def _hints(cls: type["DataclassInstance"]) -> dict[str, Any]:
    """Name -> type of each field."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _converted(hint: Any, value: Any, name: str, label: Label, ignore_unknown: bool) -> Any:
    """Return the value of a field, which may be a dataclass. Raises FieldError."""
    cls = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        if not isinstance(value, cls):
            return load(cls, value, label, f"{name}.", ignore_unknown=ignore_unknown)
        check(value, label, f"{name}.")
        return value
    if get_origin(hint) in (Union, types.UnionType) and isinstance(value, Mapping):
        for each in filter(dataclasses.is_dataclass, get_args(hint)):
            return _converted(each, value, name, label, ignore_unknown)
    try:
        return _matched(hint, value)
    except _Mismatch:
        raise FieldError(f"{label(name, value)}: expected {describe(hint)}") from None


class _Mismatch(Exception):
    """A value that is not of a type."""


def _matched(hint: Any, value: Any) -> Any:
    """Return the value as the type takes it. Raises _Mismatch."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_range(_matched(args[0], value), args[1:])
    if origin in (Union, types.UnionType):
        return _first_matched(args, value)
    if origin is tuple:
        return _tuple(args, value)
    if hint is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if hint is Path and isinstance(value, str | os.PathLike):
        return Path(value)
    if not _is_of(hint, value):
        raise _Mismatch
    return value


def _is_of(hint: Any, value: Any) -> bool:
    """Return whether a value needs no conversion to a type that is not made of others."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    cls = get_origin(hint) or hint
    return not isinstance(cls, type) or isinstance(value, cls)


def _in_range(value: Any, marks: tuple[Any, ...]) -> Any:
    numbers = value if isinstance(value, tuple) else (value,)
    for bounds in (mark for mark in marks if isinstance(mark, Range)):
        if not all(number is None or number in bounds for number in numbers):
            raise _Mismatch
    return value


def _first_matched(hints: tuple[Any, ...], value: Any) -> Any:
    for hint in hints:
        try:
            return _matched(hint, value)
        except _Mismatch:
            continue
    raise _Mismatch


def _tuple(items: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise _Mismatch
    if items[-1:] == (...,):
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise _Mismatch
    return tuple(_matched(hint, item) for hint, item in zip(items, value, strict=True))


def describe(hint: Any) -> str:
    """Return in words what a field of this type takes: "a whole number from 1 to 10"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [str(mark) for mark in args[1:] if isinstance(mark, Range)]
        return " ".join([describe(args[0]), *bounds])
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        count = "" if ... in args else f" of {len(args)}"
        return f"a list{count}, each {describe(args[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "an object"
    return DESCRIPTIONS.get(hint, str(hint))


def _number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
