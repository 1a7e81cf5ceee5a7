"""Open checkpoints: safetensors, folders of diffusers and transformers, PyTorch's `.pt`.

A `Checkpoint` lists names, shapes and dtypes without reading weights, and reads one tensor at a
time as a numpy array. bfloat16 becomes `ml_dtypes.bfloat16` with the same bits, and 8-bit floats
become bfloat16 (`float8`).
"""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import safetensors

from framepack_jax.conversion import file_formats, float8
from framepack_jax.conversion.file_formats import SAFETENSORS_DTYPES, ConversionError, Entry
from framepack_jax.utils import fields
from framepack_jax.utils.messages import shorten

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "SAFETENSORS_DTYPES", "Checkpoint", "ConversionError", "Entry", "count_not_finite",
    "make_config", "open_checkpoint", "read_json", "reading_shapes",
]  # fmt: skip

Config = TypeVar("Config", bound="DataclassInstance")
# Floating dtype -> unsigned dtype of the same width, and the exponent bits (all set in NaN, inf).
EXPONENTS = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}
# Numbers that are checked at a time; they fit into the processor's cache.
PIECE = 1 << 18
# Parts of names that module wrappers add: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\."
)
# Names of shards, as huggingface_hub and transformers write them.
SHARD = re.compile(r".+-(?P<number>\d{5})-of-(?P<count>\d{5})\.\w+")
INDICES = ("*.safetensors.index.json", "*.bin.index.json")


