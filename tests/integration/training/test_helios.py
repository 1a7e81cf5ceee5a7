"""Train a small Helios: dataset in chunks, history dropout, resume, export, and refusals."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from framepack_jax import bundle, video
from framepack_jax.cli import convert, export, prepare, sample, train
from framepack_jax.conversion import lora as conversion_lora
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.data import fingerprint, records
from framepack_jax.data.precompute import Encoder
from framepack_jax.data.records import DatasetError, VideoSource
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.paths import GOLDEN
from tests.fixtures.preparing import scene_frames, write_video
from tests.fixtures.training_runs import log_of, state_of

HELIOS = GOLDEN / "helios"
SCHEDULE = "f1k1_x_f16k4f2k2f1k1_g3"
SIZE = (64, 128)
# Frames of a section of 3 latents that is encoded alone.
SECTION = 9
HISTORY = ("--history.drop-all", "0.4", "--history.drop-oldest", "0.4", "--history.corrupt", "0.3")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A bundle, three videos of 24 frames a second, one of them too short, and their dataset."""
    folder = tmp_path_factory.mktemp("helios")
    request = BundleRequest(
        output=str(folder / "bundle"), pipeline=HELIOS / "pipeline", schedule=SCHEDULE
    )
    make_bundle(request)
    (folder / "videos").mkdir()
    for number, seconds in enumerate((0.75, 1.0, 0.2)):
        file = folder / "videos" / f"{number}.mp4"
        write_video(file, scene_frames(number, seconds, *SIZE), fps=24)
    prepare.main(prepare_flags(folder, folder / "dataset"))
    return folder


def prepare_flags(place: Path, output: Path, *more: str) -> list[str]:
    return [
        "--videos", str(place / "videos"), "--bundle", str(place / "bundle"), "--output",
        str(output), "--buckets", "64x128", "--min-seconds", "0.3", "--keep-duplicates", *more,
    ]  # fmt: skip


def train_flags(place: Path, output: Path, *more: str) -> list[str]:
    return [
        "--bundle", str(place / "bundle"), "--data.path", str(place / "dataset"), "--output",
        str(output), "--batch", "2", "--steps", "2", "--dtype", "float32", "--remat", "none",
        "--validation.every", "0", "--log-every", "1", "--no-tensorboard",
        "--optimizer.warmup-steps", "0", *more,
    ]  # fmt: skip


