"""Decode latents to the final frames of a video: decode each section, cross-fade the clips."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.generation.crossfade import Interval, Splicer
from framepack_jax.generation.geometry import Geometry
from framepack_jax.generation.layout import START_FRAMES, Layout
from framepack_jax.generation.request import SourceVideo
from framepack_jax.generation.results import NotFinite
from framepack_jax.models.autoencoder import denormalise
from framepack_jax.models.network_spec import Preview
from framepack_jax.packing import Range, Section, Timeline

if TYPE_CHECKING:
    from framepack_jax.generation.pipeline import FramePack


def make_splicer(
    geometry: Geometry, plan: Sequence[Section], before: int = START_FRAMES, kept: int = 0
) -> Splicer:
    """Return a splicer of the clips of a plan. If a video is extended, its end is the last clip,
    unless sections are decoded alone: they follow the `kept` frames of the video."""
    clips = [Interval(*clip) for clip in geometry.clips(plan, kept)]
    if before > START_FRAMES and not geometry.sampling.decode_alone:
        clips.append(Interval(min(clip.start for clip in clips), geometry.frames_of(0, before)[1]))
    return Splicer(clips)


def overlap(geometry: Geometry, layout: Layout, source_video: SourceVideo) -> jax.Array:
    """Return the frames (1, P, height, width, 3), in [-1, 1], of a fitted source video that clips
    are cross-faded with."""
    start = geometry.frames_of(layout.overlap_start, layout.before)[0]
    frames = source_video.last[None, start - source_video.frames :]
    return jnp.asarray(frames, jnp.float32) / 127.5 - 1


def decode(
    pipe: "FramePack",
    plan: Sequence[Section],
    sections: Iterable[tuple[Section, Timeline]],
    before: jax.Array | None = None,
    kept: int = 0,
) -> Iterator[tuple[Section, int, jax.Array, Timeline]]:
    """Decode sections as they come and cross-fade overlapping clips.

    `before` holds the frames of a source video to cross-fade with; sections that are decoded alone
    follow its `kept` frames. Yields (section, first frame,
    final frames (B, P, height, width, 3) in about [-1, 1], timeline) for each clip of a section; no
    later clip changes them. A section without a clip of its own yields no frames.
    """
    splicer = make_splicer(
        pipe.geometry, plan, START_FRAMES if before is None else plan_start(plan), kept
    )
    numbers = itertools.count()
    if before is not None:
        splicer.add(sum(len(section.decode) for section in plan), before)
    for section, timeline in sections:
        for clip in section.decode:
            start, frames = splicer.add(next(numbers), pipe.decode_clip(clip, timeline))
            yield section, start, frames, timeline
        if not section.decode:
            yield section, 0, _no_frames(pipe, timeline), timeline


def _no_frames(pipe: "FramePack", timeline: Timeline) -> jax.Array:
    batch, _, *sides, _ = timeline.latents.shape
    height, width = (side * pipe.vae.cfg.space_compression for side in sides)
    return jnp.zeros((batch, 0, height, width, 3))


def preview_of(pipe: "FramePack") -> Preview:
    """Return weights (C, 3) and bias (3,) from latents as they are sampled to colours in [-1, 1],
    for pictures that need no VAE."""
    spec, cfg, params = pipe.vae
    if not callable(spec.preview):
        return spec.preview
    weight, bias = spec.preview(cfg, params)
    return pipe.latent_std[:, None] * weight, pipe.latent_mean @ weight + bias


def start_clip(
    pipe: "FramePack", clip: Range, timeline: Timeline, samples: slice = slice(None)
) -> tuple[jax.Array, Callable[[], None]]:
    """Start to decode a clip (B, P, height, width, 3) in about [-1, 1] of a range of positions.

    `samples` selects from the batch. Returns the clip, which may not be computed yet, and a
    function that waits for it and raises NotFinite if a value is not finite.
    """
    spec, cfg, params = pipe.vae
    latents = timeline.read(range(*clip))[samples]
    latents = denormalise(latents, pipe.latent_mean, pipe.latent_std)
    frames = pipe.run(spec.decode, cfg, params, latents, pipe.decode_tiling or pipe.tiling)
    finite = jnp.isfinite(frames).all(axis=(1, 2, 3, 4))
    numbers = np.arange(timeline.latents.shape[0])[samples]
    (first, last), dtype = clip, latents.dtype

    def check() -> None:
        if not np.asarray(finite).all():
            raise NotFinite(
                f"frames decoded from latents {first} to {last - 1} are not finite in"
                f" {dtype}; check the weights of the VAE",
                numbers[~np.asarray(finite)].tolist(),
            )

    return frames, check


def plan_start(plan: Sequence[Section]) -> int:
    """Return the first position that a plan writes."""
    return min(section.targets[0] for section in plan)