class Checkpoint:
    """Named tensors of a file or folder, opened by `open_checkpoint`."""

    def __init__(
        self, path: Path, files: list[Path], entries: dict[str, Entry], notes: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.files = files
        self._entries = entries
        self._notes = notes

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Return the name of the tensor's dtype after reading, such as "bfloat16"."""
        return self._entries[name].dtype

    def parameters(self) -> dict[str, int]:
        """Return the number of parameters by stored dtype, the most common dtype first."""
        counts: Counter[str] = Counter()
        for entry in self._entries.values():
            counts[entry.stored or entry.dtype] += math.prod(entry.shape)
        return dict(counts.most_common())

    def read(self, name: str) -> np.ndarray:
        """Read a tensor. Raises ConversionError if the file is damaged, or if a number is NaN or
        infinite."""
        try:
            array = self._entries[name].read()
        except ConversionError:
            raise
        except (
            OSError, RuntimeError, ValueError, TypeError, AttributeError,
            safetensors.SafetensorError,
        ) as error:  # fmt: skip
            raise ConversionError(f"{self.path}: cannot read {name} ({error})") from error
        if count := count_not_finite(array):
            raise ConversionError(
                f"{self.path}: {name} holds {count} numbers of {array.size} that are NaN or"
                " infinite; the file is damaged, or its training diverged: use another"
                " checkpoint"
            )
        return array

    def config(self) -> dict[str, Any] | None:
        """Return `config.json` in the folder of the checkpoint, None if there is none."""
        file = self.folder / "config.json"
        return read_json(file) if file.exists() else None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def source(self) -> dict[str, Any]:
        """Return the provenance that a bundle records: name, sizes of files, format."""
        sizes = {file.name: file.stat().st_size for file in self.files}
        return {"name": self.path.name, "files": sizes, "format": self.format}

    @property
    def format(self) -> str:
        """Describe the files, and the changes to names and to 8-bit weights."""
        torch = any(file.suffix in file_formats.TORCH_SUFFIXES for file in self.files)
        sort = "PyTorch" if torch else "safetensors"
        files = f", {len(self.files)} files" if len(self.files) > 1 else ""
        return "; ".join([f"{sort}{files}", *self._notes])


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, a PyTorch file, or a folder with one model in either format.

    Raises ConversionError, which names the file, what was expected, and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ConversionError(f"{path} does not exist; expected a checkpoint file or its folder")
    if not path.is_dir():
        _check_not_shard(path)
    files = _files_of(path) if path.is_dir() else [path]
    entries: dict[str, Entry] = {}
    notes: list[str] = []
    for file in files:
        held, note = file_formats.entries_of(file)
        notes += [note] if note not in ("", *notes) else []
        for name, entry in held.items():
            # A repeated tensor gets a name of its own, so that it is reported with all other
            # tensors that do not fit.
            entries[f"{name} (again, in {file.name})" if name in entries else name] = entry
    if path.is_dir():
        _check_index(path, entries)
    if not entries:
        raise ConversionError(f"{path} holds no tensors; expected the weights of one model")
    entries, unwrapped = _unwrap(entries)
    entries, unpacked = float8.unpack(path, files, entries)
    notes += [note for note in (unwrapped, unpacked) if note]
    return Checkpoint(path, files, entries, notes)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConversionError if the file holds anything else."""
    file_formats.check_contents(file)
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} is not a JSON file ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{file} holds a JSON {type(found).__name__}, expected an object")
    return found


def make_config(file: Path, config_class: type[Config], **values: Any) -> Config:
    """Return the config of a network with the sizes that `file` gives.

    Raises ConversionError if a size has the wrong type or is out of range, or if sizes contradict
    each other.
    """
    try:
        return fields.load(config_class, values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(f"{file}: {error}") from error


@contextlib.contextmanager
def reading_shapes(path: Path) -> Iterator[None]:
    """Turn the errors of code that derives sizes from tensor shapes into ConversionError."""
    try:
        yield
    except ConversionError:
        raise
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError(
            f"{path}: its sizes cannot be derived from the shapes of its tensors ({error}); the"
            " file is damaged, or belongs to another model"
        ) from error


def _files_of(folder: Path) -> list[Path]:
    """Return the weight files of a folder: the shards of its index, or its only file."""
    if index := _index_of(folder):
        names = sorted(set(_weight_map(index).values()))
        if outside := [name for name in names if _leaves(name)]:
            raise ConversionError(
                f"{index} names files outside its folder: {shorten(outside)}; take the"
                " checkpoint from elsewhere"
            )
        shards = [folder / name for name in names]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise ConversionError(
                f"{index} names {len(missing)} files that are not in {folder}:"
                f" {shorten(missing)}; download the missing shards"
            )
        return shards
    for suffixes in (file_formats.SAFETENSORS_SUFFIXES, file_formats.TORCH_SUFFIXES):
        files = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if len(files) == 1:
            return files
        if files:
            raise ConversionError(
                f"{folder} has several checkpoints and no index:"
                f" {', '.join(file.name for file in files[:4])}; give the path of one file"
            )
    if quantized := next(folder.glob(f"*{file_formats.GGUF_SUFFIX}"), None):
        raise ConversionError(f"{quantized} {file_formats.GGUF}")
    if any(folder.glob("*.distcp")):
        raise ConversionError(
            f"{folder} is a checkpoint of torch.distributed; make one file of it with: python -m"
            f" torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt"
        )
    listed = ", ".join("*" + suffix for suffix in file_formats.TORCH_SUFFIXES)
    raise ConversionError(
        f"{folder} has no checkpoint; expected *.safetensors, with *.safetensors.index.json where"
        f" it is sharded, or one of {listed}"
    )


def _check_not_shard(file: Path) -> None:
    """Raise ConversionError if a file is one shard of several, named as in the hub's indices."""
    shard = SHARD.fullmatch(file.name)
    if shard and int(shard["count"]) > 1:
        raise ConversionError(
            f"{file} is shard {int(shard['number'])} of {int(shard['count'])}; give its folder,"
            f" {file.parent}, with all shards and their index"
        )


def _unwrap(entries: dict[str, Entry]) -> tuple[dict[str, Entry], str]:
    """Remove the parts of names that wrappers add; return the tensors, and a note on the removed
    parts ("" if there are none)."""
    found = {part.group() for name in entries for part in WRAPPERS.finditer(name)}
    unwrapped: dict[str, Entry] = {}
    for name, entry in entries.items():
        inner = WRAPPERS.sub("", name)
        unwrapped[f"{inner} (again, as {name})" if inner in unwrapped else inner] = entry
    return unwrapped, f"{', '.join(sorted(found))} taken out of names" if found else ""


def _index_of(folder: Path) -> Path | None:
    for pattern in INDICES:
        indices = sorted(folder.glob(pattern))
        if len(indices) > 1:
            raise ConversionError(
                f"{folder} has several indices: {', '.join(file.name for file in indices)};"
                " keep one"
            )
        if indices:
            return indices[0]
    return None


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) and v for v in names.values()):
        names = None
    if not names:
        raise ConversionError(f"{index} has no weight_map from tensors to files; download it again")
    return names


def _leaves(name: str) -> bool:
    """Return True if a file named by an index is outside of the index's folder.

    Links may point anywhere: the hub's cache consists of links.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or "\0" in name


def _check_index(folder: Path, entries: dict[str, Entry]) -> None:
    """Raise ConversionError if the index names tensors that its shards do not hold."""
    index = _index_of(folder)
    if index is None:
        return
    absent = sorted(name for name in _weight_map(index) if name not in entries)
    if absent:
        raise ConversionError(
            f"{index} names {len(absent)} tensors that its shards do not hold:"
            f" {shorten(absent)}; download the shards again"
        )


def count_not_finite(array: np.ndarray) -> int:
    """Count the numbers of a floating array that are NaN or infinite, by their exponent bits.

    At 9 GB/s this takes less time than reading the file.
    """
    if array.dtype.name not in EXPONENTS:
        return 0
    unsigned, exponent = EXPONENTS[array.dtype.name]
    bits = array.ravel(order="K").view(unsigned)
    pieces = (bits[i : i + PIECE] & unsigned(exponent) for i in range(0, bits.size, PIECE))
    return sum(int(np.count_nonzero(piece == unsigned(exponent))) for piece in pieces)
