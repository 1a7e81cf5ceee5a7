"""Motions in the words of captions."""

import numpy as np
import pytest

from framepack_jax.toy import motion_labels
from tests.fixtures.pictures import FPS


def track(kind: str, turn: float = 1.5, n: int = 30) -> np.ndarray:
    time = np.linspace(0, 1, n)[:, None]
    steps = {"left": (-0.4, 0.1), "right": (0.5, -0.2), "up": (0.1, -0.3), "down": (0.0, 0.3)}
    if kind == "orbit":
        angle = 0.7 + turn * time[:, 0]
        return 0.5 + 0.25 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray([[0.2, 0.8]]) + time * np.asarray([steps.get(kind, (0.0, 0.02))])


@pytest.mark.parametrize("kind", ["left", "right", "up", "down", "orbit", "stay"])
def test_words_of_motions(kind: str) -> None:
    anchor = np.full((30, 2), 0.5)
    shaken = track(kind) + np.random.default_rng(4).normal(0, 0.004, (30, 2))
    shaken[7:12] = np.nan
    assert motion_labels.word(shaken, anchor) == kind
    assert motion_labels.word(track("orbit", -1.2), anchor) == "orbit"
    shaken[:20] = np.nan
    assert motion_labels.word(shaken, anchor) == ""


def test_an_orbit_goes_with_its_anchor() -> None:
    moving = np.linspace(0, 1, 30)[:, None] * np.asarray([[0.3, -0.2]])
    assert motion_labels.word(track("orbit") + moving, 0.5 + moving) == "orbit"
    assert motion_labels.word(track("left"), 0.5 + moving) == "left"


def test_agreement_counts_windows_of_one_word() -> None:
    tracks = np.concatenate([track("left"), track("up"), track("left")])[:, None]
    words = [["left"]] * 30 + [["down"]] * 30 + [["left"]] * 10 + [["up"]] * 20 + [["behind"]] * 30
    tracks = np.concatenate([tracks, tracks[60:]])
    found = motion_labels.agreement(tracks, words, [None], FPS)[:, 0]
    assert (found[:30] == 1).all() and (found[30:60] == 0).all() and np.isnan(found[60:]).all()


def test_the_nearest_of_two_tracks() -> None:
    left, right = track("left"), track("right")
    half = track("stay") + 0.5 * (left - track("stay"))
    half[3:20] = np.nan
    assert motion_labels.nearest(half, [right, left]) == 1
    assert motion_labels.nearest(np.full((30, 2), np.nan), [right, left]) is None
