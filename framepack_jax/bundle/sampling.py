"""Settings of sampling that fit how a network was trained: part of a bundle's manifest."""

import dataclasses
from typing import Annotated

from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.models.sizes import Size
from framepack_jax.utils.fields import Range

Fraction = Annotated[float, Range(at_least=0, at_most=1)]
Fps = Annotated[float, Range(above=0, at_most=1000)]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling for a network. The defaults are those of FramePack's release.

    Args:
        recipe: Noise levels, solver and stages of a section.
        steps: Steps of each stage.
        cfg_scale: Scale of classifier-free guidance.
        distilled_guidance: Guidance scale that a guidance-distilled network reads.
        negative_prompt: Prompt of the second pass.
        fps: Frames per second of the videos of training.
        empty_start: Without an image, a video starts with nothing known; else with a black frame.
        anchor_apart: The anchor image is not a frame of the video. Its history is a still of it.
        decode_alone: Each section is decoded by itself; else clips overlap and are cross-faded.
        history_noise: Noise level of the history, as a factor of that of the section.
        given_noise: Lowest and highest noise level of given latents, or None for no noise.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    steps: Size = 25
    cfg_scale: float = 1.0
    distilled_guidance: float = 10.0
    negative_prompt: str = ""
    fps: Fps = 30.0
    empty_start: bool = False
    anchor_apart: bool = False
    decode_alone: bool = False
    history_noise: Fraction = 0.0
    given_noise: tuple[float, float] | None = None
