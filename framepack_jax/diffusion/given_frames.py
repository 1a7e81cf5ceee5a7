"""Latent frames of a section that are given, such as those of key frames, and stay unchanged.

A prediction that never changes keeps the state on the straight path from the noise to it. There the
network expects a frame that becomes this prediction.

Shapes: B batch, w latent window, H W latent rows and columns, C channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.diffusion.network import Array, Denoiser, Prediction


class GivenFrames(NamedTuple):
    """Latents (B, w, H, W, C) of a section, given where `mask` is True.

    `mask` is (B, w), or (w,) for all samples alike.
    """

    latents: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray


def checked(given: GivenFrames | None, shape: tuple[int, ...]) -> GivenFrames:
    """Return given frames with a mask (B, w), for noise of this shape; None gives no frame.

    Raises ValueError if the shapes do not fit.
    """
    if given is None:
        return GivenFrames(np.zeros(shape, np.float32), np.zeros(shape[:2], bool))
    latents, mask = given
    if np.shape(latents) != shape or np.shape(mask) not in (shape[1:2], shape[:2]):
        raise ValueError(
            f"given frames: latents {np.shape(latents)} and mask {np.shape(mask)} do not fit noise"
            f" {shape}; expected its shape, and its first axes {shape[1:2]} or {shape[:2]}"
        )
    mask = np.broadcast_to(np.asarray(mask, bool), shape[:2])
    return GivenFrames(np.asarray(latents, np.float32), mask)


def keep(denoiser: Denoiser, given: GivenFrames) -> Denoiser:
    """Predict the given latents where there are any."""

    def denoise(x: jax.Array, sigma: Array, memory: Any) -> Prediction:
        prediction = denoiser(x, sigma, memory)
        return prediction._replace(x0=_chosen(given, prediction.x0))

    return denoise


@jax.jit
def _chosen(given: GivenFrames, x0: jax.Array) -> jax.Array:
    return jnp.where(given.mask[:, :, None, None, None], given.latents, x0)
