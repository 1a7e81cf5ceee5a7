"""Context that is left out in a row of an evaluation."""

import numpy as np
import pytest

from framepack_jax import packing


@pytest.mark.parametrize("schedule", [packing.RELEASED_INVERTED, packing.RELEASED_F1])
def test_blanked_context_is_zero_and_nothing_else_is(schedule: str) -> None:
    plan = packing.plan(packing.parse(schedule), 3)
    latents = np.random.default_rng(5).standard_normal((1, packing.length(plan), 4, 4, 2))
    timeline = packing.Timeline.of(latents.astype(np.float32))
    for before, after in zip(plan, packing.drop_context(plan, ("k2",)), strict=True):
        whole, blank = (packing.read_context(s, timeline) for s in (before, after))
        assert (before.targets, before.decode) == (after.targets, after.decode)
        for i, kernel in enumerate(whole.kernels):
            expected = 0 * whole.latents[i] if kernel == "k2" else whole.latents[i]
            np.testing.assert_array_equal(blank.latents[i], expected)
            np.testing.assert_array_equal(blank.indices[i], whole.indices[i])
    assert packing.drop_context(plan, ()) == plan
