"""What video autoencoders share."""

import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.models import autoencoder


def test_latents_are_normalised_by_channel() -> None:
    mean, std = (1.0, -2.0), np.asarray([0.5, 4.0])
    z = jnp.asarray([[3.0, 2.0], [1.0, -2.0]])[None, None, None]
    latents = autoencoder.normalise(z, mean, std)
    assert latents[0, 0, 0].tolist() == [[4, 1], [0, 0]]
    assert autoencoder.denormalise(latents, mean, std).tolist() == z.tolist()


def test_posterior() -> None:
    moments = jnp.asarray([[3.0, 0.0, 100.0, -100.0]])[None, None, None]
    mean, logvar = autoencoder.split_moments(moments)
    assert mean.ravel().tolist() == [3, 0] and logvar.ravel().tolist() == [20, -30]
    sample = autoencoder.sample_posterior(mean, jnp.full_like(mean, 2 * np.log(5)), 2.0)
    np.testing.assert_allclose(sample.ravel(), [13, 10], rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (1, 1, 8, 8, 4), (1, 0, 8, 8, 3)])
def test_other_shapes_are_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"clip must be \(B, T, H, W, 3\) with at least one frame"):
        autoencoder.check_clip("clip", jnp.zeros(shape), 3, 8)
