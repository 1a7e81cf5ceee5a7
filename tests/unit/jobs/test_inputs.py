"""Warnings of options that have no effect."""

import warnings

import pytest

from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.jobs.inputs import warn_unused_settings
from framepack_jax.jobs.spec import VideoSpec


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("waves", True), ("[0s: waves]", True), ("[0s: waves] [1s: bows]", False)],
)
def test_a_blend_needs_two_prompts(prompt, told) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_unused_settings(VideoSpec(prompt=prompt, prompt_blend=2.0), 1.0, Recipe())
    says = [str(warning.message) for warning in found]
    assert says == ["--prompt-blend has an effect only with timed prompts"] * told
