"""Metrics and drift of videos with known answers."""

import math

import numpy as np
import pytest

from framepack_jax.evaluation import drift, metrics
from framepack_jax.evaluation.drift import Estimate
from tests.fixtures.pictures import FPS, SIDE, texture, video_of


def grating(wave: float, amplitude: float = 80.0) -> np.ndarray:
    """A grey picture whose columns are a sine of so many radians a pixel."""
    row = 128 + amplitude * np.sin(wave * np.arange(SIDE))
    return np.tile(row[None, :, None], (SIDE, 1, 3))


def measured(frames: np.ndarray, name: str) -> float:
    return drift.mean(metrics.measure(frames, FPS)[name])


def test_blur_takes_a_known_share_of_sharpness() -> None:
    for wave in (0.3, 0.8, 1.5):
        sharp = grating(wave)
        blurred = (np.roll(sharp, 1, 1) + 2 * sharp + np.roll(sharp, -1, 1)) / 4
        blurred[:, [0, -1]] = sharp[:, [0, -1]]
        values = [
            measured(video_of(p.round().astype(np.uint8)), "sharpness") for p in (sharp, blurred)
        ]
        # Central differences of a sine: amplitude sin(wave), of which the blur keeps a share.
        assert values[0] == pytest.approx(80 * math.sin(wave) / math.sqrt(2), rel=0.04)
        assert values[1] / values[0] == pytest.approx((1 + math.cos(wave)) / 2, rel=0.03)


@pytest.mark.parametrize("deviation", [2.0, 5.0, 15.0])
def test_noise_is_that_which_was_added(deviation: float) -> None:
    rng = np.random.default_rng(1)
    white = rng.normal(0, deviation, (6, SIDE, SIDE, 1))
    for picture in (np.full((1, SIDE, SIDE, 3), 128.0), texture()[None, :SIDE, :SIDE]):
        frames = (picture * 0.5 + 64 + white).clip(0, 255).round().astype(np.uint8)
        clean = (picture * 0.5 + 64).round().astype(np.uint8)
        assert measured(frames, "noise") == pytest.approx(deviation, rel=0.05)
        assert measured(clean, "noise") < 0.5
        assert measured(frames, "sharpness") > measured(clean, "sharpness")


def test_colours_are_what_they_are() -> None:
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, :20] = (200, 100, 50)
    found = metrics.still(frame)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert found["brightness"] == pytest.approx(luma / 2 / 255, rel=0.01)
    assert found["contrast"] == pytest.approx(luma / 2 / 255, rel=0.01)
    assert found["saturation"] == pytest.approx(0.75 / 2, rel=0.01)


@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (-3, 2)])
def test_flow_is_the_shift(shift: tuple[int, int]) -> None:
    whole = texture()
    frames = np.stack([np.roll(whole, (shift[1] * i, shift[0] * i), (0, 1)) for i in range(6)])
    frames = frames[:, 40 : 40 + SIDE, 40 : 40 + SIDE]
    speed = math.hypot(*shift) * FPS / SIDE
    assert measured(frames, "dynamics") == pytest.approx(speed, rel=0.02)
    # Steady motion is smooth, whatever its speed.
    assert measured(frames, "smoothness") > 0.99
    found = metrics.measure(frames, FPS)
    assert np.isnan(found["dynamics"]).tolist() == [True] + [False] * 5
    assert np.isnan(found["smoothness"]).tolist() == [True] + [False] * 4 + [True]


def test_flicker_is_not_smooth() -> None:
    frames = np.stack([np.full((SIDE, SIDE, 3), 100 + 20 * (i % 2), np.uint8) for i in range(7)])
    assert measured(frames, "smoothness") == pytest.approx(1 - 20 / 255, abs=1e-4)


def test_a_frozen_frame_has_no_dynamics_and_no_drift() -> None:
    found = metrics.measure(video_of(texture()[:SIDE, :SIDE], 20), FPS)
    assert drift.mean(found["dynamics"]) == 0 and drift.mean(found["smoothness"]) == 1
    assert all(drift.drift(values) == 0 for values in found.values())


def test_drift_of_a_linear_rise() -> None:
    count, rise = 101, 80
    levels = 60 + rise * np.arange(count) / (count - 1)
    frames = (
        np.broadcast_to(levels[:, None, None, None], (count, 16, 16, 3)).round().astype(np.uint8)
    )
    part = round(0.15 * count)
    expected = rise * (count - part) / (count - 1) / 255
    brightness = metrics.measure(frames, FPS)["brightness"]
    assert drift.drift(brightness) == pytest.approx(expected, abs=0.2 / 255)
    assert drift.drift(brightness[::-1]) == pytest.approx(expected, abs=0.2 / 255)


def test_estimates_have_standard_errors() -> None:
    found = drift.estimate([1.0, 2.0, math.nan, 6.0])
    assert found == Estimate(3.0, pytest.approx(math.sqrt(7 / 3)), 3)
    assert drift.estimate([4.0]) == Estimate(4.0, None, 1)
    assert drift.estimate([math.nan]) is None
    assert math.isnan(drift.drift(np.full(20, np.nan)))