def test_clips_are_encoded_in_the_chunks_that_sampling_decodes(place) -> None:
    index = records.read_index(place / "dataset")
    manifest = bundle.read_manifest(place / "bundle")
    assert (index.fps, index.chunk, index.text_tokens) == (24.0, 3, manifest.text_tokens)
    rejected = (place / "dataset" / "rejected.jsonl").read_text()
    assert "too_short" in rejected and "at least 9 are needed" in rejected
    source = VideoSource(place / "dataset", index.shards)
    found = sorted((source[n] for n in range(len(source))), key=lambda record: record.clip.source)
    assert [record.clip.frames for record in found] == [2 * SECTION, 3 * SECTION]
    encoder = Encoder.load(place / "bundle", manifest, pixels=False)
    for record in found:
        assert record.pooled is None and record.image is None
        file = place / "videos" / Path(record.clip.source).name
        frames = np.stack(list(video.read_frames(file, 24)))
        for i in range(record.clip.frames // SECTION):
            # Alone: the latents of a chunk do not depend on the others.
            alone = encoder.latents(frames[i * SECTION : (i + 1) * SECTION])
            stored = np.asarray(record.latents[3 * i : 3 * i + 3], np.float32)
            np.testing.assert_allclose(stored, alone, atol=0.01 * np.abs(alone).max())
    with pytest.raises(SystemExit, match="--mode pixels: this bundle encodes each section"):
        prepare.main(prepare_flags(place, place / "pixels", "--mode", "pixels"))


def test_a_run_resumes_exactly_and_its_bundle_is_sampled(place, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(train_flags(place, whole, *HISTORY))
    train.main(train_flags(place, parts, *HISTORY, "--steps", "1", "--no-export"))
    train.main(train_flags(place, parts, *HISTORY))
    losses = [log_of(whole)[step]["loss"] for step in (1, 2)]
    assert np.isfinite(losses).all() and losses == [log_of(parts)[s]["loss"] for s in (1, 2)]
    for a, b in zip(state_of(whole, 2), state_of(parts, 2), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(SystemExit, match="history"):
        train.main(train_flags(place, whole, "--steps", "3"))
    made = sampled(whole / "bundle", tmp_path / "video")
    frames = list(video.read_frames(made.folder / "video.mp4"))
    assert len(frames) == 2 * SECTION


def test_adapters_are_trained_and_sampled_with(place, tmp_path) -> None:
    """By default they adapt all linear layers of the blocks; the embeddings of context are trained
    in full beside them."""
    run = tmp_path / "run"
    lora = ("--trainable", "lora", "--lora.rank", "2", "--lora.context")
    train.main(train_flags(place, run, *HISTORY, *lora, "--optimizer.learning-rate", "0.01"))
    manifest = bundle.read_manifest(place / "bundle")
    cfg = bundle.denoiser_config(manifest)[1]
    read = conversion_lora.read(run / "bundle" / "lora.safetensors", cfg)
    linear = {path for path, leaf in leaves_of(place).items() if is_linear_of_a_block(path, leaf)}
    assert read.lora.keys() == linear and len(linear) == 7 * cfg.layers
    before, after = leaves_of(place), leaves_of(run)
    for path, leaf in before.items():
        if not path.startswith("embed/context_"):
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)
        elif path.endswith("bias"):
            # Half of the learning rate, and more than is rounded.
            assert np.abs(after[path].astype(np.float32) - leaf).max() > 5e-3, path
    plain, embedded, adapted = (
        sampled(folder / "bundle", tmp_path / name, *more).latents()
        for name, folder, more in (
            ("plain", place, ()),
            ("embedded", run, ()),
            ("adapted", run, (f"--lora={run}",)),
        )
    )
    # The first section reads no context, which takes part in attention all the same.
    assert np.abs(embedded[3] - plain[3]).max() > 1e-3
    assert np.abs(adapted[0] - embedded[0]).max() > 1e-3
    target = tmp_path / "transformer"
    export.main([str(target), "--bundle", str(run / "bundle"), "--dtype", "float32"])
    convert.main([
        "--transformer", str(target), "--encoders-from", str(place / "bundle"),
        "--output", str(tmp_path / "again" / "bundle"), "--schedule", SCHEDULE,
    ])  # fmt: skip
    again = leaves_of(tmp_path / "again")
    for path, leaf in after.items():
        np.testing.assert_array_equal(again[path], leaf.astype(np.float32), err_msg=path)


def leaves_of(place: Path) -> dict[str, np.ndarray]:
    """All parameters of the transformer in a bundle, layer by layer."""
    manifest = bundle.read_manifest(place / "bundle")
    names = bundle.stored_dtypes(place / "bundle", manifest, "transformer")
    return dict(bundle.read_leaves(place / "bundle", manifest, "transformer", list(names)))


def is_linear_of_a_block(path: str, leaf: np.ndarray) -> bool:
    return path.startswith("blocks/") and path.endswith("/kernel") and leaf.ndim > 1


def sampled(folder: Path, output: Path, *more: str) -> RunDir:
    """A video of two sections."""
    sample.main([
        f"--bundle={folder}", f"--output={output}", "--prompt=waves", "--steps=2", "--sections=2",
        "--height=64", "--width=128", "--cfg-scale=1", *more,
    ])  # fmt: skip
    return RunDir.open(output)


def test_validation_samples_from_text(place, tmp_path) -> None:
    run = tmp_path / "run"
    train.main(train_flags(
        place, run, "--steps", "1", "--data.holdout", "1", "--validation.every", "1", "--no-export",
        "--validation.samples", "2", "--validation.steps", "2", "--validation.sigmas", "0.5",
    ))  # fmt: skip
    figures = log_of(run)[1]
    assert np.isfinite(figures["validation/loss"]) and "context/k4_blank" in figures
    assert not any("loss_of" in name for name in figures)  # as there is one dataset
    (shown,) = (run / "validation").rglob("0.mp4")
    frames = list(video.read_frames(shown))
    assert len(frames) == 2 * SECTION and frames[0].shape == (2 * SIZE[0], SIZE[1], 3)


def test_what_does_not_fit_is_refused(place, tmp_path) -> None:
    index = records.read_index(place / "dataset")
    manifest = bundle.read_manifest(place / "bundle")
    fingerprint.check_bundle(index, manifest)
    other = dataclasses.replace(index, fps=30.0, chunk=0)
    with pytest.raises(DatasetError, match=r"frames a second 30, 24; latent frames .* 0, 3 in"):
        fingerprint.check_bundle(other, manifest)
    with pytest.raises(SystemExit, match=r"--data.text-tokens 8: this network reads captions with"):
        train.main(train_flags(place, tmp_path / "run", "--data.text-tokens", "8"))
    pipeline = shutil.copytree(HELIOS / "pipeline", tmp_path / "pipeline")
    shutil.copy(HELIOS / "model_index_distilled.json", pipeline / "model_index.json")
    shutil.copy(HELIOS / "scheduler_distilled" / "scheduler_config.json", pipeline / "scheduler")
    distilled = tmp_path / "distilled"
    make_bundle(BundleRequest(output=str(distilled), pipeline=pipeline, schedule=SCHEDULE))
    staged = ("--bundle", str(distilled), "--trainable", "lora")
    with pytest.raises(SystemExit, match=r"--trainable lora: the bundle is sampled in 3 stages"):
        train.main(train_flags(place, tmp_path / "run", *staged))
