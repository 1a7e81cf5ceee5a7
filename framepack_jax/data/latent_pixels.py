"""Draw pixels of latents evenly over the clips of a dataset."""

import numpy as np
from etils import epath

from framepack_jax.data import records
from framepack_jax.data.records import DatasetError, VideoSource
from framepack_jax.utils.progress import Bar


def draw_pixels(folder: epath.PathLike, most: int, seed: int = 0) -> np.ndarray:
    """Draw at most `most` pixels (N, C) float32 of normalised latents, as many of each clip.

    If there are more clips than pixels, one pixel each of `most` clips. Raises DatasetError if the
    dataset has no latents, or if a record is damaged.
    """
    index = records.read_index(folder)
    if index.mode != "latents":
        raise DatasetError(
            f"dataset {folder} holds frames, and a codebook is fitted to latents; prepare it with"
            " --mode latents"
        )
    source, rng = VideoSource(folder, index.shards), np.random.default_rng(seed)
    clips = np.sort(rng.permutation(len(source))[:most])
    each = most // len(clips)
    drawn = []
    for number in Bar(clips, desc="clips"):
        latents = source[int(number)].latents
        assert latents is not None
        pixels = latents.reshape(-1, latents.shape[-1])
        chosen = rng.permutation(len(pixels))[:each]
        drawn.append(pixels[np.sort(chosen)].astype(np.float32))
    return np.concatenate(drawn)
