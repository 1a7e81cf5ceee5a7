"""Noise of the history in sampling: that of training, at the level of each step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.bundle import Sampling
from framepack_jax.diffusion import flow, sampler, solver_table
from framepack_jax.diffusion.history_noise import HistoryNoise, noise_history
from framepack_jax.diffusion.step_cache import StepCacheConfig
from framepack_jax.generation.noise import draw, draw_history
from framepack_jax.generation.settings import Settings
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.training import flow_matching
from framepack_jax.training.config import HistoryConfig
from framepack_jax.training.draws import Draw
from framepack_jax.training.history import Places, change_history

SCHEDULES = ("f1k1_x_f16k4f2k2f1k1_g9", "f1k1_x_g9_f1k1f2k2f16k4_td", "tc_f2k2f1k1_g2")
SIGMA = 0.6


def section_of(schedule: packing.Schedule, number: int):
    """A section of three, and its context of a batch of two."""
    plan = packing.plan(schedule, 3)
    shape = 2, packing.length(plan), 4, 4, 2
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return plan[number], packing.read_context(plan[number], packing.Timeline.of(latents))


@pytest.mark.parametrize("text", SCHEDULES)
@pytest.mark.parametrize("number", [0, 2])
def test_a_step_reads_what_a_training_sample_reads(text: str, number: int) -> None:
    schedule, keys = packing.parse(text), jax.random.split(jax.random.key(1), 2)
    section, context = section_of(schedule, number)
    drawn = draw_history(schedule, [section], context, 1, 0.5, [3, 4], number)
    assert drawn is not None
    shapes = (frames.shape[1:] for frames in context.latents)
    own = tuple(
        flow_matching.normal(keys, Draw.NOISY_NOISE, shape, group)
        for group, shape in enumerate(shapes)
    )
    step = noise_history(context, drawn._replace(noise=own), np.float32(SIGMA))
    given = tuple(mask[None] for mask in packing.given_frames(section, 1))
    places = Places(packing.history_ages(schedule), schedule.window, given)
    sample = change_history(HistoryConfig(noisy=0.5), context, places, keys, jnp.full(2, SIGMA))
    none = noise_history(context, drawn._replace(factor=np.float32(0)), np.float32(SIGMA))
    jax.tree.map(np.testing.assert_array_equal, none, context)
    changed = 0
    for group, made, wanted, clean in zip(
        section.groups, step.latents, sample.latents, context.latents, strict=True
    ):
        np.testing.assert_array_equal(made, wanted)
        changed += int((np.asarray(made) != clean).any(axis=(0, 2, 3, 4)).sum())
        if 0 in group.reads and "tc" not in group.kernel:
            at = group.reads.index(0)
            np.testing.assert_array_equal(made[:, at], clean[:, at])
    # The first section that is made reads no frame but the start image.
    assert (changed > 0) == (number == 2)


def test_noise_follows_the_seed_the_section_and_the_group() -> None:
    schedule = packing.parse("f1k1_x_f2k1f1k2_g2")
    section, context = section_of(schedule, 1)

    def drawn(seeds: list[int], number: int) -> list[np.ndarray]:
        made = draw_history(schedule, [section], context, 1, 0.1, seeds, number)
        assert made is not None
        return [np.asarray(x) for x in made.noise]

    both, alone = drawn([3, 2**40], 1), drawn([2**40], 1)
    for two, one in zip(both, alone, strict=True):
        np.testing.assert_array_equal(two[1], one[0])
    of_target = draw(Sampling().recipe, [3], 1, (1, 4, 4, 2))[0]
    first = [of_target[0, 0], *(x[0, 0] for x in both), *(x[0, 0] for x in drawn([3], 2))]
    assert len({frame.tobytes() for frame in first}) == len(first)
    assert draw_history(schedule, [section], context, 1, 0.0, [3], 1) is None


class ReadsHistory:
    """A network whose velocity is the mean frame of history, so that x0 = x - sigma history."""

    @staticmethod
    def velocity(cfg, params, x, sigma, context, conditions, dtype):
        return jnp.broadcast_to(context.latents[0].mean(axis=1, keepdims=True), x.shape)


def test_each_step_reads_history_at_its_own_level_by_one_program() -> None:
    random = np.random.default_rng(0)
    frame, noise, x = (
        random.standard_normal((1, n, 4, 4, 2)).astype(np.float32) for n in (1, 1, 2)
    )
    index = np.zeros((1, 1), np.int32)
    context = packing.PackedContext((frame,), (index,), np.zeros((1, 2), np.int32), ("k1",))
    sigmas, seen = flow.sigmas(4, 1.0), []
    settings = sampler.SamplerSettings(sigmas, solver_table("euler", sigmas))
    sampler.step.clear_cache()
    for factor in (0.5, 1.0):
        chosen = HistoryNoise(np.float32(factor), (noise,), (np.ones((1, 1), bool),))
        sampler.denoise(
            ReadsHistory, None, {}, x, settings, context, None, history_noise=chosen,
            on_step=lambda step, x0: seen.append(np.asarray(x0)),
        )  # fmt: skip
        state = x
        for i, sigma in enumerate(sigmas[:-1]):
            level = factor * sigma
            x0 = state - sigma * ((1 - level) * frame + level * noise)
            np.testing.assert_allclose(seen[i], x0, atol=1e-5)
            state = x0 + sigmas[i + 1] / sigma * (state - x0)
        seen.clear()
    assert sampler.step._cache_size() == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [("td_f2k2f1k1_g2+D8", r"history_noise = 0.1 .*\+D8"), ("g9", "g9 reads no history")],
)
def test_noise_that_cannot_be_is_refused(text: str, named: str) -> None:
    schedule = packing.parse(text)
    with pytest.raises(ValueError, match=named):
        Settings(history_noise=0.1).check(TRANSFORMER, Sampling(), schedule)
    Settings(step_cache=StepCacheConfig("tea")).check(TRANSFORMER, Sampling(), schedule)
