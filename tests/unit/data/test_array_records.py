"""Single records of a file, read by the ranges of their bytes."""

import contextlib
import zlib

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from framepack_jax.data import array_records, records
from framepack_jax.data.array_records import FIRST, OPTIONS, Place, ends_of_chunks
from framepack_jax.data.records import DatasetError, VideoSource
from tests.fixtures.training_data import write_dataset

BLOCK = 1 << 16


def test_records_of_every_length_lie_where_they_are_said_to(tmp_path, monkeypatch) -> None:
    """Also those that end at, or a byte beside, a boundary of the format's blocks."""
    rng = np.random.default_rng(0)
    edges = [BLOCK - 24 - header + more for header in (40, 45, 109) for more in range(-2, 3)]
    lengths = [0, 1, 127, 128, *edges, 2 * BLOCK, *rng.integers(0, 1 << 18, 40)]
    written = [rng.bytes(int(length)) for length in lengths]
    file = tmp_path / "a.arrayrecord"
    with contextlib.closing(ArrayRecordWriter(str(file), OPTIONS)) as writer:
        for data in written:
            writer.write(data)
    content = file.read_bytes()
    monkeypatch.setattr(array_records.storage, "read_range", lambda _, a, b: content[a:b])
    ends = ends_of_chunks(file, len(written))
    for data, begin, end in zip(written, [FIRST, *ends], ends, strict=False):
        found = array_records.read_from_store("gs://b/a", Place(begin, end, zlib.crc32(data)))
        assert found == data


def test_a_dataset_is_read_from_a_bucket(bucket, tmp_path) -> None:
    """A damaged record and a shard that is gone are named."""
    folder = epath.Path(bucket) / "dataset"
    write_dataset(folder)
    write_dataset(tmp_path)
    index = records.read_index(folder)
    assert index == records.read_index(tmp_path)
    there, here = (VideoSource(place, index.shards) for place in (folder, tmp_path))
    for number in range(len(there)):
        assert records.pack(there[number]) == records.pack(here[number])
    for a, b in zip(*(records.read_empty(p, index) for p in (folder, tmp_path)), strict=True):
        np.testing.assert_array_equal(a, b)
    shard = folder / index.shards[0].path
    data = bytearray(shard.read_bytes())
    data[index.shards[0].ends[0] - 9] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"gs://.*32x48-00000-\w+.arrayrecord, record 0.*differ"):
        there[0]
    assert records.pack(there[1]) == records.pack(here[1])
    shard.unlink()
    with pytest.raises(DatasetError, match=r"record 0, cannot be read"):
        there[0]
    with pytest.raises(DatasetError, match="lacks 1 of its shards"):
        records.read_index(folder)
