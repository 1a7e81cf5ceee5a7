"""Videos of a small Helios model by the command line: from text, an image and a video."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.cli import resume, sample
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.diffusion import sampler
from framepack_jax.generation.options import VideoOptions
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.settings import Settings
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.paths import GOLDEN

HELIOS = GOLDEN / "helios"
SCHEDULE = "f1k1_x_f16k4f2k2f1k1_g3"
SIZE = {"height": 64, "width": 128}
# Frames of a section of 3 latents that is decoded alone.
SECTION = 9


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("helios") / "bundle"
    make_bundle(BundleRequest(output=str(output), pipeline=HELIOS / "pipeline", schedule=SCHEDULE))
    return output


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    pipeline = shutil.copytree(HELIOS / "pipeline", folder / "pipeline")
    shutil.copy(HELIOS / "model_index_distilled.json", pipeline / "model_index.json")
    shutil.copy(HELIOS / "scheduler_distilled" / "scheduler_config.json", pipeline / "scheduler")
    output = folder / "bundle"
    make_bundle(BundleRequest(output=str(output), pipeline=pipeline, schedule=SCHEDULE))
    return output


def flags_of(bundle: Path, output: Path, **options: object) -> list[str]:
    options = {"prompt": "waves", "steps": 2, "sections": 2, **SIZE, **options}
    flags = [f"--bundle={bundle}", f"--output={output}"]
    return flags + [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if value is not None
    ]


def make(bundle: Path, output: Path, **options: object) -> RunDir:
    sample.main(flags_of(bundle, output, **options))
    return RunDir.open(output)


def frames_of(run: RunDir) -> np.ndarray:
    return np.stack(list(video.read_frames(run.folder / "video.mp4")))


def test_from_text(bundle, tmp_path) -> None:
    """The command makes what the pipeline makes, with the settings of the bundle by default."""
    run = make(bundle, tmp_path / "run", cfg_scale=None)
    flags = run.record["flags"]
    assert (flags["cfg_scale"], flags["fps"]) == (5.0, 24.0)
    assert flags["negative_prompt"].startswith("Bright tones, overexposed")
    assert frames_of(run).shape == (2 * SECTION, 64, 128, 3)
    pipe = FramePack.load(bundle)
    made = pipe(
        None, "waves", settings=Settings(steps=2, cfg_scale=5.0), sections=2, **SIZE,
        negative_prompt=flags["negative_prompt"],
    )  # fmt: skip
    latents = run.latents()
    np.testing.assert_array_equal(made.latents, np.stack([latents[p] for p in range(6)]))
    assert Settings.of(pipe.sampling) == Settings(steps=50, cfg_scale=5.0)


def test_a_stopped_run_goes_on_exactly(bundle, tmp_path, monkeypatch) -> None:
    options = {"image": HELIOS / "image.png", "cfg_scale": 1.0, "sections": 3}
    whole = make(bundle, tmp_path / "whole", **options)
    save = RunDir.save_section

    def stopped(run: RunDir, number: int, *section: object) -> None:
        if number == 1:
            raise KeyboardInterrupt
        save(run, number, *section)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(RunDir, "save_section", stopped)
        make(bundle, tmp_path / "run", **options)
    run = RunDir.open(tmp_path / "run")
    assert 0 < len(run.latents()) < len(whole.latents())
    resume.main([str(run.folder)])
    latents, expected = RunDir.open(run.folder).latents(), whole.latents()
    assert latents.keys() == expected.keys()
    for position, value in expected.items():
        np.testing.assert_array_equal(latents[position], value)
    # Latents of the image and of its still, noised by the seed, are no part of the video.
    assert set(whole.known()) == {0, 1} and min(expected) == 0
    assert frames_of(run).shape[0] == 3 * SECTION


def test_an_extended_video_keeps_its_frames(bundle, tmp_path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, 8, 3), np.uint8)
    source = tmp_path / "source.mp4"
    shades = [np.kron(np.roll(frames, i, 1), np.ones((16, 16, 1), np.uint8)) for i in range(23)]
    video.write_mp4(source, shades, fps=24)
    run = make(bundle, tmp_path / "run", extend=source, cfg_scale=1.0)
    made = frames_of(run)
    assert len(made) == 23 + 2 * SECTION == run.record["frames"]
    kept = np.stack(list(video.read_frames(source)))
    # They are encoded once more.
    assert np.abs(made[:23].astype(int) - kept).mean() < 6
    # The anchor and two sections of the source, of which 5 frames at the start are not used.
    assert sorted(run.known()) == list(range(1 + 2 * 3))
    again = make(
        bundle, tmp_path / "again", extend=run.folder, cfg_scale=1.0, height=None, width=None
    )
    assert again.record["frames"] == len(made) + 2 * SECTION


@pytest.mark.parametrize(("name", "programs"), [("bundle", 1), ("distilled", 3)])
def test_fifty_sections_run_the_programs_of_one(name: str, programs: int, request) -> None:
    """One program for each stage, whatever a section reads: nothing, less than all, or all."""
    pipe = FramePack.load(request.getfixturevalue(name))
    options = VideoOptions(sections=50, **SIZE)
    asked, layout = options.prepare(pipe.geometry, None, "waves")
    settings = Settings(steps=1)
    inputs = pipe.encode([asked], layout, settings)
    sampler.step.clear_cache()
    made = [section for section, _ in pipe.sample(layout.plan, inputs, settings)]
    assert len(made) == 50 and sampler.step._cache_size() == programs
    assert layout.frames == 50 * SECTION


def test_prompts_change_between_sections(bundle, tmp_path) -> None:
    timed = "0s: waves 0.4s: a red sofa"
    run = make(bundle, tmp_path / "timed", prompt=timed, cfg_scale=1.0, prompt_blend=0.0)
    plain = make(bundle, tmp_path / "plain", cfg_scale=1.0)
    changed, before = run.latents(), plain.latents()
    np.testing.assert_array_equal(changed[0], before[0])
    assert np.abs(changed[5] - before[5]).max() > 1e-3


def test_videos_of_a_batch_are_those_alone(bundle, tmp_path) -> None:
    flags = flags_of(bundle, tmp_path / "both", cfg_scale=1.0, sections=1, batch=2)
    sample.main([*flags, "--seed", "1", "2"])
    alone = make(bundle, tmp_path / "alone", cfg_scale=1.0, sections=1, seed=2)
    [run] = [
        RunDir.open(file.parent)
        for file in (tmp_path / "both").glob("*/run.json")
        if json.loads(file.read_text())["flags"]["seed"] == 2
    ]
    for position, value in alone.latents().items():
        np.testing.assert_allclose(run.latents()[position], value, atol=1e-5)


def test_a_pyramid_samples_multiples_of_64_and_cuts(distilled, tmp_path) -> None:
    with pytest.warns(UserWarning, match="--sampler has no effect: .* by renoise"):
        run = make(distilled, tmp_path / "run", steps=None, height=96, width=96, sampler="euler")
    assert run.record["canvas"] == [128, 128] and run.record["flags"]["steps"] == 2
    assert frames_of(run).shape == (2 * SECTION, 96, 96, 3)
    assert (run.folder / "preview.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_frame": f"0.2s={HELIOS / 'image.png'}"}, "decodes each section by itself"),
        ({"end_image": HELIOS / "image.png"}, "decodes each section by itself"),
        ({"step_cache": "tea"}, "no polynomial is fitted to this network; use first-block"),
        ({"schedule": "g3", "image": HELIOS / "image.png"}, "makes videos of text alone"),
        ({"schedule": "f1k1_x_g3_f1k1f2k2f16k4_td"}, "only sections in forward order"),
    ],
)
def test_what_cannot_be_given_is_refused_by_name(bundle, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        make(bundle, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
