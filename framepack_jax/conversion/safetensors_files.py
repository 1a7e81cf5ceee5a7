"""Write safetensors files, one tensor at a time.

An unfinished file has a hidden name that ends in `.partial`, and is renamed when it is complete.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from framepack_jax.conversion.engine import Advance, silent
from framepack_jax.conversion.transforms import Shape

# Dtype -> its name in the header of a safetensors file.
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    """A tensor to write: its name, shape, and the name of its numpy dtype."""

    name: str
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def shards(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Group tensors into shards of at most `limit` bytes, or of one tensor."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def write_safetensors(
    path: Path,
    tensors: list[Tensor],
    arrays: Iterator[np.ndarray],
    advance: Advance = silent,
) -> None:
    """Write a safetensors file, which gets its name when complete; see `stream_safetensors`."""
    partial = partial_name(path)
    with partial.open("wb") as file:
        stream_safetensors(file, tensors, arrays, advance)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def stream_safetensors(
    file: BinaryIO,
    tensors: list[Tensor],
    arrays: Iterator[np.ndarray],
    advance: Advance = silent,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to an open file in the safetensors format, one array at a time.

    The format is the length of the header, the header as JSON with `metadata`, and the values
    (README of huggingface/safetensors). Unlike with `safetensors.save_file`, the caller decides on
    the permissions of the file. Raises ValueError if an array contradicts `tensors`.
    """
    _write_header(file, tensors, metadata or {})
    for tensor, array in zip(tensors, arrays, strict=True):
        if array.shape != tensor.shape or str(array.dtype) != tensor.dtype:
            raise ValueError(f"{tensor} would be written as {array.dtype} {array.shape}")
        file.write(array.reshape(-1).view(np.uint8).data)
        advance(array.nbytes)


def partial_name(path: Path) -> Path:
    """Return the name of a file or folder until it is complete."""
    return path.with_name(f".{path.name}.partial")


def _write_header(file: BinaryIO, tensors: list[Tensor], metadata: Mapping[str, str]) -> None:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        fields[tensor.name] = {
            "dtype": STORED[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end],
        }  # fmt: skip
        begin = end
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
