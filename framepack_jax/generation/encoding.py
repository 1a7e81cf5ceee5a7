"""Encode requests: prompts and images to conditions, given images and videos to latents."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax import conditioning, packing
from framepack_jax.conditioning import Encoders, PromptStates
from framepack_jax.generation import anchor
from framepack_jax.generation.layout import Layout
from framepack_jax.generation.prompts import prompt_shares, timed_prompts
from framepack_jax.generation.request import Request, SourceVideo
from framepack_jax.generation.settings import Settings
from framepack_jax.packing import PackedContext, Section, Timeline

if TYPE_CHECKING:
    from framepack_jax.generation.pipeline import FramePack


# Prompts of a section and their shares, which sum to 1.
Shares = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Encoded requests of one layout.

    Args:
        conditions: Conditions of each section, or one entry for all sections.
        negative: Conditions of the negative prompts, or None.
        given: Given latents (B, H, W, C) by position.
        size: Shape (B, H, W, C) of a latent frame; needed if nothing is given.
    """

    conditions: Sequence[Any]
    negative: Any
    given: Mapping[int, np.ndarray]
    size: tuple[int, ...] | None = None

    def of(self, section: int) -> Any:
        """Return the conditions of a section."""
        return self.conditions[section if len(self.conditions) > 1 else 0]


def by_importance(pipe: "FramePack", section: Section, timeline: Timeline) -> list[Section]:
    """Return a section as each sample reads it: one for all, or one for each sample if the history
    is ordered by its similarity to the last frame before the section."""
    last = section.targets[0] - 1
    if not pipe.schedule.importance or last < 0:
        return [section]
    fps = pipe.sampling.fps / pipe.vae.cfg.time_compression
    estimate = timeline.read([last])[:, 0]
    return packing.by_importance(section, pipe.schedule, timeline, estimate, fps)


def contexts(
    pipe: "FramePack", sections: Sequence[Section], timeline: Timeline, settings: Settings
) -> tuple[PackedContext, PackedContext | None]:
    """Return the context of a section, given for each sample or once for all, and that of the
    second pass of guidance, None for the same. History is discretized if the schedule says so."""

    def read(sections: Sequence[Section]) -> PackedContext:
        context = packing.read_each(sections, timeline)
        return jax.device_get(packing.discretize(context, pipe.schedule, pipe.codebook))

    if not settings.guides_by_history:
        return read(sections), None
    return read(sections), read([packing.without_history(s, pipe.schedule) for s in sections])


def encode(
    pipe: "FramePack",
    requests: Sequence[Request],
    layout: Layout,
    settings: Settings,
    prompt_blend: float = 0.0,
    given: Mapping[int, np.ndarray] | None = None,
) -> Inputs:
    """Encode fitted requests of one layout.

    `given` are the latents (B, H, W, C) of given frames by position, if they are encoded already.
    """
    encoders = pipe.encoders() if callable(pipe.encoders) else pipe.encoders
    sections = [
        tuple(_shares(pipe, r.prompt, section, layout, prompt_blend) for r in requests)
        for section in layout.plan
    ]
    _warn_of_unused(requests, sections)
    negatives = [r.negative_prompt for r in requests] if settings.reads_negative_prompt else []
    images = [_image_tokens(pipe, encoders, request) for request in requests]
    texts = [text for section in sections for shares in section for text, _ in shares]
    states = _encode_texts(pipe, encoders, [*texts, *negatives])
    make = functools.partial(
        _conditions, pipe, _joined(images),
        jnp.full(len(requests), settings.distilled_guidance, jnp.float32),
    )  # fmt: skip
    # Sections under the same prompts share one set of arrays.
    of = {
        each: make([_blend(states, shares) for shares in each]) for each in dict.fromkeys(sections)
    }
    negative = make([states[text] for text in negatives]) if negatives else None
    if given is None:
        latents = [given_latents(pipe, request, layout) for request in requests]
        given = {p: np.stack([each[p] for each in latents]) for p in latents[0]}
    size = pipe.frame_size(layout, len(requests))
    return Inputs([of[each] for each in sections], negative, given, size)


def _encode_texts(
    pipe: "FramePack", encoders: Encoders | None, texts: Sequence[str]
) -> dict[str, PromptStates]:
    """Encode each text once."""
    distinct = list(dict.fromkeys(texts))
    states = pipe.run(conditioning.encode_each, encoders, [[text] for text in distinct])
    return dict(zip(distinct, states, strict=True))


