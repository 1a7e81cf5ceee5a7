"""Read one weight file as named tensors: safetensors, or PyTorch's `.pt`.

Opening a file reads only names, shapes and types, and never runs code from it. A damaged file
raises ConversionError: safetensors checks its own header; for PyTorch's zip archives, which torch
does not check, this module checks the offsets of all records and the checksums of all records but
the weights.
"""

import itertools
import json
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# The import registers the name "bfloat16" with numpy, and so with safetensors.
import ml_dtypes
import numpy as np
import safetensors

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = f"{' or '.join(SAFETENSORS_SUFFIXES)}, or {', '.join(TORCH_SUFFIXES)}"
GGUF_SUFFIX = ".gguf"
GGUF = f"is a GGUF file, which is not read; take the same weights in {SUFFIXES}"
# Bytes at the start of a file that identify its format.
HEAD = 512
ZIP_MAGIC, GZIP_MAGIC, GGUF_MAGIC = b"PK\x03\x04", b"\x1f\x8b", b"GGUF"
# A pickle of protocol 2 and up: PyTorch's older files, which are no zip archives.
PICKLE = re.compile(rb"\x80[\x02-\x05]")
LFS_POINTER = re.compile(rb"version https://git-lfs\S+\n(.*\n)*?size (?P<size>\d+)")
WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|\?xml)", re.IGNORECASE)
TEXT = re.compile(r"[^\x00-\x08\x0e-\x1f\x7f]{9,}")
# Depth to which nested dicts are searched for tensors.
MAX_DEPTH = 8
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
FLOAT8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
# Types of notes stored beside weights; no weight has them.
WHOLE = {
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
# Zip archives: the fixed part of a record's header, and the magic number of a data descriptor.
ZIP_HEADER = struct.Struct("<26x2H")
ZIP_DESCRIPTOR = b"PK\x07\x08"
DESCRIBED = 0x08


class ConversionError(ValueError):
    """An unreadable or unsuitable checkpoint; the message says what to do."""


class Entry(NamedTuple):
    """One tensor: its shape, the name of its dtype after reading, a function that reads it, and
    the name of its stored dtype if that differs."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    stored: str | None = None


def entries_of(file: Path) -> tuple[dict[str, Entry], str]:
    """Return the tensors of one file by name, and a note that names the dict that holds them ("" if
    the file itself holds them).

    If several dicts hold tensors, names start with the keys of their dict. Raises ConversionError.
    """
    check_contents(file)
    if file.suffix in SAFETENSORS_SUFFIXES:
        return _safetensors_entries(file), ""
    if file.suffix in TORCH_SUFFIXES:
        return _torch_entries(file)
    if file.suffix == GGUF_SUFFIX:
        raise ConversionError(f"{file} {GGUF}")
    raise ConversionError(f"{file} is not a checkpoint; expected {SUFFIXES}")


def check_contents(file: Path) -> None:
    """Raise ConversionError if the first bytes of a file contradict its suffix, or if the file is a
    placeholder such as a Git LFS pointer or a web page."""
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read ({error.strerror})") from error
    said = _not_a_file(head)
    if not said and file.suffix in (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, GGUF_SUFFIX):
        said = _not_its_format(file, head)
    if said:
        raise ConversionError(f"{file} {said}")


def _not_a_file(head: bytes) -> str | None:
    """Say which placeholder a file is and what to do; None if its first bytes are of no such."""
    if not head:
        return "is empty; download it again"
    if pointer := LFS_POINTER.match(head):
        return (
            f"is a Git LFS pointer to {int(pointer['size']) / 1e6:,.1f} MB, not the file: run"
            " `git lfs pull` in its repository, or download the file itself"
        )
    if WEB_PAGE.match(head):
        return (
            "is a web page: download the file itself (on the Hugging Face hub its address has"
            " /resolve/ in place of /blob/)"
        )
    return None


def _not_its_format(file: Path, head: bytes) -> str | None:
    """Say which format a weight file has and what to do, if its suffix says another."""
    if head.startswith(GGUF_MAGIC):
        return GGUF
    if head.startswith(GZIP_MAGIC):
        return f"is a gzip archive; unpack it and give the {SUFFIXES} file in it"
    if text := _text(head):
        return f"is a text file, not weights; it begins {text!r}. Download it again"
    if _begins_safetensors(file, head):
        if file.suffix in TORCH_SUFFIXES:
            return "is a safetensors file with another suffix; rename it to end in .safetensors"
    elif file.suffix in SAFETENSORS_SUFFIXES and _begins_torch(file, head):
        return "is a PyTorch file with another suffix; rename it to end in .pt"
    elif file.suffix in SAFETENSORS_SUFFIXES and head.startswith(ZIP_MAGIC):
        return f"is a zip archive; unpack it and give the {SUFFIXES} file in it"
    return None


def _begins_safetensors(file: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= file.stat().st_size - 8


def _begins_torch(file: Path, head: bytes) -> bool:
    if not head.startswith(ZIP_MAGIC):
        return bool(PICKLE.match(head))
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return b"/data.pkl" in head


def _text(head: bytes) -> str | None:
    """Return the first line of a text, None for binary data."""
    text = head.decode(errors="ignore")
    return text.strip().split("\n")[0][:60] if TEXT.fullmatch(text) else None


def load_torch(file: Path) -> Any:
    """Load a PyTorch file with its weights memory-mapped, and without running code from it.

    Raises ConversionError.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{file} needs PyTorch to be read: pip install 'framepack-jax[torch]'"
        ) from error
    try:
        mapped = zipfile.is_zipfile(file)
        if mapped:
            _check_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types, by what is damaged or refused
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{file} is not a complete PyTorch checkpoint of plain tensors ({first_line});"
            " download it again, or, if it is complete and holds more, save only its state dict"
        ) from error


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file.

    Tensors are read as plain bytes: a mapped file is read page by page and copied once more.
    """
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            kinds = {n: (tuple(v.get_shape()), v.get_dtype()) for n, v in views.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConversionError(
            f"{file} is not a complete safetensors file ({error}); download it again"
        ) from error
    # safetensors has checked that all ranges are inside the file and fit the shapes.
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))

    def entry(name: str, shape: tuple[int, ...], stored: str) -> Entry:
        dtype = SAFETENSORS_DTYPES.get(stored, stored)
        begin, end = header[name]["data_offsets"]

        def read() -> np.ndarray:
            data = np.fromfile(file, np.uint8, end - begin, offset=8 + length + begin)
            return data.view(WHOLE.get(dtype) or FLOAT8.get(dtype, dtype)).reshape(shape)

        return Entry(shape, dtype, read)

    return {name: entry(name, *kind) for name, kind in kinds.items()}


def _torch_entries(file: Path) -> tuple[dict[str, Entry], str]:
    stored = load_torch(file)
    import torch

    def entry(tensor: Any) -> Entry:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Entry(tuple(tensor.shape), dtype, lambda: to_numpy(tensor))

    leaves = {path: leaf for path, leaf in _leaves(stored) if torch.is_tensor(leaf)}
    if not leaves:
        raise ConversionError(
            f"{file} holds no state dict; expected a dict of tensors by name, bare or in other"
            " dicts, as torch.save(model.state_dict(), ...) writes it"
        )
    keys = zip(*(path[:-1] for path in leaves), strict=False)
    common = [key for key, *_ in itertools.takewhile(lambda each: len(set(each)) == 1, keys)]
    entries = {".".join(path[len(common) :]): entry(leaf) for path, leaf in leaves.items()}
    return entries, f"its dict {'.'.join(common)!r}" if common else ""


def _leaves(stored: Any, depth: int = MAX_DEPTH) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values of nested dicts, each with the keys that lead to it."""
    if not isinstance(stored, dict) or not depth:
        return
    for key, value in stored.items():
        inner = [((str(key), *path), leaf) for path, leaf in _leaves(value, depth - 1)]
        yield from inner or [((str(key),), value)]


