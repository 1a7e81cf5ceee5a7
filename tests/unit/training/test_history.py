"""History that is left out or corrupted: how often, which frames, and what stays zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.packing import Timeline
from framepack_jax.training import flow_matching
from framepack_jax.training.config import HistoryConfig, TrainConfig
from framepack_jax.training.history import change_history

SCHEDULE = packing.parse(packing.RELEASED_F1)
AGES = packing.history_ages(SCHEDULE)
SAMPLES, WINDOW = 4000, 9
CHANGE = jax.jit(change_history, static_argnums=(0, 2, 3))


def context_of(section: int, samples: int = SAMPLES) -> packing.PackedContext:
    """Context of ones, with two values a frame, and zeros where the video has not begun."""
    plan = packing.plan(SCHEDULE, section + 1, before=0, alone=True)
    timeline = Timeline.of(np.ones((1, 9 * (section + 1), 1, 1, 2), np.float32))
    context = packing.read_context(plan[section], timeline)
    return jax.tree.map(lambda x: jnp.asarray(np.repeat(x, samples, axis=0)), context)


def keys_of(first: int, last: int) -> jax.Array:
    return flow_matching.sample_keys(jax.random.key(3), jnp.arange(first, last))


def changed(cfg: HistoryConfig, section: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """History by age (samples, 19, 2), and the anchor (samples, 2)."""
    context = CHANGE(cfg, context_of(section), AGES, WINDOW, keys_of(0, SAMPLES))
    frames = np.concatenate([np.asarray(x)[:, :, 0, 0] for x in context.latents], axis=1)
    ages = np.concatenate([np.asarray(group) for group in AGES])
    return frames[:, np.argsort(ages)][:, 1:], frames[:, np.argmin(ages)]


def test_frames_are_dropped_as_often_as_configured() -> None:
    history, anchor = changed(HistoryConfig(drop_all=0.4, drop_oldest=0.4))
    there = (history != 0).all(-1)
    kept = (anchor != 0).all(-1)
    assert not there[~kept].any() and abs((~kept).mean() - 0.4) < 0.02
    # Of those with an anchor, 1, 10 or 19 of the oldest frames are missing, equally often.
    missing = (~there[kept]).sum(axis=1)
    for row, count in zip(there[kept], missing, strict=True):
        assert row.tolist() == [False] * count + [True] * (19 - count)
    counts = {count: (missing == count).mean() for count in np.unique(missing).tolist()}
    assert set(counts) == {0, 1, 10, 19}
    assert abs(counts[0] - 0.6) < 0.02
    for count in (1, 10, 19):
        assert abs(counts[count] - 0.4 / 3) < 0.02


def test_each_frame_is_noised_to_a_level_of_its_own() -> None:
    history, anchor = changed(HistoryConfig(corrupt=1 / 3, clean=0.1))
    clean = (history == 1).all(axis=(1, 2))
    np.testing.assert_array_equal(clean, (anchor == 1).all(axis=1))
    assert abs(clean.mean() - 0.1) < 0.02
    # x = 1 has the mean 1 - s and the variance s^2: over s from 0 to 1/3, 1/27 and that of 1 - s.
    noised = np.concatenate([history[~clean].reshape(-1), anchor[~clean].reshape(-1)])
    assert abs(noised.mean() - (1 - 1 / 6)) < 0.01
    assert abs(noised.var() - (1 / 27 + 1 / 108)) < 0.005
    # Frames of a sample differ in their levels: the two values of a frame deviate alike.
    spread = np.abs(history[~clean][:, :, 0] - history[~clean][:, :, 1])
    between = np.corrcoef(spread[:, 3], spread[:, 4])[0, 1]
    assert abs(between) < 0.1


@pytest.mark.parametrize("section", [0, 1])
def test_missing_history_stays_zero(section) -> None:
    history, anchor = changed(HistoryConfig(corrupt=0.9, clean=0.0), section)
    assert (history[:, : 19 - 9 * section] == 0).all()
    assert (anchor == 0).all() == (section == 0)
    if section:
        assert (history[:, 10:] != 1).all() and (anchor != 1).all()


def test_draws_belong_to_samples_and_not_to_batches() -> None:
    cfg = HistoryConfig(drop_all=0.3, drop_oldest=0.5, corrupt=0.3)
    first, second = (
        CHANGE(cfg, context_of(3, 8), AGES, WINDOW, keys_of(begin, begin + 8)) for begin in (0, 4)
    )
    for a, b in zip(first.latents, second.latents, strict=True):
        np.testing.assert_array_equal(a[4:], b[:4])
    assert len({np.asarray(x).tobytes() for x in first.latents[0]}) > 3


def test_nothing_changes_by_default() -> None:
    context = context_of(2, 4)
    assert change_history(HistoryConfig(), context, AGES, WINDOW, keys_of(0, 4)) is context
    with pytest.raises(ValueError, match=r"--history.drop-all|history.drop_all"):
        TrainConfig(history=HistoryConfig(drop_all=1.5))
    with pytest.raises(ValueError, match=r"both add noise to the history"):
        TrainConfig(history_noise=0.1, history=HistoryConfig(corrupt=0.3))