def _blend(states: Mapping[str, PromptStates], shares: Shares) -> PromptStates:
    return conditioning.blend_prompts([(states[text], share) for text, share in shares])


def _conditions(
    pipe: "FramePack",
    images: jax.Array | None,
    guidance: jax.Array,
    prompts: Sequence[PromptStates],
) -> Any:
    """Return the network's conditions for a batch: one prompt, image and guidance a sample."""
    states = map(_joined, zip(*prompts, strict=True))
    return pipe.transformer.spec.conditions(*states, images, guidance)


def _joined(parts: Sequence[jax.Array | None]) -> jax.Array | None:
    """Concatenate what an encoder made of each sample; None if the bundle lacks the encoder."""
    made = [part for part in parts if part is not None]
    return jnp.concatenate(made) if made else None


def _shares(
    pipe: "FramePack", prompt: str, section: Section, layout: Layout, span: float
) -> Shares:
    """Return the prompts that count in the middle of a section, and their shares."""
    times, texts = zip(*timed_prompts(prompt), strict=True)
    shares = prompt_shares(times, pipe.geometry.middle(section, layout.before) / layout.fps, span)
    return tuple((text, s) for text, s in zip(texts, shares, strict=True) if s > 0)


def given_latents(pipe: "FramePack", request: Request, layout: Layout) -> dict[int, np.ndarray]:
    """Return the latents (H, W, C) of a fitted request by position: of the start image or the
    source video, of key frames and end image."""
    if pipe.sampling.anchor_apart:
        return anchor.given_latents(pipe, request)
    given: dict[int, np.ndarray] = {}
    if request.source_video is None:
        if layout.before:
            given[0] = encode_clip(pipe, start_image(request)[None])[0]
    else:
        given |= _source_latents(pipe, request.source_video, layout.before)
    pictures = [image for _, image in request.key_frames]
    pictures += [] if request.end_image is None else [request.end_image]
    for position, picture in zip(layout.stills, pictures, strict=True):
        given[position] = _still(pipe, picture, guide=position == layout.length)
    return given


def _image_tokens(
    pipe: "FramePack", encoders: Encoders | None, request: Request
) -> jax.Array | None:
    """Return what the network reads of the image that leads a request, zeros for text alone; None
    if it reads none."""
    if encoders is None:
        return None
    if request.image is None:
        return conditioning.no_image(encoders)
    return pipe.run(conditioning.encode_image, encoders, request.image[None])


def start_image(request: Request) -> np.ndarray:
    """Return the image that leads every section of a fitted request."""
    assert request.image is not None, "fit_images gives every request an image"
    return request.image


def _still(pipe: "FramePack", picture: np.ndarray, guide: bool) -> np.ndarray:
    """Return the latent (H, W, C) of one frame for a guide, else of `time_compression` frames:
    only the first latent of a video stands for one."""
    frames = 1 if guide else 1 + pipe.vae.cfg.time_compression
    return encode_clip(pipe, np.stack([picture] * frames))[-1]


def encode_clip(pipe: "FramePack", frames: np.ndarray) -> np.ndarray:
    """Encode a clip (P, height, width, 3) uint8 to normalised latents (F, H, W, C)."""
    encoded = pipe.run(
        conditioning.clip_latents, *pipe.vae, frames[None],
        pipe.latent_mean, pipe.latent_std, tiling=pipe.tiling,
    )  # fmt: skip
    return np.asarray(encoded)[0]


def _source_latents(
    pipe: "FramePack", source_video: SourceVideo, before: int
) -> dict[int, np.ndarray]:
    positions = pipe.geometry.source_positions(before)
    if source_video.latents is not None:
        return {position: source_video.latents[position] for position in positions}
    count = min(source_video.frames, pipe.geometry.source_frames)
    given = dict(zip(positions, encode_clip(pipe, source_video.last[-count:]), strict=True))
    if count < source_video.frames:
        # The first latent of this clip stands for one frame, and would for four in the video.
        given[0] = encode_clip(pipe, source_video.first[None])[0]
    return given


def _warn_of_unused(requests: Sequence[Request], sections: Sequence[Sequence[Shares]]) -> None:
    """Warn of timed prompts between the middles of sections, which no section uses.

    `sections` holds the prompts of each section and request.
    """
    for i, request in enumerate(requests):
        used = {text for section in sections for text, _ in section[i]}
        for seconds, text in timed_prompts(request.prompt):
            if text not in used:
                warnings.warn(
                    f"the prompt at {seconds:g} s, {text!r}, leads no section: sections are made"
                    " whole, so give it more time",
                    stacklevel=4,
                )
