"""History that is left out or corrupted: how often, which frames, and what stays zero."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.packing import Timeline
from framepack_jax.training import flow_matching
from framepack_jax.training.config import HistoryConfig, TrainConfig
from framepack_jax.training.history import Places, change_history

SCHEDULE = packing.parse(packing.RELEASED_F1)
AGES = packing.history_ages(SCHEDULE)
SAMPLES, WINDOW = 4000, 9
NOT_GIVEN = tuple(np.zeros((1, len(group)), bool) for group in AGES)
# Of a sample of section 1 of a video with a start image: it is the tenth newest frame of history.
GIVEN = tuple(np.asarray(group)[None] == 9 for group in AGES)


@functools.partial(jax.jit, static_argnums=0)
def change(cfg: HistoryConfig, context, keys, sigmas, given=NOT_GIVEN) -> packing.PackedContext:
    return change_history(cfg, context, Places(AGES, WINDOW, given), keys, sigmas)


def context_of(section: int, samples: int = SAMPLES) -> packing.PackedContext:
    """Context of ones, with two values a frame, and zeros where the video has not begun."""
    plan = packing.plan(SCHEDULE, section + 1, before=0, alone=True)
    timeline = Timeline.of(np.ones((1, 9 * (section + 1), 1, 1, 2), np.float32))
    context = packing.read_context(plan[section], timeline)
    return jax.tree.map(lambda x: jnp.asarray(np.repeat(x, samples, axis=0)), context)


def keys_of(first: int, last: int) -> jax.Array:
    return flow_matching.sample_keys(jax.random.key(3), jnp.arange(first, last))


def changed(
    cfg: HistoryConfig, section: int = 4, sigma: float = 0.5, given=NOT_GIVEN
) -> tuple[np.ndarray, np.ndarray]:
    """History by age (samples, 19, 2), and the anchor (samples, 2)."""
    sigmas = jnp.full(SAMPLES, sigma)
    context = change(cfg, context_of(section), keys_of(0, SAMPLES), sigmas, given)
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
        change(cfg, context_of(3, 8), keys_of(begin, begin + 8), jnp.full(8, 0.5))
        for begin in (0, 4)
    )
    for a, b in zip(first.latents, second.latents, strict=True):
        np.testing.assert_array_equal(a[4:], b[:4])
    assert len({np.asarray(x).tobytes() for x in first.latents[0]}) > 3


def test_nothing_changes_by_default() -> None:
    context = context_of(2, 4)
    places = Places(AGES, WINDOW, NOT_GIVEN)
    keys, sigmas = keys_of(0, 4), jnp.ones(4)
    assert change_history(HistoryConfig(), context, places, keys, sigmas) is context
    with pytest.raises(ValueError, match=r"--history.drop-all|history.drop_all"):
        TrainConfig(history=HistoryConfig(drop_all=1.5))
    with pytest.raises(ValueError, match=r"both add noise to the history"):
        HistoryConfig(noisy=0.1, corrupt=0.3)
    with pytest.raises(ValueError, match=r"--history.anchor-noise 0.2 0.1: expected the lower"):
        HistoryConfig(anchor_noise=(0.2, 0.1))


def moments(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std())


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0])
def test_noisy_history_follows_the_level_of_the_target(sigma) -> None:
    """x = 1 has the mean 1 - s sigma and the deviation s sigma. Anchor and start image are clean,
    also where the start image is history."""
    history, anchor = changed(HistoryConfig(noisy=0.5), sigma=sigma, given=GIVEN)
    np.testing.assert_allclose(moments(np.delete(history, 9, axis=1)),
                               (1 - 0.5 * sigma, 0.5 * sigma), atol=0.005)  # fmt: skip
    assert (anchor == 1).all() and (history[:, 9] == 1).all()


def test_a_random_factor_of_noisy_history_is_that_of_a_sample() -> None:
    history, _ = changed(HistoryConfig(noisy="random"), sigma=1.0)
    # Over s from 0 to 1: the mean of 1 - s, and of s^2 plus the variance of 1 - s.
    np.testing.assert_allclose(moments(history), (1 / 2, math.sqrt(1 / 3 + 1 / 12)), atol=0.01)
    spread = history.reshape(SAMPLES, -1).std(axis=1)
    np.testing.assert_allclose(np.quantile(spread, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)


def test_history_and_start_are_dropped_as_often_as_configured() -> None:
    history, anchor = changed(HistoryConfig(drop_history=0.3, drop_start=0.2), given=GIVEN)
    there = (history != 0).all(-1)
    kept, start = there[:, [0, 18]].all(axis=1), (anchor != 0).all(-1)
    np.testing.assert_array_equal(there[:, 9], start)
    assert (np.delete(there, 9, axis=1) == kept[:, None]).all()
    assert abs(kept.mean() - 0.7) < 0.02 and abs(start.mean() - 0.8) < 0.02
    assert abs((kept & start).mean() - 0.56) < 0.02


def test_the_anchor_is_noised_to_levels_of_its_own() -> None:
    cfg = HistoryConfig(corrupt=0.3, clean=1.0, anchor_noise=(0.111, 0.135))
    history, anchor = changed(cfg, given=GIVEN)
    for noised in (anchor, history[:, 9]):
        np.testing.assert_allclose(moments(noised), (1 - 0.123, 0.123), atol=0.006)
    assert (np.delete(history, 9, axis=1) == 1).all()


def test_corruption_has_one_level_a_sample_or_one_a_frame() -> None:
    history, _ = changed(HistoryConfig(corrupt=0.9, clean=0.0, corrupt_mode="sample"))
    spread = np.abs(history[:, :, 0] - history[:, :, 1])
    # Deviations of equal levels are larger or smaller together.
    assert np.corrcoef(spread[:, 3], spread[:, 4])[0, 1] > 0.2


def test_random_corruption_resamples_one_in_ten() -> None:
    """A flat frame is unchanged by it."""
    cfg = HistoryConfig(corrupt=0.3, clean=0.0, corrupt_mode="random")
    history, anchor = changed(cfg)
    flat = np.abs(history - 1).max(axis=(1, 2)) < 1e-6
    assert abs(flat.mean() - 0.1) < 0.02
    np.testing.assert_array_equal(flat, np.abs(anchor - 1).max(axis=1) < 1e-6)


def test_a_dropped_tail_has_no_tokens() -> None:
    """As at the start of a video: its latents are zero, and none of its tokens is read."""
    schedule = packing.parse("ta_f2k2f1k1_g2")
    timeline = Timeline.of(np.ones((1, 13, 4, 4, 2), np.float32))
    context = packing.read_context(packing.plan(schedule, 6)[-1], timeline)
    ages, keys = packing.history_ages(schedule), keys_of(0, 1)
    places = Places(ages, 2, [np.zeros((1, len(group)), bool) for group in ages])
    for fields in ({"drop_all": 1.0}, {"drop_oldest": 1.0}, {"drop_history": 1.0}):
        found = change_history(HistoryConfig(**fields), context, places, keys, jnp.ones(1))
        assert not found.latents[0].any() and found.masked.tolist() == [context.tail_tokens]
    kept = change_history(HistoryConfig(corrupt=0.5), context, places, keys, jnp.ones(1))
    assert kept.masked.tolist() == context.masked.tolist() == [252]
    np.testing.assert_array_equal(kept.latents[0][:, :-8], 0)
