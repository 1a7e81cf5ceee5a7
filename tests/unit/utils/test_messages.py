"""Texts of errors and comparisons of records."""

from framepack_jax.utils.compare import THERE_HERE, differences, differing_fields
from framepack_jax.utils.messages import MAX_LISTED, first_line, shorten


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("too long\nat length")) == "too long"
    assert first_line(MemoryError()) == "MemoryError"


def test_long_lists_are_shortened() -> None:
    names = [str(i) for i in range(MAX_LISTED)]
    assert shorten(names) == ", ".join(names)
    assert shorten((*names, "a", "b")) == ", ".join([*names, "and 2 more"])
    assert shorten(iter("abc"), 1, "; ") == "a; and 2 more"
    assert shorten([]) == ""


def test_records_are_compared_field_by_field() -> None:
    old, new = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": "2", "d": None}
    assert differing_fields(old, new) == ["b", "c"]
    assert differing_fields(old, new, ["c", "a"]) == ["c"]
    assert differences(old, new, ["b"]) == ["b = 2 then, '2' now"]
    assert differences(old, new, words=THERE_HERE)[1] == "c = 3 there, None here"
