"""Aspect buckets: golden choices and the properties of the table."""

import json

import pytest

from framepack_jax.packing.buckets import BUCKETS_480P, find_bucket


@pytest.mark.golden
def test_choices_equal_the_release(golden):
    rows = json.loads((golden / "buckets.json").read_text())
    assert rows
    for row in rows:
        assert list(find_bucket(row["height"], row["width"])) == row["bucket"], row


def test_every_bucket_finds_itself_and_its_transpose():
    assert len(BUCKETS_480P) == 14
    for height, width in BUCKETS_480P:
        assert find_bucket(height, width) == (height, width)
        assert (width, height) in BUCKETS_480P
        assert height % 32 == 0 and width % 32 == 0


def test_a_square_is_a_tie_that_goes_to_the_later_bucket():
    assert find_bucket(1, 1) == find_bucket(2000, 2000) == (640, 608)


def test_a_table_of_ones_own():
    assert find_bucket(10, 30, [(32, 64), (32, 96)]) == (32, 96)


def test_an_image_without_area_is_refused():
    with pytest.raises(ValueError, match="0x5 pixels"):
        find_bucket(0, 5)
