"""UMT5 without its reference: padding, range of float16, refused sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.models.encoders import umt5
from framepack_jax.models.quantization import cast_params

CFG = umt5.Umt5Config(
    vocab_size=30, width=8, layers=2, heads=2, head_dim=4, mlp_width=12, buckets=8, max_distance=20
)
states = jax.jit(umt5.hidden_states, static_argnums=0)


def test_padding_cannot_be_seen() -> None:
    params = umt5.init(CFG, jax.random.key(0))
    ids = np.random.default_rng(1).integers(0, CFG.vocab_size, (2, 9))
    valid = np.arange(9)[None, :] < np.asarray([5, 9])[:, None]
    both = states(CFG, params, ids, valid)
    other = np.where(valid, ids, 0)
    np.testing.assert_allclose(states(CFG, params, other, valid)[valid], both[valid], atol=1e-6)
    alone = states(CFG, params, ids[:1, :5], valid[:1, :5])
    np.testing.assert_allclose(both[:1, :5], alone, atol=1e-5)


def test_a_stream_beyond_float16_stays_finite() -> None:
    """The released weights make one; every layer adds to it, and the final norm takes it back."""
    params = umt5.init(CFG, jax.random.key(0))
    params["layers"]["down"]["kernel"] *= 1e5
    ids, valid = np.arange(6)[None], np.ones((1, 6), bool)
    half = cast_params(params, jnp.float16)
    made, exact = states(CFG, half, ids, valid), states(CFG, params, ids, valid)
    assert made.dtype == jnp.float16
    np.testing.assert_allclose(made.astype(jnp.float32), exact, atol=0.02)


@pytest.mark.parametrize(("buckets", "max_distance"), [(6, 20), (2, 20), (8, 2)])
def test_buckets_that_have_no_distances_are_refused(buckets: int, max_distance: int) -> None:
    with pytest.raises(ValueError, match=f"{buckets} buckets and max_distance {max_distance}"):
        dataclasses.replace(CFG, buckets=buckets, max_distance=max_distance)
