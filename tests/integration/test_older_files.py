"""Files written by the program before its modules, fields and flags were renamed still open.

`tests/fixtures/before_house` holds them, with the numbers that the older program computed from
them. Another processor may round differently, so floating-point numbers are compared within 1e-4.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from framepack_jax import bundle, packing, video
from framepack_jax.cli import decode, prepare, resume
from framepack_jax.data import loader
from framepack_jax.data.config import DataConfig
from framepack_jax.parallel import sharding
from framepack_jax.training import export, flow_matching_task, vae_task
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import (
    CheckpointConfig,
    HistoryConfig,
    LoRAConfig,
    NoiseSchedule,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from framepack_jax.training.trainer import Trainer
from framepack_jax.training.vae_config import VaeTrainConfig
from tests.fixtures.paths import ROOT

OLDER = ROOT / "tests" / "fixtures" / "before_house"
INVERTED = "f1k1_x_g2_f1k1f2k2f16k4_td"


@pytest.fixture
def older(tmp_path, monkeypatch) -> Path:
    """A copy of the files, as working directory: training runs name the rest by relative paths."""
    folder = tmp_path / "older"
    shutil.copytree(OLDER, folder)
    # What version control does not keep: empty folders, the place and the times of the videos.
    (folder / "inverted" / "segments").mkdir(exist_ok=True)
    first, *rest = (folder / "dataset/videos.jsonl").read_text().splitlines()
    for video_line in map(json.loads, rest):
        time_ns = video_line["stamp"][1]
        os.utime(folder / "videos" / video_line["video"], ns=(time_ns, time_ns))
    first = json.dumps({"listing": str(folder / "videos")})
    (folder / "dataset/videos.jsonl").write_text("\n".join([first, *rest]) + "\n")
    monkeypatch.chdir(folder)
    return folder


def test_bundle(older) -> None:
    manifest = bundle.read_manifest("bundle")
    assert list(manifest.roles) == [
        "transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder"
    ]  # fmt: skip
    expected = json.loads(Path("expected/bundle.json").read_text())
    for role, sums in expected.items():
        leaves = jax.tree.leaves(bundle.load_params("bundle", manifest, role, dtype=np.float32))
        np.testing.assert_allclose(sorted(float(abs(x).sum()) for x in leaves), sums, rtol=1e-5)


@pytest.mark.parametrize("name", ["inverted", "extended"])
def test_interrupted_video(older, name) -> None:
    """The rest of the sections have the latents that the older program gave them."""
    resume.main([name, "--bundle", "bundle"])
    record = json.loads(Path(name, "run.json").read_text())
    assert record["status"] == "finished"
    for file in sorted(Path("expected", name).glob("*.npz")):
        expected, found = np.load(file), np.load(Path(name, "latents", file.name))
        np.testing.assert_array_equal(found["positions"], expected["positions"])
        np.testing.assert_allclose(found["latents"], expected["latents"], rtol=1e-4, atol=1e-4)
    frames, fps = video.read_mp4(Path(name, "video.mp4"))
    assert len(frames) == record["frames"] and fps == 24


def test_finished_video(older, capsys) -> None:
    """It needs no more work, and its latents are decoded again."""
    frames, _ = video.read_mp4("finished/video.mp4")
    resume.main(["finished", "--bundle", "bundle"])
    assert "already finished" in capsys.readouterr().out
    Path("finished/video.mp4").unlink()
    decode.main(["finished", "--bundle", "bundle"])
    again, _ = video.read_mp4("finished/video.mp4")
    assert len(again) == len(frames)
    assert np.abs(again.astype(float) - frames).mean() < 1


def test_dataset(older) -> None:
    """Training reads the same samples in the same order."""
    cfg = DataConfig(path="dataset", holdout=1, seed=5, sections="random", caption_dropout=0.5)
    opened = loader.open_loader(cfg, packing.parse(INVERTED), 2, (0, 1))
    expected = json.loads(Path("expected/samples.json").read_text())
    for batch, digests in zip(itertools.islice(opened, len(expected)), expected, strict=True):
        leaves = map(np.asarray, jax.tree.leaves(batch))
        found = {hashlib.sha256(leaf.tobytes()).hexdigest() for leaf in leaves}
        assert found.issuperset(digests)


def test_dataset_is_complete(older) -> None:
    """Preparing it again with the same settings encodes no clip."""
    clips = {file: file.stat().st_mtime_ns for file in Path("dataset/clips").rglob("*.rec")}
    flags = (
        "--videos videos --bundle bundle --output dataset --buckets 32x48 --scene-threshold 1"
        " --min-motion 0 --min-sharpness 0 --max-still 1 --min-seconds 1 --keep-duplicates"
    )
    prepare.main(flags.split())
    assert clips == {f: f.stat().st_mtime_ns for f in Path("dataset/clips").rglob("*.rec")}
    assert len(clips) == 3


def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(fsdp=1)


def lines_of(log: Path) -> dict[int, dict[str, float]]:
    """The numbers of a log by step."""
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, log.read_text().splitlines()):
        found[line["step"]] = found.get(line["step"], {}) | line
    return found


def check_losses(name: str, said: list[str]) -> None:
    """The run went on, to the losses that the older program had at its last steps."""
    assert any("resumes after step" in line for line in said)
    expected, found = map(lines_of, (Path("expected", f"{name}.jsonl"), Path(name, "log.jsonl")))
    assert list(found) == [1, 2, 3, 4, 5, 6]
    numbers = ("loss", "psnr", "still_psnr", "kl", "grad_norm", "learning_rate")
    for step, line in expected.items():
        compared = [key for key in numbers if key in line]
        assert len(compared) >= 3
        for key in compared:
            np.testing.assert_allclose(found[step][key], line[key], rtol=1e-4)


def test_training(older) -> None:
    cfg = TrainConfig(
        bundle="bundle", output="train", init="scratch",
        network={"heads": 1, "double_layers": 1, "single_layers": 1, "refiner_layers": 1,
                 "mlp_ratio": 2.0},
        schedule=INVERTED,
        data=DataConfig(path="dataset", holdout=1, sections="random", caption_dropout=0.1),
        batch=2, grad_accum_steps=2, steps=6, seed=3,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, schedule="cosine"),
        noise_schedule=NoiseSchedule(distribution="uniform", mu=1.0, stratified=False),
        history=HistoryConfig(corrupt=0.1, clean=0.0, corrupt_mode="sample"),
        guidance=3.0, ema=0.9, ema_warmup=False, dtype="float32", remat="none",
        max_skipped_steps=5,
        validation=ValidationConfig(every=0), checkpoints=CheckpointConfig(every=3, keep=1),
        log_every=1, tensorboard=False,
    )  # fmt: skip
    said: list[str] = []
    newer = dataclasses.replace(cfg, noise_schedule=NoiseSchedule("uniform"), ema_warmup=True)
    with pytest.raises(RunError) as error:
        Trainer(flow_matching_task.open_task(newer, cfg.bundle, mesh()), said.append).fit()
    assert (
        "train was started with other settings (ema_warmup = False then, True now;"
        " noise_schedule.mu = 1.0 then, None now; noise_schedule.stratified = False then, True now)"
    ) in str(error.value)
    assert Trainer(flow_matching_task.open_task(cfg, cfg.bundle, mesh()), said.append).fit() == 6
    check_losses("train", said)


def test_training_of_lora(older) -> None:
    cfg = TrainConfig(
        bundle="bundle", output="lora", trainable="lora", lora=LoRAConfig(rank=1, alpha=2.0),
        schedule=INVERTED, data=DataConfig(path="dataset", holdout=1), batch=2, steps=6,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        noise_schedule=NoiseSchedule(stratified=False), dtype="float32", remat="none",
        validation=ValidationConfig(every=0), checkpoints=CheckpointConfig(every=3, keep=1),
        log_every=1, tensorboard=False,
    )  # fmt: skip
    said: list[str] = []
    assert Trainer(flow_matching_task.open_task(cfg, cfg.bundle, mesh()), said.append).fit() == 6
    check_losses("lora", said)


def test_training_of_vae(older) -> None:
    cfg = VaeTrainConfig(
        videos="videos", bundle="bundle", output="vae", init="scratch",
        network={"channels": (4, 8), "layers_per_block": 1, "norm_groups": 2,
                 "space_compression": 4, "time_compression": 2},
        frames=5, size=(16, 24), holdout=1, batch=2, steps=6, ema=0.5, ema_warmup=False,
        max_skipped_steps=5,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, weight_decay=0.0),
        validate_every=6, checkpoints=CheckpointConfig(every=3, keep=1), log_every=1,
    )  # fmt: skip
    said: list[str] = []
    assert Trainer(vae_task.open_task(cfg, cfg.bundle, mesh()), said.append).fit() == 6
    check_losses("vae", said)


@pytest.mark.parametrize("name", ["train", "lora"])
def test_training_run_becomes_a_bundle(older, name) -> None:
    """From a checkpoint of the older program."""
    export.export(name, "exported", "bundle")
    assert any(Path("exported").iterdir())
