"""Texts of errors and comparisons of records."""

from framepack_jax.utils.compare import THERE_HERE, differences, differing_fields
from framepack_jax.utils.messages import MAX_LISTED, bytes_text, first_line, shorten


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("too long\nat length")) == "too long"
    assert first_line(MemoryError()) == "MemoryError"


def test_long_lists_are_shortened() -> None:
    names = [str(i) for i in range(MAX_LISTED)]
    assert shorten(names) == ", ".join(names)
    assert shorten((*names, "a", "b")) == ", ".join([*names, "and 2 more"])
    assert shorten(iter("abc"), 1, "; ") == "a; and 2 more"
    assert shorten([]) == ""


def test_bytes_have_the_largest_unit() -> None:
    found = [bytes_text(number) for number in (0, 12, 45_600, 1_234_000, 84.04e9, 151e9, 2.5e12)]
    assert found == [
        "0.00 kB", "0.01 kB", "45.6 kB", "1.23 MB", "84.0 GB", "151 GB", "2.50 TB",
    ]  # fmt: skip


def test_records_are_compared_field_by_field() -> None:
    old, new = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": "2", "d": None}
    assert differing_fields(old, new) == ["b", "c"]
    assert differing_fields(old, new, ["c", "a"]) == ["c"]
    assert differences(old, new, ["b"]) == ["b = 2 then, '2' now"]
    assert differences(old, new, words=THERE_HERE)[1] == "c = 3 there, None here"
