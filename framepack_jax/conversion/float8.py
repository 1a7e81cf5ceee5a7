"""Weights that ComfyUI's and Tencent's files keep in 8-bit floats, read as bfloat16.

A plain 8-bit weight is its own value, and bfloat16 holds it exactly. A scaled one is the stored
number times a scale, which lies beside `X.weight` as `X.scale_weight` (ComfyUI, files with the
marker `scaled_fp8`) or `X.weight_scale` (ComfyUI's later `comfy_quant`), or in Tencent's
`..._map.pt` beside `....pt`; the product is rounded to bfloat16 once. What such files say of the
activations is left out.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from framepack_jax.conversion.file_formats import (
    FLOAT8,
    TORCH_SUFFIXES,
    ConversionError,
    Entry,
    load_torch,
    to_numpy,
)
from framepack_jax.utils.messages import shorten

READ_AS = "bfloat16"
WIDE = ("float32", "bfloat16", "float16", "float64")
WEIGHT, MARKER = ".weight", "scaled_fp8"
SCALES = (".scale_weight", ".weight_scale")
NOTES = (".scale_input", ".input_scale", ".comfy_quant")

Entries = dict[str, Entry]


def unpack(path: Path, files: list[Path], entries: Entries) -> tuple[Entries, str]:
    """The tensors of a checkpoint with 8-bit weights as bfloat16 and their scales taken away, and
    a few words on what was done ("" where there are none).

    Raises ConversionError where a scale is absent or of another shape than one number, or one a
    row, and where ComfyUI names another quantization. In a file without marker, map and notes
    8-bit weights without a scale are plain ones.
    """
    marked = tuple(name.removesuffix(MARKER) for name in entries if _is_marker(name))
    packed = {n for n, entry in entries.items() if entry.dtype in FLOAT8 and not _is_marker(n)}
    if not packed and not marked:
        return entries, ""
    noted = _noted_weights(path, entries)
    mapped = _mapped_scales(files, packed)
    scales = mapped | {
        name.removesuffix(suffix) + WEIGHT: entry
        for name, entry in entries.items()
        for suffix in SCALES
        if name.endswith(suffix)
    }
    # A file with several networks has a marker in each that is scaled.
    in_marked = {name for name in packed if marked and name.startswith(marked)}
    scalable = packed if mapped else in_marked | noted
    unscaled = sorted(name for name in scalable if name.endswith(WEIGHT) and name not in scales)
    if unscaled:
        raise ConversionError(
            f"{path} holds scaled weights, but {len(unscaled)} have no scale: {shorten(unscaled)};"
            " download it again"
        )
    _check_scales(path, entries, scales)
    unpacked = {
        name: _unpacked(entry, scales.get(name)) if name in packed or name in scales else entry
        for name, entry in entries.items()
        if not name.endswith((*SCALES, *NOTES)) and not _is_marker(name)
    }
    kinds = Counter(entries[name].dtype for name in packed)
    said = ", ".join(f"{count} tensors {kind}" for kind, count in kinds.items())
    scaled = sum(name in packed for name in scales)
    return unpacked, f"{said}, {scaled} of them scaled, read as {READ_AS}" if said else ""


def _unpacked(entry: Entry, scale: Entry | None) -> Entry:
    """An entry that reads value times scale. What is no 8-bit float keeps its dtype."""
    if entry.dtype in WIDE:
        return entry._replace(read=_scaled(entry, scale, np.dtype(entry.dtype)))
    if entry.dtype not in FLOAT8:
        return entry
    read = _scaled(entry, scale, np.dtype(ml_dtypes.bfloat16))
    return Entry(entry.shape, READ_AS, read, stored=entry.dtype)


def _scaled(entry: Entry, scale: Entry | None, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        stored = entry.read()
        factor = np.float32(1) if scale is None else scale.read().astype(np.float32)
        if entry.dtype in FLOAT8 and factor.size == 1:
            # There are 256 values: looked up, which is ten times as fast as computed.
            values = np.arange(256, dtype=np.uint8).view(FLOAT8[entry.dtype]).astype(np.float32)
            return (values * factor.reshape(())).astype(dtype)[stored.view(np.uint8)]
        rows = factor.reshape((-1,) + (1,) * (stored.ndim - 1)) if factor.size > 1 else factor
        return (stored.astype(np.float32) * rows).astype(dtype)

    return read


def _check_scales(path: Path, entries: Entries, scales: Entries) -> None:
    wrong = [
        f"{name} is {entries[name].shape}, its scale {scale.shape}"
        for name, scale in scales.items()
        if name in entries and scale.shape not in _scale_shapes(entries[name].shape)
    ]
    if wrong:
        raise ConversionError(
            f"{path} has {len(wrong)} scales that are neither one number nor one a row:"
            f" {shorten(wrong)}; take a file with one scale a weight"
        )


def _scale_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return (), (1,), shape[:1], (*shape[:1], *(1 for _ in shape[1:])), tuple(1 for _ in shape)


def _noted_weights(path: Path, entries: Entries) -> set[str]:
    """The weights at which ComfyUI notes an 8-bit float times a scale. Raises ConversionError where
    a note names anything else."""
    noted = set()
    for name, entry in entries.items():
        if not name.endswith(NOTES[-1]):
            continue
        try:
            note = json.loads(entry.read().tobytes())
            kind = "convrot" if note.get("convrot") else str(note.get("format"))
        except (ValueError, AttributeError) as error:
            raise ConversionError(f"{path}: {name} is no note of ComfyUI ({error})") from error
        if kind not in FLOAT8:
            raise ConversionError(
                f"{path}: {name} says {kind!r}; supported are {', '.join(FLOAT8)}, or take a file"
                " in bfloat16"
            )
        noted.add(name.removesuffix(NOTES[-1]) + WEIGHT)
    return noted & entries.keys()


def _mapped_scales(files: list[Path], packed: Iterable[str]) -> Entries:
    """Tencent's scales, {module: number}, for the weights of a `.pt` file."""
    if not packed or len(files) != 1 or files[0].suffix not in TORCH_SUFFIXES:
        return {}
    beside = files[0].with_name(f"{files[0].stem}_map{files[0].suffix}")
    if not beside.exists():
        raise ConversionError(
            f"{files[0]} holds 8-bit weights, whose scales are in {beside.name}; put that file"
            " beside it"
        )
    numbers = load_torch(beside)
    try:
        arrays = {name: to_numpy(number).astype(np.float32) for name, number in numbers.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConversionError(
            f"{beside} holds no scales by name ({error}); download it again"
        ) from error
    names = {name: _end_among(arrays, name.removesuffix(WEIGHT)) for name in packed}
    return {
        name: Entry(arrays[module].shape, "float32", functools.partial(arrays.__getitem__, module))
        for name, module in names.items()
        if module is not None
    }


def _end_among(names: Collection[str], name: str) -> str | None:
    """Return the longest end of a dotted name that is one of `names`."""
    parts = name.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in names), None)


def _is_marker(name: str) -> bool:
    return name.split(".")[-1] == MARKER
