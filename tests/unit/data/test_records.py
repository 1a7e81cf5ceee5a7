"""Prepared clips on disk."""

import dataclasses
import json

import numpy as np
import pytest

from framepack_jax.data import array_records, records
from framepack_jax.data.array_records import FIRST
from framepack_jax.data.records import DatasetError, VideoSource
from tests.fixtures.training_data import random_record, write_dataset


def test_a_record_comes_back_bit_for_bit() -> None:
    record = random_record(3, 32, 48, 5)
    data = records.pack(record)
    again = records.unpack(data)
    assert again.clip == record.clip
    for name in records.ARRAYS:
        old, new = getattr(record, name), getattr(again, name)
        assert new.dtype == old.dtype and np.array_equal(new.view(np.uint16), old.view(np.uint16))
        assert not new.flags.owndata
    assert records.pack(again) == data
    without = records.unpack(records.pack(record._replace(latents=None)))
    assert without.latents is None


def test_a_cut_record_is_named() -> None:
    data = records.pack(random_record(3, 32, 48, 5))
    for length in (4, 40, len(data) - 10):
        with pytest.raises(DatasetError, match="damaged"):
            records.unpack(data[:length])


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "zeros"])
def test_a_damaged_shard_is_named_with_its_record(tmp_path, damage) -> None:
    made = write_dataset(tmp_path)
    index = records.read_index(tmp_path)
    file = tmp_path / index.shards[0].path
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[1000] ^= 1
    zeros = data[:1000] + bytes(len(data) - 1000)
    file.write_bytes({"cut": data[:3000], "bit": data, "empty": b"", "zeros": zeros}[damage])
    array_records._reader.cache_clear()
    source = VideoSource(tmp_path, index.shards)
    with pytest.raises(DatasetError, match=r"32x48-00000-\w+\.arrayrecord, record \d"):
        [source[i] for i in range(5)]
    assert source[6].clip.id == made[6].clip.id


def test_a_flipped_bit_is_never_read_as_a_record(tmp_path) -> None:
    """Wherever it is in the file, and whether that lies on a disk or in a bucket."""
    write_dataset(tmp_path, {(32, 48): (3, 4)})
    index = records.read_index(tmp_path)
    (shard,) = index.shards
    file, source = tmp_path / shard.path, VideoSource(tmp_path, index.shards)
    whole, rng, noticed = file.read_bytes(), np.random.default_rng(0), set()
    expected = [records.pack(source[number]) for number in range(2)]
    near = [*range(FIRST), *rng.integers(0, shard.ends[-1], 200)]
    for place in [*near, *rng.integers(shard.ends[-1], len(whole), 50)]:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        array_records._reader.cache_clear()
        for number in range(2):
            for read in (
                lambda n: records.pack(source[n]),
                lambda n: array_records.read_from_store(file, shard.place(n)),
            ):
                try:
                    assert read(number) == expected[number], place
                except (DatasetError, ValueError):
                    noticed.add(int(place))
    assert len(noticed) > 150


def test_unfinished_and_damaged_datasets_are_told_apart(tmp_path) -> None:
    with pytest.raises(DatasetError, match=r"is not a dataset .* framepack prepare"):
        records.read_index(tmp_path)
    write_dataset(tmp_path)
    fields = json.loads((tmp_path / records.INDEX).read_text())
    (tmp_path / records.INDEX).unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        records.read_index(tmp_path)
    (tmp_path / records.INDEX).write_text('{"format": 1}')
    with pytest.raises(DatasetError, match="damaged"):
        records.read_index(tmp_path)
    (tmp_path / records.INDEX).write_text(json.dumps(fields | {"format": 7}))
    with pytest.raises(DatasetError, match="format 7"):
        records.read_index(tmp_path)
    (tmp_path / records.INDEX).write_text(json.dumps(fields))
    next((tmp_path / records.SHARDS).glob("32x48*")).unlink()
    with pytest.raises(DatasetError, match="lacks 1 of its shards"):
        records.read_index(tmp_path)


def test_the_index_comes_back(tmp_path) -> None:
    write_dataset(tmp_path)
    index = records.read_index(tmp_path)
    records.write_index(tmp_path, dataclasses.replace(index, fps=24.0))
    assert records.read_index(tmp_path) == dataclasses.replace(index, fps=24.0)
