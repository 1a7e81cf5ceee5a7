"""Shards that are written record by record."""

import pytest

from framepack_jax.data import records, shard_writer
from framepack_jax.data.records import VideoSource
from framepack_jax.data.shard_writer import ShardWriter
from tests.fixtures.training_data import random_record, write_dataset


def test_shards_are_the_same_each_time_and_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 15_000)
    made = [write_dataset(tmp_path / name) for name in ("a", "b")]
    index = records.read_index(tmp_path / "a")
    assert len(index.shards) > 2 and index.clips == 8
    assert index.buckets == [(32, 48), (48, 32)]
    for shard in index.shards:
        files = [tmp_path / name / shard.path for name in ("a", "b")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(tmp_path.rglob("*.part"))
    source = VideoSource(tmp_path / "a", index.shards)
    assert [source[i].clip.id for i in range(8)] == [record.clip.id for record in made[0]]


def test_a_full_disk_leaves_no_shard(tmp_path, monkeypatch) -> None:
    class Full:
        def __init__(self, *_: object) -> None: ...

        def write(self, data: bytes) -> None:
            raise RuntimeError("No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(shard_writer, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"32x48-00000.*No space left"):
        write_dataset(tmp_path)
    assert not list(tmp_path.rglob("*.arrayrecord"))


def test_shards_of_two_buckets_grow_side_by_side(tmp_path) -> None:
    """One that is closed before it is complete leaves nothing."""
    write_dataset(tmp_path / "whole", {(32, 48): (3, 4), (48, 32): (5, 6)})
    index = records.read_index(tmp_path / "whole")
    writers = [ShardWriter(tmp_path / "new", bucket) for bucket in ((32, 48), (48, 32))]
    for turn in range(2):
        for number, writer in enumerate(writers):
            length = index.shards[number].lengths[turn]
            record = random_record(2 * number + turn, *writer.bucket, length)
            writer.add(records.pack(record), length)
    unfinished = ShardWriter(tmp_path / "new", (64, 64))
    unfinished.add(records.pack(random_record(0, 64, 64, 3)), 3)
    assert len(list((tmp_path / "new" / "shards").iterdir())) == 3
    assert tuple(writers[0].finish() + writers[1].finish()) == index.shards
    for writer in (*writers, unfinished):
        writer.close()
    files = sorted(file.name for file in (tmp_path / "new" / "shards").iterdir())
    assert files == sorted(shard.path.rpartition("/")[2] for shard in index.shards)
