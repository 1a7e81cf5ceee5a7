"""Latents of a video by position."""

import numpy as np
import pytest

from framepack_jax.packing import Timeline


def test_a_view_needs_its_own_positions_alone() -> None:
    timeline = Timeline(5, (2, 3, 4))
    latents = np.random.default_rng(0).standard_normal((1, 3, 2, 3, 4)).astype(np.float32)
    timeline.write([1, 2, 3], latents)
    np.testing.assert_array_equal(timeline.view(range(1, 4)), latents)
    assert np.shares_memory(timeline.view(range(2, 4)), timeline.latents)
    for unknown in (range(3), range(2, 5)):
        with pytest.raises(ValueError, match="does not know all of positions range"):
            timeline.view(unknown)
