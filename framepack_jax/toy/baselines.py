"""Where the videos of an evaluation come from: models under test, and the references beside them.

Shapes: B videos side by side, P frames, H W rows and columns. Frames are (P, H, W, 3) uint8.
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from framepack_jax import packing
from framepack_jax.generation.crossfade import to_uint8
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.generation.request import Layout, Request, fit_images, make_layout
from framepack_jax.packing import Section, Timeline

CLIP_LATENTS = 18
"""Latents of a clip that the VAE encodes at a time, beside its first."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A video that is asked for: its first frame (H, W, 3) uint8, what happens, the seed."""

    image: np.ndarray
    caption: str
    seed: int


def layout_of(pipe: FramePack, ask: Prompt, sections: int) -> Layout:
    """Where so many sections from an image lie. Raises ValueError."""
    height, width = ask.image.shape[:2]
    request = Request(ask.caption, ask.image, seed=ask.seed)
    return make_layout(pipe.geometry, request, sections=sections, height=height, width=width)


def sections_for(pipe: FramePack, seconds: float, fps: float) -> int:
    """Sections that come closest to a duration."""
    window = pipe.schedule.window
    return packing.sections_for(seconds, window, fps, pipe.geometry.time_compression)


def frames_for(pipe: FramePack, sections: int) -> int:
    """Frames of a video of so many sections."""
    return pipe.geometry.frames_of(0, 1 + sections * pipe.schedule.window)[1]


def sampled(
    pipe: FramePack,
    asks: Sequence[Prompt],
    sections: int,
    settings: Settings,
    blank: Collection[str] = (),
) -> np.ndarray:
    """Videos (B, P, H, W, 3) made side by side from images of one size; context under the kernels
    `blank` is kept from the model."""
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
    """As long videos of single sections, each begun anew from the last frame of the one before it,
    as an image without history."""
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
    """Frames (P, H, W, 3) as the VAE shows them, encoded and decoded in clips."""
    reach = CLIP_LATENTS * pipe.geometry.time_compression
    clips = [
        # The last frame of a clip is the first of the next.
        _through_vae(pipe, frames[first : first + reach + 1])[min(first, 1) :]
        for first in range(0, max(1, len(frames) - 1), reach)
    ]
    return np.concatenate(clips)


def _through_vae(pipe: FramePack, frames: np.ndarray) -> np.ndarray:
    latents = pipe.encode_clip(frames)
    whole = Section((), (), (), (0, len(latents)))
    clip = pipe.decode_clip(whole, Timeline.of(latents[None]))
    return np.asarray(to_uint8(jnp.asarray(clip), *frames.shape[1:3]))[0]
