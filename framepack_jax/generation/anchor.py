"""Given latents of a bundle whose anchor is not a frame of the video (Helios, arXiv 2603.04379).

An image gives the anchor, position 0, and one frame of history: the last latent of a still of it. A
source video gives the anchor by its first frame, and history by its last sections. Latents are
samples of the VAE's posterior. Each frame of them is noised to a level of its own.

Shapes: F latent frames, H W latent rows and columns, C latent channels.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.diffusion import flow
from framepack_jax.generation.noise import key_of
from framepack_jax.generation.request import Request
from framepack_jax.models.autoencoder import normalise, sample_posterior

if TYPE_CHECKING:
    from framepack_jax.generation.pipeline import FramePack

# Number that is folded into the key of a seed; sections have smaller ones.
GIVEN = 2**31 - 1


@dataclasses.dataclass
class Draws:
    """Random numbers for the given latents of one video, in the order of their use."""

    seed: int
    count: int = 0

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(jax.random.normal(self._key(), shape))

    def uniform(self, count: int) -> np.ndarray:
        """Return numbers in [0, 1)."""
        return np.asarray(jax.random.uniform(self._key(), (count,)))

    def _key(self) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key_of(self.seed), GIVEN), self.count)
        self.count += 1
        return key


def given_latents(
    pipe: "FramePack", request: Request, draws: Draws | None = None
) -> dict[int, np.ndarray]:
    """Return the latents (H, W, C) of a fitted request by position; none for text alone.

    `draws` are by default those of the request's seed.
    """
    draws = draws or Draws(request.seed)
    source, size = request.source_video, pipe.geometry.section_frames
    if source is not None:
        clips = [source.last[i : i + size] for i in range(0, len(source.last), size)]
        anchor, *history = [_sample(pipe, clip, draws) for clip in (source.first[None], *clips)]
    elif request.image is not None:
        anchor = _sample(pipe, request.image[None], draws)
        history = [_sample(pipe, np.stack([request.image] * size), draws)[-1:]]
    else:
        return {}
    parts = [_noised(pipe, part, draws) for part in (anchor, *history)]
    return dict(enumerate(np.concatenate(parts)))


def _sample(pipe: "FramePack", frames: np.ndarray, draws: Draws) -> np.ndarray:
    """Encode a clip (P, height, width, 3) uint8 to normalised latents (F, H, W, C)."""
    spec, cfg, params = pipe.vae
    video = jnp.asarray(frames[None] / 127.5 - 1, jax.tree.leaves(params)[0].dtype)
    mean, logvar = pipe.run(spec.encode, cfg, params, video, pipe.tiling)
    mean, logvar = (jnp.asarray(x, jnp.float32) for x in (mean, logvar))
    z = sample_posterior(mean, logvar, jnp.asarray(draws.normal(mean.shape)))
    return np.asarray(normalise(z, pipe.latent_mean, pipe.latent_std))[0]


def _noised(pipe: "FramePack", latents: np.ndarray, draws: Draws) -> np.ndarray:
    """Noise latents (F, H, W, C), each frame to a level within the bounds of the bundle."""
    if pipe.sampling.given_noise is None:
        return latents
    low, high = pipe.sampling.given_noise
    sigma = low + draws.uniform(len(latents)) * (high - low)
    noise = draws.normal((1, *latents.shape))[0]
    return np.asarray(
        flow.interpolate(jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(sigma))
    )
