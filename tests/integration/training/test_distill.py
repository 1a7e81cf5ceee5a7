"""Distillation to few steps: a student learns, its teacher stays, and its bundle is sampled so."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import bundle
from framepack_jax.cli import sample, train
from framepack_jax.training import checkpoints, consistency, flow_matching
from framepack_jax.training.config import DistillConfig
from framepack_jax.training.flow_matching_task import FlowMatchingTask, Networks
from framepack_jax.training.initial_weights import load_network, load_teacher
from tests.fixtures.torch_reference import relative_error
from tests.fixtures.training_runs import STEPS, finish, flags, log_of, same, start, state_of
from tests.fixtures.training_steps import begin, changed, on, set_up, train_of

DISTILL = ("--distill.steps", "2", "--distill.teacher-steps", "4", "--checkpoints.every", "2")


@pytest.fixture(scope="module")
def distilled(place, whole):
    """Four steps from the weights of a run, without a stop."""
    finish(start(place, place / "student", *of(whole), "--steps", "4"))
    return place / "student"


def of(teacher: Path) -> tuple[str, ...]:
    return *DISTILL, "--init", f"{teacher}@{STEPS}"


def test_a_run_that_was_stopped_goes_on_with_the_same_teacher(place, whole, distilled) -> None:
    again = place / "student_again"
    finish(start(place, again, *of(whole), "--steps", "3"))
    assert sorted(log_of(again)) == [1, 2, 3]
    finish(start(place, again, *of(whole), "--steps", "4"))
    same(again, distilled, 4)
    # The student has moved away from it, and its checkpoint has no teacher.
    before, after = state_of(whole), state_of(distilled, 4)
    assert len(before) == len(after)
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 1e-3
    with pytest.raises(SystemExit, match=r"distill.steps = 2 then, 4 now"):
        train.main(flags(place, again, *of(whole), "--distill.steps", "4"))


def test_the_bundle_of_a_student_is_sampled_in_its_steps(distilled, tmp_path) -> None:
    root = distilled / "bundle"
    sampling = bundle.read_manifest(root).sampling
    assert (sampling.steps, sampling.recipe.solver) == (2, "euler")
    assert sampling.distilled_guidance == 1.0
    sample.main([
        "--bundle", str(root), "--prompt", "waves", "--sections", "1", "--latents-only",
        "--output", str(tmp_path / "video"),
    ])  # fmt: skip
    told = json.loads((tmp_path / "video" / "run.json").read_text())["flags"]
    assert told["steps"] == 2


def test_the_teacher_is_what_the_run_starts_from(whole) -> None:
    """The bundle, or the average of another run, in the dtype of the computation."""
    path = bundle.resolve("random")
    fields = {"distill": DistillConfig(2, 4), "dtype": "bfloat16", "network": {}}
    task = opened(changed(**fields, init="bundle"), path)
    for ours, theirs in pairs(load_teacher(task), load_network(task)):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(ours, theirs.astype("bfloat16"))
    small = {"double_layers": 1, "single_layers": 1, "refiner_layers": 1}
    cfg = changed(**fields | {"network": small}, init=f"{whole}@{STEPS}")
    task = opened(cfg, path)
    average = checkpoints.restore_params(whole, STEPS, task.abstract.params, "ema")
    for ours, theirs in pairs(load_teacher(task), average):
        assert ours.dtype == "bfloat16"
        np.testing.assert_array_equal(ours, theirs.astype("bfloat16"))


def opened(cfg, path) -> FlowMatchingTask:
    return dataclasses.replace(set_up(cfg), bundle_path=path)


def pairs(ours, theirs):
    return zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)


def sampled(task: FlowMatchingTask, params, batch, steps: int) -> np.ndarray:
    """A section by `steps` steps of Euler's method, from noise that training does not see."""
    shape = batch.target.shape
    sampling = consistency.student_sampling(task.cfg, task.manifest.sampling)
    levels = sampling.recipe.levels(steps, flow_matching.section_tokens(shape)).sigmas
    keys = flow_matching.sample_keys(jax.random.key(1), batch.meta.element)

    @jax.jit
    def velocity(params, x, sigma):
        sigmas = jnp.full(len(x), sigma)
        return flow_matching.velocity(task.cfg, task.model, params, batch, keys, x, sigmas)

    x = jax.random.normal(jax.random.key(2), shape)
    for sigma, to in itertools.pairwise(levels):
        x = x + (to - sigma) * velocity(params, x, sigma)
    return np.asarray(x)


def test_a_student_comes_nearer_to_its_teacher(batches) -> None:
    """Its sample in one step, to that of the teacher in four."""
    cfg = changed(init="runs/base@1", distill=DistillConfig(1, 4))
    task, now, frozen = begin(cfg)
    teacher, train = now.params, train_of(cfg)
    wanted, untrained = (sampled(task, teacher, batches[0], n) for n in (4, 1))
    for number in range(40):
        batch = batches[number % len(batches)]
        elements = np.arange(number * cfg.batch, (number + 1) * cfg.batch, dtype=np.int32)
        batch = dataclasses.replace(batch, meta=dataclasses.replace(batch.meta, element=elements))
        now, metrics = train(now, Networks(frozen, {}, teacher), on(task, batch), np.float32(1e-3))
        assert not metrics.skipped
    after, before = (
        relative_error(made, wanted)
        for made in (sampled(task, now.params, batches[0], 1), untrained)
    )
    assert before > 0.4 and after < 0.7 * before
