"""Read the 8-bit float weights of ComfyUI's and Tencent's files as bfloat16.

bfloat16 holds plain 8-bit weights exactly. A scaled weight is the stored number times a scale. The
scale of `X.weight` is stored as `X.scale_weight` (ComfyUI, files with the marker `scaled_fp8`), as
`X.weight_scale` (ComfyUI's later `comfy_quant`), or in Tencent's `..._map.pt` beside `....pt`. The
product is rounded to bfloat16 once. Scales of activations are ignored.
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
    """Return the tensors of a checkpoint with 8-bit weights as bfloat16 and without their scales,
    and a note on the weights that were read so ("" if there are none).

    If a file has no marker, map or notes, 8-bit weights without a scale are plain weights. Raises
    ConversionError if a scale is missing, if a scale is neither one number nor one number per row,
    or if ComfyUI's notes name another quantization.
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
    # In a file with several networks, each scaled network has its own marker.
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
    """Return an entry that reads value times scale; only 8-bit floats change their dtype."""
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
            # A lookup of the 256 possible values is ten times as fast as the product.
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
    """Return the weights that ComfyUI's notes call scaled 8-bit floats.

    Raises ConversionError if a note names another quantization.
    """
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
    """Return Tencent's scales of a `.pt` file by the name of the weight."""
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
    """Return the longest suffix of a dotted name that is one of `names`."""
    parts = name.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in names), None)


def _is_marker(name: str) -> bool:
    return name.split(".")[-1] == MARKER
