"""Checksums of the arrays of a checkpoint.

A sum over all elements of (bits of the element) x (2 position + 1), modulo 2^32. It does not depend
on how the array is divided over devices, and every flipped bit changes it: an odd number times a
power of two below 2^32 is not 0.
"""

from typing import Any

import jax
import jax.numpy as jnp

from framepack_jax.parallel import multihost

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, int]:
    """Return the checksum of each array by its path, as "params/double/img_qkv/kernel".

    All processes call this together for arrays that are divided over their devices.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sums = jax.device_get(multihost.fetch(_sums([leaf for _, leaf in leaves])))
    return dict(zip(names, map(int, sums), strict=True))


def differing(tree: Any, expected: dict[str, int]) -> list[str]:
    """Return the paths of arrays whose checksum is not the expected one; those without are not
    compared."""
    found = checksums(tree)
    return [name for name in found if name in expected and found[name] != expected[name]]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(leaf) for leaf in leaves]


@jax.jit  # parameters, moments and averages have the same shapes, which are traced once
def _sum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position = position + along * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
