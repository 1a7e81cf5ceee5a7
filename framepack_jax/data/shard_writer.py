"""Write records to shards of a dataset, see `records`."""

import contextlib
import hashlib
import zlib
from collections.abc import Iterable, Iterator

from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from framepack_jax.data.array_records import OPTIONS, ends_of_chunks
from framepack_jax.data.records import SHARDS, Shard, unpack, with_digest
from framepack_jax.utils.files import partial_file, publish
from framepack_jax.utils.messages import first_line

SHARD_BYTES = 1 << 30


class ShardWriter:
    """Write records of one bucket to files of about `SHARD_BYTES`, each atomically.

    Equal records give equal files. Methods raise OSError if the disk is full.
    """

    def __init__(self, folder: epath.PathLike, bucket: tuple[int, int]) -> None:
        self.folder, self.bucket = epath.Path(folder), bucket
        self.shards: list[Shard] = []
        self._file: _ShardFile | None = None

    def add(self, data: bytes, length: int) -> None:
        """Write a record of `length` latent frames."""
        if self._file is None:
            name = f"{self.bucket[0]}x{self.bucket[1]}-{len(self.shards):05d}.arrayrecord"
            self._file = _ShardFile(self.folder, name)
        self._file.add(data, length)
        if self._file.size >= SHARD_BYTES:
            self.finish()

    def finish(self) -> list[Shard]:
        """Complete the last file; return all shards."""
        if self._file is not None:
            self.shards.append(self._file.finish(self.bucket))
            self._file = None
        return self.shards

    def close(self) -> None:
        """Remove the file that is not complete."""
        if self._file is not None:
            self._file.close()


class _ShardFile:
    """A file of records that is being written, and what the index says about them."""

    def __init__(self, folder: epath.Path, name: str) -> None:
        self.name, self.path = name, folder / SHARDS / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lengths: list[int] = []
        self.videos: list[str] = []
        self.tokens: list[int] = []
        self.crcs: list[int] = []
        self.size, self.digest = 0, hashlib.sha256()
        self._exits = contextlib.ExitStack()
        self.file = self._exits.enter_context(partial_file(self.path))
        with self._errors():
            self._writer = ArrayRecordWriter(str(self.file), OPTIONS)

    def add(self, data: bytes, length: int) -> None:
        """See `ShardWriter.add`."""
        with self._errors():
            self._writer.write(data)
        self.digest.update(data)
        self.crcs.append(zlib.crc32(data))
        self.lengths.append(length)
        record = unpack(data)
        self.videos.append(hashlib.sha256(record.clip.video.encode()).hexdigest()[:16])
        self.tokens.append(len(record.text))
        self.size += len(data)

    def finish(self, bucket: tuple[int, int]) -> Shard:
        """Give the file its name, which contains its digest."""
        digest = self.digest.hexdigest()[:16]
        with self._errors():
            self._writer.close()
        ends = ends_of_chunks(self.file, len(self.lengths))
        publish(self.file, self.path.with_name(with_digest(self.name, digest)))
        self.close()
        return Shard(
            self.name, *bucket, tuple(self.lengths), tuple(self.videos), tuple(self.tokens),
            digest, tuple(ends), tuple(self.crcs),
        )  # fmt: skip

    def close(self) -> None:
        """Remove the file, unless it is complete."""
        with self._exits, contextlib.suppress(RuntimeError):
            self._writer.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            line = first_line(error)
            raise OSError(f"{self.path} cannot be written ({line}); is the disk full?") from error


def write_shards(
    folder: epath.PathLike, bucket: tuple[int, int], records: Iterable[tuple[bytes, int]]
) -> list[Shard]:
    """Write records (bytes, latent frames) of one bucket. Raises OSError if the disk is full."""
    with contextlib.closing(ShardWriter(folder, bucket)) as writer:
        for data, length in records:
            writer.add(data, length)
        return writer.finish()
