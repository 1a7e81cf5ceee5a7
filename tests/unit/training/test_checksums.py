"""Checksums of checkpoints: every flipped bit is found, however arrays are divided."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from framepack_jax.training.checksums import checksums, differing

DTYPES = ("float32", "bfloat16", "int8", "int32", "bool")


def array(dtype: str) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 2, (3, 5, 7))
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_sum_of_bits_by_position(dtype) -> None:
    x = array(dtype)
    bits = x.view(f"u{x.dtype.itemsize}").ravel().astype(np.uint64)
    expected = int((bits * (2 * np.arange(x.size, dtype=np.uint64) + 1)).sum() % 2**32)
    assert checksums({"a": {"b": jnp.asarray(x)}}) == {"a/b": expected}


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "bool"])
def test_any_flipped_bit_is_found(dtype) -> None:
    x = array(dtype)
    before = checksums([jnp.asarray(x)])
    rng = np.random.default_rng(1)
    for _ in range(20):
        changed = x.copy()
        flat = changed.view(np.uint8).reshape(-1)
        flat[rng.integers(flat.size)] ^= np.uint8(1 << rng.integers(8))
        assert differing([jnp.asarray(changed)], before) == ["0"]
    assert differing([jnp.asarray(x)], before) == []


def test_exchanged_elements_are_found() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert differing([jnp.asarray(x[::-1])], checksums([jnp.asarray(x)])) == ["0"]


def test_arrays_without_a_checksum_are_not_compared() -> None:
    assert differing({"a": jnp.zeros(3), "b": jnp.ones(3)}, {"a": 0}) == []


def test_it_does_not_depend_on_the_division() -> None:
    """Over all devices of this process, which may be one."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    divided = jax.NamedSharding(mesh, jax.P("x"))
    x = np.random.default_rng(2).standard_normal((8 * jax.device_count(), 3)).astype(np.float32)
    assert checksums([jax.device_put(x, divided)]) == checksums([jnp.asarray(x)])
