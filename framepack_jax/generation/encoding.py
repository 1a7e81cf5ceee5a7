"""Encode requests: prompts and images to conditions, given images and videos to latents."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from framepack_jax import conditioning
from framepack_jax.conditioning import PromptStates
from framepack_jax.generation.prompts import prompt_shares, timed_prompts
from framepack_jax.generation.request import Layout, Request, SourceVideo
from framepack_jax.generation.settings import Settings
from framepack_jax.packing import Section

if TYPE_CHECKING:
    from framepack_jax.generation.pipeline import FramePack


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Encoded requests of one layout: `conditions` of every section, or one for all; what is not
    wanted, or None; latents (B, H, W, C) of the positions that are `given`."""

    conditions: Sequence[Any]
    negative: Any
    given: Mapping[int, np.ndarray]


def encode(
    pipe: "FramePack",
    requests: Sequence[Request],
    layout: Layout,
    settings: Settings,
    prompt_blend: float = 0.0,
    given: Mapping[int, np.ndarray] | None = None,
) -> Inputs:
    """Encode prepared requests of one layout; `given` latents (B, H, W, C) by position, where
    they are there already."""
    encoders = pipe.encoders() if callable(pipe.encoders) else pipe.encoders
    embedded = jnp.concatenate(
        [
            pipe.run(conditioning.encode_image, encoders, start_image(request)[None])
            for request in requests
        ]
    )
    guidance = jnp.full(len(requests), settings.distilled_guidance, jnp.float32)

    def conditions(prompts: Sequence[PromptStates]) -> Any:
        states = (jnp.concatenate(parts) for parts in zip(*prompts, strict=True))
        return pipe.transformer.spec.conditions(*states, embedded, guidance)

    # Sections under the same prompts share one set of arrays.
    @functools.cache
    def at(*shares: tuple[tuple[str, float], ...]) -> Any:
        return conditions(
            [
                conditioning.blend_prompts([(encoded[t], share) for t, share in prompts])
                for prompts in shares
            ]
        )

    shares = [
        tuple(_prompts_at(pipe, r.prompt, section, layout, prompt_blend) for r in requests)
        for section in layout.plan
    ]
    _warn_of_unused(requests, shares)
    refused = [r.negative_prompt for r in requests] if settings.cfg_scale != 1 else []
    wanted = [t for each in shares for prompts in each for t, _ in prompts]
    texts = list(dict.fromkeys([*wanted, *refused]))
    read = pipe.run(conditioning.encode_each, encoders, [[text] for text in texts])
    encoded = dict(zip(texts, read, strict=True))
    by_section = [at(*each) for each in shares]
    negative = conditions([encoded[text] for text in refused]) if refused else None
    if given is None:
        each = [given_latents(pipe, request, layout) for request in requests]
        given = {p: np.stack([latents[p] for latents in each]) for p in each[0]}
    return Inputs(by_section, negative, given)


def _prompts_at(
    pipe: "FramePack", prompt: str, section: Section, layout: Layout, span: float
) -> tuple[tuple[str, float], ...]:
    """The prompts that count in the middle of a section, and their shares."""
    times, texts = zip(*timed_prompts(prompt), strict=True)
    compression = pipe.vae.cfg.time_compression
    middle = (section.targets[0] - 1 + section.targets[-1]) / 2 - (layout.before - 1)
    shares = prompt_shares(times, compression * middle / layout.fps, span)
    return tuple((text, s) for text, s in zip(texts, shares, strict=True) if s > 0)


def given_latents(pipe: "FramePack", request: Request, layout: Layout) -> dict[int, np.ndarray]:
    """Return the latents (H, W, C) of a fitted request by position: of the start image or the
    source video, of key frames and end image."""
    given = {}
    if request.source_video is None:
        given[0] = encode_clip(pipe, start_image(request)[None])[0]
    else:
        given |= _source_latents(pipe, request.source_video, layout.before)
    pictures = [image for _, image in request.key_frames]
    pictures += [] if request.end_image is None else [request.end_image]
    for position, picture in zip(layout.stills, pictures, strict=True):
        given[position] = _still(pipe, picture, guide=position == layout.length)
    return given


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
    """The normalised latents (F, H, W, C) of a clip (P, height, width, 3) uint8."""
    encoded = pipe.run(
        conditioning.clip_latents, pipe.vae.cfg, pipe.vae.params, frames[None],
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


def _warn_of_unused(
    requests: Sequence[Request], shares: Sequence[Sequence[tuple[tuple[str, float], ...]]]
) -> None:
    """Name prompts by time that fall between the middles of sections, so that none is led by them.
    `shares` are, for each section and request, the prompts that count."""
    for i, request in enumerate(requests):
        used = {text for section in shares for text, _ in section[i]}
        for seconds, text in timed_prompts(request.prompt):
            if text not in used:
                warnings.warn(
                    f"the prompt at {seconds:g} s, {text!r}, leads no section: sections are made"
                    " whole, so give it more time",
                    stacklevel=4,
                )
