"""Rows of an evaluation by a model: repeated sections, blanked context, reconstructions."""

import numpy as np
import pytest

from framepack_jax import FramePack, bundle, packing
from framepack_jax.generation.pipeline import Settings
from framepack_jax.toy import baselines
from tests.fixtures.pictures import texture


@pytest.fixture(scope="module")
def pipe() -> FramePack:
    return FramePack.load(
        bundle.BUILTIN_BUNDLES["random"], schedule=packing.parse("f1k1_x_f16k4f2k2f1k1_g2")
    )


def asks(count: int) -> list[baselines.Prompt]:
    return [
        baselines.Prompt(texture(i)[:32, :32], "a red circle moves left", i) for i in range(count)
    ]


def test_repeated_sections_know_nothing_of_each_other(pipe) -> None:
    settings = Settings(steps=1)
    made = baselines.repeated(pipe, asks(2), 2, settings)
    assert made.shape == (2, 17, 32, 32, 3) and made.dtype == np.uint8
    first = baselines.sampled(pipe, asks(2), 1, settings)
    np.testing.assert_array_equal(made[:, :9], first)
    # What follows depends on the last frame alone.
    again = [baselines.Prompt(made[i, 8], "a red circle moves left", 7919 + i) for i in range(2)]
    np.testing.assert_array_equal(made[:, 9:], baselines.sampled(pipe, again, 1, settings)[:, 1:])


def test_blanked_context_changes_what_is_made(pipe) -> None:
    settings = Settings(steps=1)
    made, blank, all_of_it = (
        baselines.sampled(pipe, asks(1), 2, settings, kernels) for kernels in ((), ("k2",), ())
    )
    np.testing.assert_array_equal(made, all_of_it)
    assert not np.array_equal(made, blank)


def test_reconstruction_has_every_frame_once(pipe, monkeypatch) -> None:
    monkeypatch.setattr(baselines, "CLIP_LATENTS", 2)
    frames = np.stack([np.roll(texture()[:32, :32], i, 0) for i in range(17)])
    made = baselines.reconstructed(pipe, frames)
    assert made.shape == frames.shape
    np.testing.assert_array_equal(made[:9], baselines.reconstructed(pipe, frames[:9]))
    np.testing.assert_array_equal(made[9:], baselines.reconstructed(pipe, frames[8:])[1:])
