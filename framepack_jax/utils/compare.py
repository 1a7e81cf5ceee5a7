"""Compare the records of two runs, datasets or configurations."""

from collections.abc import Iterable, Mapping
from typing import Any

# Labels of the values of the first and the second record in messages.
THERE_HERE = ("there", "here")
THEN_NOW = ("then", "now")


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a record of records by dotted names: {"lora.rank": 32}."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        here = f"{prefix}{name}"
        found |= flat(value, f"{here}.") if isinstance(value, Mapping) else {here: value}
    return found


def differing_fields(
    first: Mapping[str, Any], second: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[str]:
    """Return the fields whose values differ, by name; a missing field equals None.

    Args:
        names: Fields to compare, in this order; default: all of both records, sorted.
    """
    compared = sorted(first.keys() | second.keys()) if names is None else names
    return [name for name in compared if first.get(name) != second.get(name)]


def differences(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    names: Iterable[str] | None = None,
    words: tuple[str, str] = THEN_NOW,
) -> list[str]:
    """Return a text for each differing field: "seed = 0 then, 4 now"."""
    old, new = words
    return [
        f"{name} = {first.get(name)!r} {old}, {second.get(name)!r} {new}"
        for name in differing_fields(first, second, names)
    ]
