"""Held-out scenes, whose truth gets full marks."""

import numpy as np
import pytest

from framepack_jax.evaluation import drift
from framepack_jax.toy import motion_labels, scenes
from tests.fixtures.pictures import FPS, GREY

WORLD = 64, 64


@pytest.fixture(scope="module")
def truths() -> list[tuple[scenes.Case, np.ndarray]]:
    return [(case, case.truth()) for case in scenes.drift_cases(0, 8, 121, WORLD, "drift")]


def test_captions_of_others_agree_by_chance(truths) -> None:
    agreed = []
    for (case, frames), (other, _) in zip(truths, truths[1:] + truths[:1], strict=True):
        tracks = scenes.tracks_of(case.scene, frames)
        words = scenes.words_of(other.scene, len(frames))
        count = min(tracks.shape[1], len(words[0]))
        anchors = [a if a is None or a < count else None for a in scenes.anchors_of(case.scene)]
        agreed.append(
            drift.mean(
                motion_labels.agreement(
                    tracks[:, :count], [w[:count] for w in words], anchors[:count], FPS
                )
            )
        )
    assert np.nanmean(agreed) < 0.45


def test_a_hidden_sprite_is_gone_and_comes_back_in_truth() -> None:
    for hidden in (0.5, 1.0):
        for case in scenes.hiding_cases(0, 2, hidden, WORLD, "forgetting"):
            frames = case.truth()
            found = scenes.forgetting_figures(case, frames)
            assert found["hidden"] > 0.95 and found["identity"] > 0.95 and found["place"] < 0.03
            assert abs((case.away.stop - case.away.start) / FPS - hidden) < 0.2
            # Without the sprite, or with the beginning for all of it.
            still = scenes.forgetting_figures(case, np.repeat(frames[:1], len(frames), 0))
            assert still["hidden"] < 0.05 and still["place"] > 0.1
            empty = np.full_like(frames, GREY)
            lost = scenes.forgetting_figures(case, empty)
            assert lost["hidden"] == 1 and lost["identity"] == 0 and np.isnan(lost["place"])
