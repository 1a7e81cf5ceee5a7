"""Casts, quantization and memory order of arrays on the host."""

import functools

import jax
import ml_dtypes
import numpy as np

from framepack_jax.conversion.weight_files import ConversionError, count_not_finite

# Bytes from which it pays to have XLA transpose.
MIN_TRANSPOSED = 1 << 20


def cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the array in another type, each number rounded once. Raises ConversionError if a
    number becomes infinite."""
    if str(array.dtype) == dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if count := count_not_finite(narrow):
        raise ConversionError(
            f"{name} holds {count} numbers of {array.size} that {dtype} cannot hold, up to"
            f" {np.abs(array).max():.3g}; give another --dtype"
        )
    return narrow


def quantize(path: str, kernel: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(in, ...out) -> the same shape in one of `QUANTIZED`, and a float32 scale (...out) for each
    output channel; `cast_params` multiplies again.

    "int8": a channel's largest magnitude becomes 127, so that no number moves by more than half a
    scale, 1/254 of that. "float8_e4m3fn": scales are powers of two, as small as lets the largest
    fit, so that a kernel that had this type before stays as it was; another number moves by 1/16
    of itself at most, or 2^-10 of its scale. Raises ConversionError if a number is not finite.
    """
    kernel = contiguous(kernel).astype(np.float32)
    peak = np.maximum(kernel.max(axis=0), -kernel.min(axis=0))
    if not np.isfinite(peak).all():
        raise ConversionError(f"{path} has numbers that are not finite; {dtype} cannot hold them")
    # Devices take smaller scales for zero.
    least = np.finfo(np.float32).tiny
    if dtype == "int8":
        scale = np.maximum(peak / np.float32(127), least)
        kernel /= scale[None]
        return np.rint(kernel, out=kernel).astype(np.int8), scale
    part, exponent = np.frexp(peak / np.float32(ml_dtypes.finfo(dtype).max))
    scale = np.maximum(np.ldexp(np.float32(1), exponent - (part == 0.5)), least)
    kernel /= scale[None]
    return kernel.astype(dtype), scale


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array in row-major order.

    numpy copies a transposed matrix number by number. XLA's copy to the host device works in
    blocks, on several cores.
    """
    small = array.ndim < 2 or array.nbytes < MIN_TRANSPOSED
    if small or array.itemsize > 4 or array.flags.c_contiguous or not (host := _host()):
        return np.ascontiguousarray(array)
    # As words without a type of their own, so that none is unknown there.
    words = jax.device_put(array.view(f"u{array.itemsize}"), host)
    return np.asarray(words).view(array.dtype)


@functools.cache
def _host() -> jax.Device | None:
    """Return the host as a JAX device, or None if JAX_PLATFORMS excludes it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
