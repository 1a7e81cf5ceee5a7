"""Validation of a VAE on held-out videos, and the statistics of its latents.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from framepack_jax import video
from framepack_jax.data.pixel_batch import signed
from framepack_jax.data.vae_clips import ListedVideo, read_clip
from framepack_jax.models.network_spec import LatentStatistics, VaeSpec
from framepack_jax.models.params import Params
from framepack_jax.models.tiling import Tiling
from framepack_jax.training.metrics import validation_folder

# Videos on the contact sheet.
SHOWN = 4


def psnr(errors: Any) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of mean squared errors of values in [-1, 1]."""
    return 10 * np.log10(4 / np.maximum(np.asarray(errors), 1e-12))


@functools.partial(jax.jit, static_argnums=(0, 1))
def reconstruct(spec: VaeSpec, cfg: Any, params: Params, clips: jax.Array) -> jax.Array:
    """Decode the modes of the latents of clips (B, T, H, W, C) in [-1, 1]."""
    mean, _ = spec.encode(cfg, params, clips, Tiling(frames=None))
    return jnp.clip(spec.decode(cfg, params, mean, Tiling(frames=None)), -1, 1)


def validate(
    spec: VaeSpec,
    network: Any,
    params: Params,
    held: Sequence[ListedVideo],
    frames: int,
    folder: epath.Path,
    step: int,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the PSNR of the middle clips of held-out videos and of their first frames alone: mean
    over videos, and the lowest. Write a contact sheet of the first few, originals above. Calls
    `check`, which may raise, before each clip."""
    clip_errors: list[jax.Array] = []
    still_errors: list[jax.Array] = []
    shown: list[np.ndarray] = []
    for clip in middle_clips(held, frames):
        check()
        original = signed(jnp.asarray(clip))
        decoded = reconstruct(spec, network, params, original)
        clip_errors.append(jnp.mean(jnp.square(decoded - original)))
        still = reconstruct(spec, network, params, original[:, :1])
        still_errors.append(jnp.mean(jnp.square(still - original[:, :1])))
        if len(shown) < SHOWN:
            last = np.asarray(jnp.round((decoded[0, -1] + 1) * 127.5)).astype(np.uint8)
            shown.append(np.concatenate([clip[0, -1], last], axis=0))
    target = validation_folder(folder, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    labels = [each.name for each in held[:SHOWN]]
    sheet = video.labelled_sheet(shown, labels, columns=SHOWN)
    video.save_png(target.parent / f"{target.name}.png", sheet)
    clips, stills = psnr(clip_errors), psnr(still_errors)
    return {
        "held_out/psnr": float(clips.mean()), "held_out/least_psnr": float(clips.min()),
        "held_out/still_psnr": float(stills.mean()),
    }  # fmt: skip


def middle_clips(videos: Sequence[ListedVideo], frames: int) -> Iterator[np.ndarray]:
    """Yield the middle `frames` frames of each video, (1, T, H, W, 3) uint8, cut to multiples of 8
    pixels."""
    for each in videos:
        clip = read_clip(each, (each.frames - frames) // 2, frames)
        height, width = (side // 8 * 8 for side in clip.shape[1:3])
        yield clip[None, :, :height, :width]


def latent_statistics(
    spec: VaeSpec, network: Any, params: Params, videos: Sequence[ListedVideo], frames: int
) -> LatentStatistics:
    """Return (mean, standard deviation) of each latent channel over the middle clips of videos.

    Raises ValueError if there are no videos."""
    encode = jax.jit(lambda p, x: spec.encode(network, p, x, Tiling(frames=None))[0])
    total = squares = np.zeros(network.latent_channels)
    count = 0
    for clip in middle_clips(videos, frames):
        mean = np.asarray(encode(params, signed(jnp.asarray(clip))))
        mean = mean.reshape(-1, mean.shape[-1]).astype(np.float64)
        total, squares = total + mean.sum(0), squares + np.square(mean).sum(0)
        count += len(mean)
    if not count:
        raise ValueError("there are no videos to take the statistics of latents from")
    mean = total / count
    std = np.sqrt(squares / count - np.square(mean))
    return tuple(mean.tolist()), tuple(std.tolist())
