"""The gates of the demo world: what they measure, and their exit code."""

import numpy as np
import pytest

from framepack_jax.toy import world
from scripts import toy_gates


def test_pixels_near_borders() -> None:
    scene = world.hiding(0, 0, 1.0, 64, 64)
    found = toy_gates.near_borders(scene, 0)
    inside = [cover >= 0.5 for cover in world.masks(scene, 0)]
    middle, wide = scene.wall
    columns = (np.arange(64) + 0.5) / 64
    inside.append(np.broadcast_to(np.abs(columns - middle) < wide / 2, (64, 64)))
    expected = np.zeros((64, 64), bool)
    for row, column in np.ndindex(64, 64):
        part = np.s_[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4]
        expected[row, column] = any(cover[part].any() != cover[part].all() for cover in inside)
    np.testing.assert_array_equal(found, expected)
    assert 0.1 < found.mean() < 0.7


def test_a_gate_that_fails_ends_with_code_1(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        toy_gates.main(["vae", "assets", "--bundle", "random", "--scenes", "2", "--size", "64x64"])
    assert left.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["vae:", "FAILED"], ["vae:", "FAILED"], ["assets:", "passed"]
    ]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        toy_gates.main(["assets"])
    assert left.value.code == 0


def test_limits() -> None:
    def passed(value, **limits):
        return toy_gates.Check("", value, 0.1, **limits).passed

    assert passed(1, low=1) and not passed(0.99, low=1)
    assert passed(1.2, low=0.8, high=1.2) and not passed(1.21, low=0.8, high=1.2)
    assert not passed(np.nan, low=0)


def test_context_of_another_clip() -> None:
    flags = toy_gates.Gates((), bundle="random", size="64x64", scenes=2)
    held = toy_gates.HeldOut(flags)
    # In inverted order section 3 is the first of the video, and has the most history after it.
    own, other = held.losses(3, 0.9), held.losses(3, 0.9, "k1")
    assert own.shape == other.shape == (2,) and (own != other).all()
    np.testing.assert_array_equal(held.losses(3, 0.9, "k8"), own)
    assert (held.losses(3, 1.0) != own).all()
