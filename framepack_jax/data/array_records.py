"""Records of ArrayRecord files that are written with "group_size:1,uncompressed".

On a disk, the reader of ArrayRecord reads them and checks their hashes. It knows no object stores:
there, the bytes of a single record are read. Such a file is a sequence of chunks, one for each
record (riegeli_records_file_format.md of google/riegeli): a chunk has a header of 40 bytes, and a
block header of 24 bytes stands at every multiple of 64 KiB.
"""

import functools
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from framepack_jax.utils import storage

OPTIONS = "group_size:1,uncompressed"
BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
# The first chunk is the signature of the file.
FIRST = BLOCK_HEADER + CHUNK_HEADER


class Place(NamedTuple):
    """First byte of a record's chunk, the byte behind it, and the CRC-32 of the record."""

    begin: int
    end: int
    crc: int


def ends_of_chunks(file: Path, count: int) -> list[int]:
    """Return where the chunks of the first `count` records of a file on a disk end."""
    ends, begin = [], FIRST
    with open(file, "rb") as data:
        for _ in range(count):
            data.seek(begin)
            header = _without_blocks(data.read(CHUNK_HEADER + BLOCK_HEADER), begin)
            (size,) = struct.unpack_from("<Q", header, 8)
            begin = _end(begin, CHUNK_HEADER + size)
            ends.append(begin)
    return ends


def read_from_disk(path: epath.PathLike, number: int, count: int) -> bytes:
    """Read a record of a file with `count` records. Raises ValueError, RuntimeError."""
    reader = _reader(os.fspath(path))
    if reader.num_records() != count:
        raise ValueError(f"it holds {reader.num_records()} records, the index says {count}")
    (data,) = reader.read([number])
    return data


@functools.lru_cache(maxsize=256)
def _reader(path: str) -> Any:
    return ArrayRecordReader(path, "readahead_buffer_size:0")


def read_from_store(path: epath.PathLike, place: Place) -> bytes:
    """Read a record of a file in an object store. Raises OSError, ValueError."""
    chunk = storage.read_range(path, place.begin, place.end)
    data = _without_blocks(chunk, place.begin)[CHUNK_HEADER:]
    # One byte names the compression, none; then come the sizes: their length, and a single one.
    _, at = _varint(data, 1)
    size, at = _varint(data, at)
    record = data[at : at + size]
    if data[:1] != b"\0" or zlib.crc32(record) != place.crc:
        raise ValueError("its bytes differ from their checksum")
    return record


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (number, place behind it)."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("the file ends in the record")
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _without_blocks(data: bytes, begin: int) -> bytes:
    """Remove the block headers of bytes that begin at `begin`."""
    parts, at = [], 0
    while at < len(data):
        offset = (begin + at) % BLOCK
        if offset == 0:
            at, offset = at + BLOCK_HEADER, BLOCK_HEADER
        parts.append(data[at : at + BLOCK - offset])
        at += BLOCK - offset
    return b"".join(parts)


def _end(begin: int, size: int) -> int:
    """Return the end of `size` bytes and the block headers between them."""
    usable = BLOCK - BLOCK_HEADER
    headers = (size + (begin + usable - 1) % BLOCK) // usable
    return begin + size + headers * BLOCK_HEADER
