"""Checkpoints as they come: safetensors, folders of diffusers and transformers, PyTorch's `.pt`.

A `Checkpoint` lists names, shapes and dtypes without reading weights, and reads one tensor at a
time. Everything becomes numpy; bfloat16 is `ml_dtypes.bfloat16` with the bits that are stored.
"""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Importing it teaches numpy, and so safetensors, the name "bfloat16".
import ml_dtypes
import numpy as np
import safetensors

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# Keys under which training code wraps a state dict.
WRAPPERS = ("module", "state_dict")
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class ConversionError(ValueError):
    """A checkpoint that cannot be read or does not fit, with what to do about it."""


class Entry(NamedTuple):
    """One stored tensor: its shape, the name of its dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Checkpoint:
    """The named tensors of a file or folder. Open one with `open_checkpoint`."""

    def __init__(self, path: Path, files: list[Path], entries: dict[str, Entry]) -> None:
        self.path = path
        self.files = files
        self._entries = entries

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Name of the stored dtype, such as "bfloat16"."""
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor as it is stored. Raises ConversionError where the file is damaged."""
        try:
            return self._entries[name].read()
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise ConversionError(f"{self.path}: cannot read {name} ({error})") from error

    def config(self) -> dict[str, Any] | None:
        """`config.json` of the folder, or beside the file, or None."""
        file = self.folder / "config.json"
        return read_json(file) if file.exists() else None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def source(self) -> dict[str, Any]:
        """What a bundle notes about where weights came from."""
        sizes = {file.name: file.stat().st_size for file in self.files}
        return {"name": self.path.name, "files": sizes}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, a PyTorch file, or a folder with one model in either form.

    Raises ConversionError that names the file, what was expected and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ConversionError(f"{path} does not exist; expected a checkpoint file or its folder")
    files = _files_of(path) if path.is_dir() else [path]
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= _entries_of(file)
    if path.is_dir():
        _check_index(path, entries)
    if not entries:
        raise ConversionError(f"{path} holds no tensors; expected the weights of one model")
    return Checkpoint(path, files, entries)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError where the file holds anything else."""
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} is no JSON file ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{file} holds a JSON {type(fields).__name__}, expected an object")
    return fields


def _files_of(folder: Path) -> list[Path]:
    """The weight files of a folder: the shards of its index, else its only file."""
    if index := _index_of(folder):
        shards = sorted({folder / name for name in _weight_map(index).values()})
        if missing := [shard.name for shard in shards if not shard.exists()]:
            raise ConversionError(
                f"{index} names {len(missing)} files that are not in {folder}:"
                f" {', '.join(missing[:3])}; download the missing shards"
            )
        return shards
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        files = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if len(files) == 1:
            return files
        if files:
            raise ConversionError(
                f"{folder} has several checkpoints and no index:"
                f" {', '.join(file.name for file in files[:4])}; give the path of one file"
            )
    raise ConversionError(
        f"{folder} has no checkpoint; expected *.safetensors, with *.safetensors.index.json where"
        f" it is sharded, or one of {', '.join('*' + suffix for suffix in TORCH_SUFFIXES)}"
    )


def _index_of(folder: Path) -> Path | None:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ConversionError(
            f"{folder} has several indices: {', '.join(file.name for file in indices)}; keep one"
        )
    return indices[0] if indices else None


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConversionError(f"{index} has no weight_map; download it again")
    return names


def _check_index(folder: Path, entries: dict[str, Entry]) -> None:
    """Raise where the index promises tensors that its shards do not hold."""
    index = _index_of(folder)
    if index is None:
        return
    absent = sorted(name for name in _weight_map(index) if name not in entries)
    if absent:
        raise ConversionError(
            f"{index} names {len(absent)} tensors that its shards do not hold:"
            f" {', '.join(absent[:3])}; download the shards again"
        )


def _entries_of(file: Path) -> dict[str, Entry]:
    if file.suffix == ".safetensors":
        return _safetensors_entries(file)
    if file.suffix in TORCH_SUFFIXES:
        return _torch_entries(file)
    raise ConversionError(
        f"{file} is no checkpoint; expected .safetensors or {', '.join(TORCH_SUFFIXES)}"
    )


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    try:
        opened = safetensors.safe_open(file, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise ConversionError(
            f"{file} is no complete safetensors file ({error}); download it again"
        ) from error
    entries = {}
    for name in opened.keys():  # noqa: SIM118 (not a mapping)
        view = opened.get_slice(name)
        stored = view.get_dtype()
        dtype = SAFETENSORS_DTYPES.get(stored, stored)
        # The default binds this name, and keeps the mapped file open.
        entries[name] = Entry(
            tuple(view.get_shape()), dtype, lambda name=name: opened.get_tensor(name)
        )
    return entries


def _torch_entries(file: Path) -> dict[str, Entry]:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{file} needs PyTorch to be read: pip install 'framepack-jax[torch]'"
        ) from error
    try:
        stored = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{file} is no complete PyTorch checkpoint of plain tensors ({first_line});"
            " download it again"
        ) from error
    for key in WRAPPERS:
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not all(
        isinstance(v, torch.Tensor) for v in stored.values()
    ):
        raise ConversionError(
            f"{file} holds no state dict; expected named tensors, bare or under"
            f" {' or '.join(map(repr, WRAPPERS))}"
        )

    def entry(tensor: Any) -> Entry:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Entry(tuple(tensor.shape), dtype, lambda: _to_numpy(tensor))

    return {name: entry(tensor) for name, tensor in stored.items()}


def _to_numpy(tensor: Any) -> np.ndarray:
    """numpy has no bfloat16 of its own: the same bits under ml_dtypes' name."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
