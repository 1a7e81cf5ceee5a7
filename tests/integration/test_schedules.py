"""Schedules of the paper beyond the released ones: ten steps of training, then a short video."""

import itertools

import jax
import numpy as np
import pytest

from framepack_jax import bundle, packing
from framepack_jax.data.config import DataConfig
from framepack_jax.data.loader import open_loader
from framepack_jax.diffusion import sampler
from framepack_jax.generation.network import Network
from framepack_jax.generation.pipeline import FramePack, Inputs, Settings
from framepack_jax.models.packed_video import context_kernels
from framepack_jax.models.params import merge_params
from framepack_jax.training import state
from framepack_jax.training.flow_matching_task import Networks
from framepack_jax.training.validation import conditions_of_clip
from tests.fixtures.loading import ENDPOINT, SYMMETRIC
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_steps import RATE, changed, on, set_up, train_of

TAILS = ("tc_f2k2f1k1_g2", "ta_f2k2f1k1_g2")
IMPORTANCE = "f1k1_x_f2k4f2k2f1k1_g2~hybrid(0.5)"
# Few frames of each kernel, so that clips of nine latents fill all.
RATE_64 = "td_f2k64h1w1f2k16h2w2f2k4h4w4f1k1h8w8_g2"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    return folder, write_dataset(folder, {(32, 48): (9, 9, 9, 11)})


@pytest.mark.parametrize("text", [SYMMETRIC, ENDPOINT, RATE_64, *TAILS, IMPORTANCE])
def test_a_schedule_trains_and_samples(dataset, text: str) -> None:
    folder, clips = dataset
    schedule = packing.parse(text)
    network = {"double_layers": 1, "single_layers": 1, "refiner_layers": 1}
    cfg = changed(schedule=text, network=network | {"context_kernels": context_kernels(schedule)})
    task = set_up(cfg)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.numpy.asarray(0.2 * random.standard_normal(leaf.shape, np.float32)),
        task.model.spec.abstract_params(task.model.cfg),
    )
    now, frozen = state.init_state(cfg, task.model, task.tx, task.mesh, params)
    loader = open_loader(DataConfig(path=str(folder)), schedule, cfg.batch)
    losses = []
    for batch in itertools.islice(loader, 10):
        now, metrics = train_of(cfg)(now, Networks(frozen, {}), on(task, batch), RATE)
        losses += np.asarray(metrics.figures["losses"]).tolist()
    assert np.isfinite(losses).all() and len(losses) == 40
    for new, old in zip(*map(jax.tree.leaves, (now.params, params)), strict=True):
        assert np.abs(new - old).max() > 0

    # Without the mesh of training, as in a bundle that was loaded.
    params = jax.device_put(jax.device_get(merge_params(now.params, frozen)))
    pipe = pipe_of(task, schedule, params)
    settings, record = Settings(steps=1), clips[0]
    inputs = Inputs(
        [conditions_of_clip(pipe, record, task.manifest.text_tokens, 6.0)],
        None,
        {0: np.asarray(record.latents[None, 0], np.float32)},
    )
    sampler.step.clear_cache()
    for sections in (3, 5):
        *_, (_, timeline) = pipe.sample(packing.plan(schedule, sections), inputs, settings)
        assert timeline.known.all() and np.isfinite(timeline.latents).all()
        assert timeline.latents.shape[1] == 1 + 2 * sections
    assert sampler.step._cache_size() == len(packing.pass_frames(schedule))

    # The video of five sections, resumed after two of them.
    plan, whole = packing.plan(schedule, 5), timeline.latents
    resumed = pipe.timeline(plan, inputs.given)
    done = [p for section in plan[:2] for p in section.targets]
    resumed.write(done, whole[:, done])
    *_, (_, timeline) = pipe.sample(plan, inputs, settings, timeline=resumed, done=2)
    np.testing.assert_array_equal(timeline.latents, whole)


def pipe_of(task, schedule: packing.Schedule, params) -> FramePack:
    """The pipeline of a trained network, without encoders and VAE weights."""
    vae = bundle.vae_config(task.manifest)
    mean, std = np.zeros(16, np.float32), np.ones(16, np.float32)
    transformer = Network(task.model.spec, task.model.cfg, params)
    return FramePack(transformer, Network(*vae, None), None, mean, std, schedule)
