"""Distillation to few steps: levels, what the student is to learn, and refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import bundle, packing
from framepack_jax.diffusion import solver
from framepack_jax.training import checkpoints, consistency, default_mesh, flow_matching, state
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import DistillConfig, LoRAConfig, NoiseSchedule, TrainConfig
from framepack_jax.training.draws import Draw
from framepack_jax.training.flow_matching_task import Networks
from framepack_jax.training.resume_checks import check_same_run
from tests.fixtures.training_steps import changed, set_up

MANIFEST = bundle.read_manifest(bundle.resolve("random"))
KEY = jax.random.key(3)
FOUR = DistillConfig(steps=4, teacher_steps=12)
LEVELS = np.linspace(1, 0, 13)


def from_run(**fields) -> TrainConfig:
    """Distillation from a run of the small network."""
    return changed(**{"init": "runs/base@3", "distill": FOUR} | fields)


def examples_at(batch, sigmas, teacher, student, levels=LEVELS, steps=4):
    keys = flow_matching.sample_keys(KEY, batch.meta.element)
    noise = flow_matching.normal(keys, Draw.NOISE, batch.target.shape[1:])
    made = consistency.examples(
        teacher, student, levels, steps, batch, keys, jnp.asarray(sigmas, jnp.float32)
    )
    return made, np.asarray(noise)


@pytest.mark.parametrize("mu", [None, 0.4])
def test_the_levels_of_the_student_are_those_of_sampling_in_so_many_steps(mu) -> None:
    """By the settings that its bundle has; the grid of the teacher holds them all."""
    cfg = from_run(noise_schedule=NoiseSchedule(mu=mu))
    shape = 1, 9, 64, 96, 16
    grid = consistency.noise_levels(cfg, MANIFEST.sampling, shape)
    sampling = consistency.student_sampling(cfg, MANIFEST.sampling)
    schedule = packing.parse("f1k1_x_g9_f1k1f2k2f16k4_td")
    levels = sampling.recipe.levels(sampling.steps, packing.target_tokens(schedule, 64, 96))
    assert sampling.steps == 4 and sampling.recipe.solver == "euler" and levels.times is None
    np.testing.assert_allclose(grid[::3], levels.sigmas, rtol=1e-12)
    table = sampling.recipe.table(levels, "unipc")
    np.testing.assert_array_equal(table, solver.euler(levels.sigmas))
    # Half of the way of the shifted grid, e^mu / (e^mu + 1).
    shift = flow_matching.section_mu(shape) if mu is None else mu
    np.testing.assert_allclose(grid[6], np.exp(shift) / (np.exp(shift) + 1))


def test_without_distillation_sampling_stays() -> None:
    assert consistency.student_sampling(changed(), MANIFEST.sampling) == MANIFEST.sampling


def test_the_guidance_of_training_is_that_of_the_bundle() -> None:
    for guidance, wanted in ((3.0, 3.0), ((1.0, 6.0), MANIFEST.sampling.distilled_guidance)):
        cfg = from_run(guidance=guidance)
        made = consistency.student_sampling(cfg, MANIFEST.sampling)
        assert made.distilled_guidance == wanted


def test_levels_are_drawn_by_the_number_of_the_sample_alone() -> None:
    """All are equally likely, and a batch has them all if it is as large as the grid."""
    numbers = jnp.arange(12_000)
    drawn = np.asarray(consistency.draw_levels(LEVELS, KEY, numbers, 12))
    seen, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_allclose(seen, np.sort(LEVELS[:-1]), rtol=1e-6)
    assert (counts == 1000).all()
    assert all(len(np.unique(batch)) == 12 for batch in drawn.reshape(-1, 12))
    for part in (numbers[1::3], numbers[::-1]):
        again = consistency.draw_levels(LEVELS, KEY, part, 12)
        np.testing.assert_array_equal(again, drawn[np.asarray(part)])
    # Smaller batches see all levels over time.
    few = np.asarray(consistency.draw_levels(LEVELS, KEY, numbers, 4))
    _, counts = np.unique(few, return_counts=True)
    assert len(counts) == 12 and abs(counts / 1000 - 1).max() < 0.1
    assert len({tuple(batch) for batch in few.reshape(-1, 4)}) > 2


def test_the_student_is_to_reach_where_teacher_and_student_lead(batches) -> None:
    """By hand, for velocities 2 x + sigma of the teacher and -x of the student. The first
    step of the student ends at 9/12, where from 10/12 the teacher alone leads."""
    batch = batches[0]
    made, noise = examples_at(
        batch, [1.0, 10 / 12, 9 / 12, 1 / 12],
        lambda x, sigmas: 2 * x + sigmas[:, None, None, None, None], lambda x, sigmas: -x,
    )  # fmt: skip
    np.testing.assert_allclose(made.sigmas, [1, 10 / 12, 9 / 12, 1 / 12], rtol=1e-6)
    target = np.asarray(batch.target, np.float64)
    for i, (sigma, end) in enumerate(
        [(1, 9 / 12), (10 / 12, 9 / 12), (9 / 12, 6 / 12), (1 / 12, 0)]
    ):
        x = (1 - sigma) * target[i] + sigma * noise[i]
        np.testing.assert_allclose(made.x[i], x, atol=1e-5)
        z = x - (2 * x + sigma) / 12
        if sigma - 1 / 12 > end + 1e-6:
            z = z + (end - (sigma - 1 / 12)) * -z
        np.testing.assert_allclose(made.velocity[i], (z - x) / (end - sigma), atol=2e-4)


def test_a_teacher_of_straight_paths_is_its_own_student(batches) -> None:
    """Its velocity is constant along a path, so that steps of every length reach the same place."""
    batch = batches[0]
    noise = examples_at(batch, np.ones(4), lambda x, s: x, lambda x, s: x)[1]

    def straight(x, sigmas):
        return jnp.asarray(noise) - batch.target.astype(jnp.float32)

    made, _ = examples_at(batch, [1.0, 0.8, 0.5, 0.25], straight, straight)
    np.testing.assert_allclose(made.velocity, straight(None, None), atol=1e-5)


def test_a_student_of_as_many_steps_learns_the_velocity_of_the_teacher(batches) -> None:
    made, _ = examples_at(
        batches[0], [1.0, 0.5, 0.5, 0.25], lambda x, sigmas: 3 * x, None, LEVELS, 12
    )
    np.testing.assert_allclose(made.velocity, 3 * made.x, atol=1e-5)
    assert consistency.more_passes(DistillConfig(12, 12)) == 1


def test_sigmas_between_levels_are_taken_for_the_nearest(batches) -> None:
    """Validation asks for its own; no level is the last, 0."""
    made, _ = examples_at(batches[0], [0.99, 0.79, 0.3, 0.001], lambda x, s: x, lambda x, s: x)
    np.testing.assert_allclose(made.sigmas, np.asarray([12, 9, 4, 1]) / 12, rtol=1e-6)


def test_no_gradient_flows_through_what_is_to_be_learned(batches) -> None:
    """The gradient is that of the velocity at x alone, with what is to be learned as it is."""
    batch = batches[0]
    sigmas = jnp.asarray([1.0, 0.8, 0.5, 0.25])

    def velocity(scale, x):
        return scale * x

    def wanted(scale):
        made, _ = examples_at(
            batch, sigmas, lambda x, s: velocity(2 * scale, x), lambda x, s: velocity(scale, x)
        )
        return made

    def loss(scale, made):
        return jnp.mean((velocity(scale, made.x) - made.velocity) ** 2)

    slope = jax.grad(lambda scale: loss(scale, wanted(scale)))(0.7)
    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, jax.grad(loss)(0.7, wanted(0.7)), rtol=1e-6)


@pytest.mark.parametrize(("trainable", "context"), [
    ("all", False), ("context", False), ("lora", False), ("lora", True),
])  # fmt: skip
def test_a_teacher_holds_copies_of_what_is_trained_in_full(trainable, context) -> None:
    """In the dtype of the computation; of adapters it has none."""
    lora = LoRAConfig(rank=3, alpha=6.0, context=context)
    cfg = from_run(trainable=trainable, lora=lora, dtype="bfloat16")
    task = set_up(cfg)
    networks = Networks(task.frozen, {}, task.teacher)
    merged = jax.eval_shape(task.merge, task.abstract.params, networks)
    whole = task.model.spec.abstract_params(task.model.cfg)
    assert jax.tree.structure(merged.teacher) == jax.tree.structure(whole)
    shapes = jax.tree.map(lambda a, b: a.shape == b.shape, merged.teacher, whole)
    assert all(jax.tree.leaves(shapes))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged.teacher)} == {"bfloat16"}
    _, own = state.partition_factors(task.abstract.params)
    assert jax.tree.structure(task.teacher) == jax.tree.structure(own)
    assert bool(jax.tree.leaves(task.teacher)) == (trainable != "lora" or context)
    for copy, trained in zip(jax.tree.leaves(task.teacher), jax.tree.leaves(own), strict=True):
        assert copy.sharding == trained.sharding


def test_a_step_costs_the_passes_of_teacher_and_student(batches) -> None:
    plain, distilled = (set_up(cfg) for cfg in (changed(), from_run()))
    schedule, size = plain.schedule, batches[0].target.shape[2:4]
    cost = plain.sample_cost(schedule, batches[0], size)
    assert cost.more_flops == 0
    made = distilled.sample_cost(schedule, batches[0], size)
    assert made == cost._replace(more_flops=2 * cost.flops)


def test_the_teacher_counts_for_the_default_mesh() -> None:
    """206 GB of state are 25.8 GB on each of eight devices, and a teacher has 25.7 GB in all."""
    cfg = TrainConfig(bundle="framepack_i2v", output="run", ema=0.999)
    manifest = bundle.read_manifest(bundle.resolve(cfg.bundle))
    plain, with_teacher = (
        default_mesh.state_bytes(each, manifest, 8)
        for each in (cfg, dataclasses.replace(cfg, distill=FOUR))
    )
    parameters = sum(
        np.prod(leaf.shape)
        for leaf in jax.tree.leaves(state.abstract_params(cfg, state.model_of(cfg, manifest))[0])
    )
    assert abs(with_teacher - plain - 2 * parameters / 8) < 1e-3 * plain


@pytest.mark.parametrize(("fields", "named"), [
    ({"init": "scratch"}, "--distill.steps 4 with --init scratch: random weights are no teacher"),
    ({"init": "runs/base"}, "--init runs/base: .* name its step, RUN@STEP"),
    ({"init": "runs/base@best"}, "name its step, RUN@STEP"),
    ({"noise_schedule": NoiseSchedule(high=0.2)}, "only --noise-schedule.mu has an effect"),
    (
        {"noise_schedule": NoiseSchedule(mu=1.0), "trainable": "lora"},
        "--noise-schedule.mu and --trainable lora: .* give --lora.context",
    ),
    ({"causal": True}, "--causal: the bundle, which is the teacher, is not causal"),
])  # fmt: skip
def test_a_run_without_such_a_teacher_is_refused(fields, named) -> None:
    with pytest.raises(ValueError, match=named):
        set_up(from_run(**fields))


def test_a_bundle_that_is_sampled_with_cfg_is_refused() -> None:
    sampling = dataclasses.replace(MANIFEST.sampling, cfg_scale=5.0)
    with pytest.raises(ValueError, match=re.escape("sampled with CFG (scale 5)")):
        consistency.check(from_run(), dataclasses.replace(MANIFEST, sampling=sampling))


def test_adapters_may_start_from_the_newest_step_of_a_run() -> None:
    """Their teacher is the bundle."""
    consistency.check(from_run(init="runs/base", trainable="lora"), MANIFEST)


def test_steps_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match=r"--distill.teacher-steps 24 .* --distill.steps 5"):
        DistillConfig(steps=5)


def test_a_run_resumes_with_the_same_steps_only() -> None:
    cfg = from_run()
    now = {"config": checkpoints.as_record(cfg), "fingerprint": {}, "weights": "a"}
    check_same_run(cfg, now, now)
    other = dataclasses.replace(cfg, distill=DistillConfig(2, 12))
    changed_record = now | {"config": checkpoints.as_record(other)}
    with pytest.raises(RunError, match=r"distill.steps = 4 then, 2 now"):
        check_same_run(other, changed_record, now)
    # A run of an earlier version has no such setting, and did not distil.
    old = checkpoints.as_record(changed())
    plain = now | {"config": dict(old)}
    del old["distill"]
    check_same_run(changed(), plain, now | {"config": old})
    with pytest.raises(RunError, match=r"distill.steps = 0 then, 4 now"):
        check_same_run(cfg, now, now | {"config": old | {"init": cfg.init}})
