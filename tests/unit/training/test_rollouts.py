"""History that the network predicts itself: which steps, which frames, and what it becomes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.data.batch import Batch, Conditions, Meta
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.training import flow_matching, rollouts
from framepack_jax.training.config import HistoryConfig, TrainConfig
from framepack_jax.training.draws import Draw
from framepack_jax.training.state import Model

SCHEDULES = ("f1k1_x_f4k4f2k2f1k1_g2", "f1k1_x_g2_f1k1f2k2f4k4_td", "ta_f2k2f1k1_g2")
CFG = TrainConfig(
    bundle="random", output="run", batch=2, dtype="float32",
    history=HistoryConfig(rollouts=1.0, rollout_level=0.5),
)  # fmt: skip
KEYS = flow_matching.sample_keys(jax.random.key(1), jnp.arange(2))


def batch_of(schedule: packing.Schedule, section: int, step: int = 0) -> Batch:
    """Two samples of a section of a video of eight."""
    plan = packing.plan(schedule, 8)
    shape = 2, packing.length(plan), 4, 4, 3
    timeline = packing.Timeline.of(np.random.default_rng(0).standard_normal(shape, np.float32))
    context = packing.read_context(plan[section], timeline)
    given = tuple(np.stack([mask] * 2) for mask in packing.given_frames(plan[section], 1))
    text = np.ones((2, 3, 8), np.float32)
    zeros = np.zeros(2, np.int32)
    meta = Meta(np.arange(2, dtype=np.int32) + 2 * step, zeros, zeros, zeros)
    return Batch(
        timeline.read(plan[section].targets), context, given,
        Conditions(text, text[:, :, 0] > 0, text[:, 0], None), meta,
    )  # fmt: skip


def model_of(velocity) -> Model:
    """A network that predicts this velocity of (parameters, x, sigma, context)."""

    def predict(cfg, params, x, sigma, context, conditions, dtype):
        return velocity(params, x, sigma, context)

    return Model(dataclasses.replace(TRANSFORMER, velocity=predict), None)


@pytest.mark.parametrize("text", SCHEDULES)
@pytest.mark.parametrize("section", [0, 1, 7])
def test_history_becomes_what_the_velocity_points_to(text: str, section: int) -> None:
    """x0 = x_t - sigma v, for a velocity that is known; all else is as it was. The network reads
    the frames in order of time, and of the context no history."""
    schedule = packing.parse(text)
    batch, seen = batch_of(schedule, section), []

    def velocity(params, x, sigma, context):
        seen.append((sigma, context))
        return params * context.target_indices[:, :, None, None, None] + jnp.zeros_like(x)

    with jax.disable_jit():  # so that `seen` holds numbers
        made = rollouts.with_rollouts(CFG, model_of(velocity), 0.25, schedule, batch, KEYS)
    [(sigmas, read)] = seen
    assert (sigmas >= 0).all() and (sigmas < 0.5).all() and sigmas[0] != sigmas[1]
    indices = np.asarray(read.target_indices)
    assert (np.diff(indices, axis=1) > 0).all()
    groups = rollouts.history_groups(schedule)
    count = rollouts.history_frames(schedule)
    noise = flow_matching.normal(KEYS, Draw.ROLLOUT_NOISE, (count, 4, 4, 3))
    first, changed = 0, 0
    for group, true in enumerate(batch.context.latents):
        ours = np.asarray(made.latents[group])
        if group not in groups:
            np.testing.assert_array_equal(ours, true)
            anchor = not packing.tail_of(batch.context.kernels[group])
            assert (np.asarray(read.latents[group]) == (true if anchor else 0)).all()
            continue
        assert (np.asarray(read.latents[group]) == 0).all()
    for group in groups:
        true, ours = batch.context.latents[group], np.asarray(made.latents[group])
        place = slice(first, first := first + true.shape[1])
        sigma = np.asarray(sigmas)[:, None, None, None, None]
        v = 0.25 * batch.context.indices[group][:, :, None, None, None]
        wanted = (1 - sigma) * true + sigma * np.asarray(noise)[:, place] - sigma * v
        stays = batch.given[group] | ~(true != 0).any(axis=(2, 3, 4))
        changed += (~stays).sum()
        wanted = np.where(stays[:, :, None, None, None], true, wanted)
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
    # The first section that is made has no history but the start image.
    assert (changed > 0) == (section > 0)
    if read.masked is not None:
        assert (np.asarray(read.masked) == read.tail_tokens).all()


@pytest.mark.parametrize(("share", "count"), [(0.5, 500), (0.3, 300), (1.0, 1000), (0.25, 250)])
def test_the_share_of_steps_is_exact_and_evenly_spaced(share: float, count: int) -> None:
    steps = np.flatnonzero(rollouts.rolls_out(jnp.arange(10**6, 10**6 + 1000), share))
    assert len(steps) == count
    assert np.diff(steps).max() <= np.ceil(1 / share)
    if share == 0.5:
        assert (np.diff(steps) == 2).all()


def test_other_steps_read_the_true_history_and_no_step_sends_a_gradient() -> None:
    schedule = packing.parse(SCHEDULES[0])
    cfg = dataclasses.replace(CFG, history=HistoryConfig(rollouts=0.5))
    model = model_of(lambda params, x, sigma, context: params * x)

    @jax.jit
    def total(params, batch):
        made = rollouts.with_rollouts(cfg, model, params, schedule, batch, KEYS)
        return sum(jnp.sum(frames**2) for frames in made.latents)

    true = sum(np.sum(frames**2) for frames in batch_of(schedule, 7).context.latents)
    for step in range(4):
        value, slope = jax.value_and_grad(total)(0.5, batch_of(schedule, 7, step))
        assert (abs(value - true) < 1e-3) == (step % 2 == 0) and slope == 0


@pytest.mark.parametrize(
    ("text", "named"), [("g2", "g2 reads no history"), ("td_f2k1_g2~cos", "remove ~cos")]
)
def test_history_that_cannot_be_predicted_is_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"--history.rollouts 1: schedule .*{named}"):
        rollouts.check(CFG, packing.parse(text))
