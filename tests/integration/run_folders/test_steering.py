"""Prompts that are given while a video is sampled."""

import shutil

import numpy as np
import pytest
from etils import epath

from framepack_jax.cli import resume
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.jobs.runner import make_all
from framepack_jax.jobs.spec import ComputeOptions, JobOptions, ModelOptions, VideoSpec
from framepack_jax.jobs.task_setup import TaskMaker
from tests.fixtures.run_folders import (
    HEIGHT,
    INVERTED,
    PHOTO,
    WIDTH,
    assert_same_latents,
    make,
)

WAVES, BOWS = "she waves", "she bows"


def spec(**options) -> VideoSpec:
    size = {"height": HEIGHT, "width": WIDTH}
    return VideoSpec(prompt=WAVES, image=PHOTO, sections=3, steps=2, seed=0, **size, **options)


def steered(pipe: FramePack, folders: dict, begin: int) -> list[RunDir]:
    """Sample a batch; give each video its prompt once `begin` sections of the first are there."""
    model = ModelOptions(bundle="random", schedule=INVERTED)
    maker = TaskMaker(pipe, model, ComputeOptions(), JobOptions(), alone=False)
    tasks = [maker.make(spec(), epath.Path(folder)) for folder in folders]
    first = tasks[0].run.folder / "latents"

    def given(prompts: list[str]):
        return lambda: prompts if len(list(first.glob("section_*.npz"))) >= begin else []

    for task, prompts in zip(tasks, folders.values(), strict=True):
        task.steering = given(prompts)
    errors = [error for _, error in make_all(pipe, tasks, len(tasks))]
    assert errors == [None] * len(tasks)
    return [task.run for task in tasks]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> RunDir:
    return make(tmp_path_factory.mktemp("plain") / "run", "--prompt", WAVES, "--sections", 3)


@pytest.fixture(scope="module")
def run(pipe, tmp_path_factory) -> RunDir:
    """A run that is steered before its second section."""
    return steered(pipe, {tmp_path_factory.mktemp("steered") / "run": ["no", BOWS]}, 1)[0]


def test_the_last_prompt_leads_the_next_section_and_those_after_it(run, plain, tmp_path) -> None:
    """Sections of the inverted order are made from the end: the first two, of 0.27 s each, are
    steered, so the video is one of a timed prompt."""
    assert run.record["steered"] == [[1, "no"], [1, BOWS]]
    timed = make(
        tmp_path / "timed", "--prompt", f"0s: {BOWS} 0.6s: {WAVES}", "--sections", 3,
        "--prompt-blend", 0,
    )  # fmt: skip
    assert_same_latents(run, timed)
    ours, before = run.latents(), plain.latents()
    same = [np.array_equal(ours[position], before[position]) for position in sorted(before)]
    assert same == [True, False, False, False, False, True, True]


def test_a_steered_run_is_resumed_with_its_prompts(run, tmp_path) -> None:
    """From the first section that is steered, and from one before it."""
    for lost in ({2}, {0, 1, 2}):
        again = tmp_path / f"without_{len(lost)}"
        shutil.copytree(run.folder, again)
        for number in lost:
            (again / "latents" / f"section_{number:03d}.npz").unlink()
        RunDir.open(epath.Path(again)).write_record(status="begun", spans=[])
        resume.main([str(again)])
        assert_same_latents(RunDir.open(epath.Path(again)), run)


def test_a_prompt_that_comes_before_the_start_leads_all(pipe, tmp_path) -> None:
    early, other = steered(pipe, {tmp_path / "early": [BOWS], tmp_path / "other": []}, 0)
    assert early.record["steered"] == [[0, BOWS]] and "steered" not in other.record
    expected = make(tmp_path / "expected", "--prompt", BOWS, "--sections", 3)
    for position, latents in expected.latents().items():
        np.testing.assert_allclose(early.latents()[position], latents, atol=2e-5)
    assert not np.allclose(other.latents()[1], expected.latents()[1], atol=1e-3)
