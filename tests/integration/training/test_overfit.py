"""A small packed Wan learns eight clips by heart, by their history."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest, Role
from framepack_jax.data.config import DataConfig
from framepack_jax.data.loader import open_loader
from framepack_jax.data.samples import conditions_of, latent_sample, make_meta
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.parallel import sharding
from framepack_jax.training import flow_matching_task, state, train_step, validation
from framepack_jax.training.config import NoiseSchedule, OptimizerConfig, TrainConfig
from framepack_jax.training.flow_matching_task import FlowMatchingTask, Networks
from framepack_jax.training.prefetch import place
from tests.fixtures.compiling import QUICK
from tests.fixtures.training_data import TEXT, write_dataset

CLIPS, SECTIONS, STEPS, RATE, TOKENS = 8, 3, 400, 1e-2, 9
SIGMAS = (0.3, 0.5, 0.7, 0.9)
TRAIN = TrainConfig(
    bundle="small", output="run", init="scratch", batch=CLIPS, dtype="float32", remat="none",
    data=DataConfig(caption_dropout=1.0, text_tokens=TOKENS),
    noise_schedule=NoiseSchedule(mu=0.0),
    optimizer=OptimizerConfig("muon", learning_rate=RATE, weight_decay=0.0),
)  # fmt: skip
WAN = WanConfig(
    heads=4, head_dim=16, layers=2, mlp_dim=128, text_dim=TEXT, time_dim=32, rope_axes=(8, 4, 4),
    context_kernels=("k1", "k2", "k4"), clean_context=True, prompt_to_target=True,
)  # fmt: skip


def manifest() -> Manifest:
    """That of a bundle which decodes sections of two latents alone."""
    base = bundle.read_manifest(bundle.resolve("random"))
    return dataclasses.replace(
        base,
        roles={"transformer": Role("wan_packed_dit", dataclasses.asdict(WAN), "transformer")},
        schedule=packing.parse("f1k1_x_f16k4f2k2f1k1_g2"),
        text_tokens=TOKENS,
    )


def sections_of(task: FlowMatchingTask, records) -> list:
    """A batch of all clips for each section that has history, and one of other clips."""
    plan = packing.plan(task.schedule, SECTIONS, before=0, alone=True)
    batches = []
    for number, section in list(enumerate(plan))[1:]:
        samples = [
            latent_sample(
                record, section, conditions_of(record, TOKENS),
                make_meta(clip * SECTIONS + number, number, SECTIONS, clip),
            )
            for clip, record in enumerate(records)
        ]  # fmt: skip
        batch = jax.tree.map(lambda *x: np.stack(x), *samples)
        others = jax.tree.map(lambda x: np.roll(x, 1, axis=0), batch)
        batches.append(tuple(place(each, task.mesh, CLIPS) for each in (batch, others)))
    return batches


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[str, float]:
    """The losses of the clips after training, with and without their history, and "constant", that
    of the mean velocity. All captions are empty, so that only its history tells a clip."""
    folder = tmp_path_factory.mktemp("clips")
    records = write_dataset(folder, {(32, 48): (2 * SECTIONS,) * CLIPS}, chunk=2)
    data = dataclasses.replace(TRAIN.data, path=str(folder))
    cfg = dataclasses.replace(TRAIN, data=data)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    task = flow_matching_task.set_up(cfg, manifest(), mesh)
    params = state.random_params(cfg, task.model, mesh)
    now, _ = state.init_state(cfg, task.model, task.tx, mesh, params)
    frozen = Networks({}, {})
    train = functools.partial(train_step.train_step, task)
    step = jax.jit(train, donate_argnums=0, compiler_options=QUICK)
    loader = open_loader(data, task.schedule, CLIPS)
    with jax.set_mesh(mesh), task.precision():
        for number, batch in enumerate(itertools.islice(loader, STEPS)):
            rate = np.float32(RATE * min(1, (STEPS - number) / (STEPS / 2)))
            now, _ = step(now, frozen, place(batch, mesh, CLIPS), rate)
        at = jax.jit(task.losses_at, compiler_options=QUICK)

        def losses_at(*args):
            return at(now.params, frozen, *args)

        found = validation.losses(losses_at, sections_of(task, records), SIGMAS, context=True)
    latents = np.stack([np.asarray(record.latents, np.float32) for record in records])
    return found | {"constant": 1 + latents.var(axis=0).mean()}


def test_eight_clips_are_learned(learned) -> None:
    assert learned["validation/loss"] < 0.4 * learned["constant"]
    assert learned["validation/loss_sigma_0.9"] < 0.3 * learned["constant"]


@pytest.mark.parametrize("kernel", ["k1", "k2", "k4"])
@pytest.mark.parametrize("change", ["blank", "other"])
def test_their_history_is_used(learned, kernel: str, change: str) -> None:
    """The loss rises when history is missing, or that of another clip."""
    name = f"context/{kernel}_{change}"
    assert learned[name] > 2 * learned[f"{name}_error"] > 0