def to_numpy(tensor: Any) -> np.ndarray:
    """Convert a torch tensor to numpy; bfloat16 and float8 become the dtypes of ml_dtypes, with the
    same bits."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if (name := str(tensor.dtype).removeprefix("torch.")) in FLOAT8:
        return tensor.view(torch.uint8).numpy().view(FLOAT8[name])
    return tensor.numpy()


def _check_archive(file: Path) -> None:
    """Raise BadZipFile if parts of an archive contradict each other.

    torch trusts the offset in a record's own header and checks no checksums: one flipped bit would
    shift all numbers of a tensor. Records must follow one another without gap or overlap, and all
    records but the weights (whose sizes the pickle states) must match their checksums.
    """
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        follows = [record.header_offset for record in records[1:]] + [archive.start_dir]
        for record, following in zip(records, follows, strict=True):
            if record.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{record.filename} is compressed")
            raw.seek(record.header_offset)
            lengths = ZIP_HEADER.unpack(raw.read(ZIP_HEADER.size))
            end = record.header_offset + ZIP_HEADER.size + sum(lengths) + record.file_size
            gaps: tuple[int, ...] = (16, 24)
            note = ZIP_DESCRIPTOR + struct.pack("<I", record.CRC)
            if not record.flag_bits & DESCRIBED:
                gaps, note = (0,), b""
            raw.seek(end)
            if following - end not in gaps or raw.read(len(note)) != note:
                raise zipfile.BadZipFile(f"{record.filename} is not where the archive says")
            # Opening compares the two names of a record.
            archive.open(record).close()
            if "/data/" not in record.filename:
                archive.read(record)
