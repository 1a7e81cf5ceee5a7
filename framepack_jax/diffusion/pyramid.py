"""Denoising in stages of growing resolution, as Helios does it (arXiv 2603.04379).

Stage 0 starts from noise of 1 / 2^(stages - 1) of the sides. Between two stages the latents are
doubled by repetition, and noise takes the correlation of the repeated cells away (pyramidal flow
matching, arXiv 2410.05954, section 3.2). Every stage has noise levels of its own, from 0.999 to 0.

Shapes: B batch, T latent frames, H W latent rows and columns, C channels.
"""

import math
from typing import NamedTuple

import numpy as np
from einops import rearrange, reduce, repeat

# Noise levels of training, from 0.999 down, of which a stage covers a part.
LEVELS = 1000


class Stage(NamedTuple):
    """A stage of a pyramid.

    The network is told times from `first` to `last` while the stage's own noise levels fall. At its
    start, the latents of the stage before are multiplied by `keep`, and `renew` times new noise is
    added.
    """

    first: float
    last: float
    keep: float
    renew: float


def stages(count: int, gamma: float) -> list[Stage]:
    """Return the stages of a pyramid; new noise has correlation -`gamma` in blocks of 2 x 2 cells.

    Each stage covers an equal part of the noise levels. Its times are a part of the whole that is
    as long as the way that its latents go.
    """
    level = 0.999 * (1 - np.arange(LEVELS) / LEVELS)
    ends = [int(part * LEVELS) for part in np.linspace(0, 1, count + 1)]
    sigmas = [*level[ends[:-1]], 0.0]
    keeps = [1.0]
    for sigma in sigmas[1:-1]:
        keeps.append(1 / (math.sqrt(1 + 1 / gamma) * sigma + 1 - sigma))
    starts = [
        sigma if i == 0 else 1 - keep * (1 - sigma)
        for i, (sigma, keep) in enumerate(zip(sigmas[:-1], keeps, strict=True))
    ]
    ways = np.array(starts) - np.array(sigmas[1:])
    shares = np.concatenate([[0], np.cumsum(ways)]) / ways.sum()
    found = []
    for i, keep in enumerate(keeps):
        first = level[int(shares[i] * LEVELS)]
        end = level[min(int(shares[i + 1] * LEVELS), LEVELS - 1)]
        # The last of LEVELS times that do not reach the end.
        last = first + (end - first) * (LEVELS - 1) / LEVELS
        renew = 0.0 if i == 0 else keep * sigmas[i] / math.sqrt(gamma)
        found.append(Stage(float(first), float(last), keep, renew))
    return found


def check_size(rows: int, columns: int, count: int, patch: int = 2) -> None:
    """Raise ValueError if latents (rows, columns) cannot be halved for `count` stages."""
    unit = patch * 2 ** (count - 1)
    if rows % unit or columns % unit:
        raise ValueError(
            f"latents of {rows} x {columns} cells: a pyramid of {count} stages needs multiples of"
            f" {unit}"
        )


def shrink(noise: np.ndarray, count: int) -> np.ndarray:
    """Return the start of stage 0 from noise (B, T, H, W, C) of full size: halved `count` - 1
    times. The sum of 4 cells over 2 has variance 1 again."""
    for _ in range(count - 1):
        noise = 2 * reduce(noise, "b t (h ph) (w pw) c -> b t h w c", "mean", ph=2, pw=2)
    return noise


def enlarge(latents: np.ndarray, noise: np.ndarray, stage: Stage) -> np.ndarray:
    """Return the start of a stage from the latents (B, T, H, W, C) of the stage before and block
    noise of twice the size."""
    doubled = repeat(latents, "b t h w c -> b t (h ph) (w pw) c", ph=2, pw=2)
    return np.float32(stage.keep) * doubled + np.float32(stage.renew) * noise


def block_noise(noise: np.ndarray, gamma: float) -> np.ndarray:
    """Return noise (B, T, H, W, C) of variance 1 with covariance -`gamma` in blocks of 2 x 2 cells,
    from independent noise of that shape.

    The covariance (1 + gamma) I - gamma 1 has the eigenvalue 1 - 3 gamma for the mean of a block,
    which is 0 for gamma = 1/3, and 1 + gamma for the rest.
    """
    blocks = rearrange(noise, "b t (h ph) (w pw) c -> b t h w c (ph pw)", ph=2, pw=2)
    mean = blocks.mean(axis=-1, keepdims=True)
    of_mean = math.sqrt(max(0.0, 1 - 3 * gamma))
    blocks = math.sqrt(1 + gamma) * (blocks - mean) + of_mean * mean
    return rearrange(blocks, "b t h w c (ph pw) -> b t (h ph) (w pw) c", ph=2, pw=2)
