"""What all video autoencoders share: their posterior, normalised latents, checks, initialisation.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from framepack_jax.models.params import Params

# Mesh axes that divide the rows of a picture.
ROWS = ("context", "fsdp", "tensor", "data")
LOGVAR_RANGE = (-30.0, 20.0)
Statistics = Sequence[float] | np.ndarray
Latents = TypeVar("Latents", jax.Array, np.ndarray)


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean, which is the mode, and log variance of the posterior from an encoder's result
    (B, T, H, W, 2 C)."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def sample_posterior(mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
    """Return the sample of a posterior that standard normal `noise` gives."""
    return mean + jnp.exp(0.5 * logvar) * noise


def normalise(z: Latents, mean: Statistics, std: Statistics) -> Latents:
    """Return latents (B, T, H, W, C) as a transformer reads them, with a mean and a standard
    deviation for each channel."""
    return (z - _by_channel(mean)) / _by_channel(std)


def denormalise(latents: Latents, mean: Statistics, std: Statistics) -> Latents:
    """Return latents as a decoder reads them; invert `normalise`."""
    return latents * _by_channel(std) + _by_channel(mean)


def _by_channel(values: Statistics) -> np.ndarray:
    return np.asarray(values, np.float32)[None, None, None, None, :]


def check_clip(name: str, x: jax.Array, channels: int, multiple: int) -> None:
    """Raise ValueError unless x is (B, T, H, W, channels) with at least one frame, and H and W are
    multiples of `multiple`."""
    if x.ndim != 5 or x.shape[-1] != channels or not x.shape[1]:
        raise ValueError(
            f"VAE: {name} must be (B, T, H, W, {channels}) with at least one frame, got {x.shape}"
        )
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(
            f"VAE: height and width of {name} must be multiples of {multiple}, got"
            f" {x.shape[2]}x{x.shape[3]}; resize or crop it"
        )


def draw_params(shapes: Params, key: jax.Array) -> Params:
    """Draw parameters of these shapes: kernels scaled by their inputs, scales 1, biases 0."""
    leaves = flatten_dict(shapes)
    # One draw for all kernels: compiling a generator for each of their shapes takes a minute.
    sizes = [leaf.size for path, leaf in leaves.items() if path[-1] == "kernel"]
    noise = iter(jnp.split(jax.random.normal(key, sum(sizes)), np.cumsum(sizes)[:-1]))
    for path, leaf in leaves.items():
        if path[-1] == "kernel":
            inputs = leaf.size // leaf.shape[-1]
            leaves[path] = next(noise).reshape(leaf.shape) * inputs**-0.5
        else:
            leaves[path] = jnp.full(leaf.shape, path[-1] == "scale", leaf.dtype)
    return unflatten_dict(leaves)
