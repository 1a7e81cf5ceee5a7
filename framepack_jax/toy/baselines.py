"""Make the videos of an evaluation: samples of the models under test, and reference videos.

Shapes: B videos side by side, P frames, H W rows and columns. Frames are (P, H, W, 3) uint8.
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from framepack_jax import packing
from framepack_jax.generation.crossfade import to_uint8
from framepack_jax.generation.layout import Layout, fit_images, make_layout
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.generation.request import Request
from framepack_jax.packing import Timeline

CLIP_LATENTS = 18
"""Latent frames that the VAE encodes at a time, in addition to the first one of a clip."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A video to sample: its first frame (H, W, 3) uint8, its caption and its seed."""

    image: np.ndarray
    caption: str
    seed: int


def layout_of(pipe: FramePack, ask: Prompt, sections: int) -> Layout:
    """Return the layout of `sections` sections after an image. Raises ValueError if none fits."""
    height, width = ask.image.shape[:2]
    request = Request(ask.caption, ask.image, seed=ask.seed)
    return make_layout(pipe.geometry, request, sections=sections, height=height, width=width)


def sections_for(pipe: FramePack, seconds: float, fps: float) -> int:
    """Return the number of sections whose duration is closest to `seconds`."""
    window = pipe.schedule.window
    return packing.sections_for(seconds, window, fps, pipe.geometry.time_compression)


def frames_for(pipe: FramePack, sections: int) -> int:
    """Return the number of frames of a video of `sections` sections."""
    return pipe.geometry.frames_of(0, 1 + sections * pipe.schedule.window)[1]


def sampled(
    pipe: FramePack,
    asks: Sequence[Prompt],
    sections: int,
    settings: Settings,
    blank: Collection[str] = (),
) -> np.ndarray:
    """Sample a batch of videos (B, P, H, W, 3) from images of equal size.

    Context under the kernels in `blank` is hidden from the model.
    """
    layout = layout_of(pipe, asks[0], sections)
    requests = [
        fit_images(pipe.geometry, Request(ask.caption, ask.image, seed=ask.seed), layout)
        for ask in asks
    ]
    inputs = pipe.encode(requests, layout, settings)
    plan = packing.drop_context(layout.plan, blank)
    made = pipe.sample(plan, inputs, settings, seeds=[ask.seed for ask in asks])
    clips = {
        start: np.asarray(to_uint8(frames, layout.height, layout.width))
        for _, start, frames, _ in pipe.decode(plan, made)
    }
    return np.concatenate([clips[start] for start in sorted(clips)], axis=1)


def repeated(
    pipe: FramePack, asks: Sequence[Prompt], sections: int, settings: Settings
) -> np.ndarray:
    """Sample videos of the same length by chaining single sections.

    Each section starts from the last frame of the previous one as its image, without history.
    """
    made = sampled(pipe, asks, 1, settings)
    videos = [made]
    for number in range(1, sections):
        asks = [
            Prompt(frames[-1], ask.caption, (ask.seed + 7919 * number) % 2**32)
            for frames, ask in zip(made, asks, strict=True)
        ]
        made = sampled(pipe, asks, 1, settings)
        videos.append(made[:, 1:])
    return np.concatenate(videos, axis=1)


def reconstructed(pipe: FramePack, frames: np.ndarray) -> np.ndarray:
    """Encode frames (P, H, W, 3) with the VAE and decode them again, clip by clip."""
    reach = CLIP_LATENTS * pipe.geometry.time_compression
    clips = [
        # The last frame of a clip is the first frame of the next one.
        _through_vae(pipe, frames[first : first + reach + 1])[min(first, 1) :]
        for first in range(0, max(1, len(frames) - 1), reach)
    ]
    return np.concatenate(clips)


def _through_vae(pipe: FramePack, frames: np.ndarray) -> np.ndarray:
    latents = pipe.encode_clip(frames)
    clip = pipe.decode_clip((0, len(latents)), Timeline.of(latents[None]))
    return np.asarray(to_uint8(jnp.asarray(clip), *frames.shape[1:3]))[0]
