"""Frames that the VAE reads."""

import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import conditioning


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_levels_are_mapped_to_the_same_bits_as_by_division(dtype) -> None:
    frames = np.arange(2 * 3 * 256, dtype=np.uint64).astype(np.uint8).reshape(2, 3, 16, 16, 1)
    found = np.asarray(jnp.asarray(conditioning.from_uint8(frames, dtype)))
    expected = np.asarray(jnp.asarray(frames / 127.5 - 1, dtype))
    assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
    assert found.min() == -1 and found.max() == 1
