"""Schedules drawn as text."""

import pytest

from framepack_jax import packing
from framepack_jax.packing.diagram import diagram


@pytest.mark.parametrize(
    ("schedule", "whole", "bound"),
    [
        # Kernel k4 leaves 1/64 of each of 16 frames. The bound is g + 1 + 1/2 + 1/4 ...
        ("td_f16k4f1k1_g9", "10.25 whole frames, 9 of them targets", "11"),
        ("f1k1_x_g2", "3.00 whole frames, 2 of them targets", "4"),
    ],
)
def test_the_whole_frames_of_a_section_and_their_bound(schedule, whole, bound) -> None:
    text = diagram(packing.parse(schedule), 128, 128, 8, 3)
    said = " ".join(text.split())
    assert whole in said and f"(halving with age, anchors not counted) is {bound}" in said
