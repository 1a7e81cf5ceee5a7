"""A VAE is trained on videos, stopped and gone on with, and becomes part of a bundle."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from framepack_jax import bundle, conditioning
from framepack_jax.cli import train_vae
from framepack_jax.data import vae_clips
from framepack_jax.evaluation import metrics
from framepack_jax.generation.decoding import preview_of
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.models.hunyuan import vae as model
from framepack_jax.models.hunyuan.spec import VAE
from framepack_jax.models.patch_vae import PatchVaeConfig
from framepack_jax.ops.conv import causal_conv3d
from framepack_jax.toy import baselines, world
from framepack_jax.training import checkpoints, trainer, vae_export, vae_losses, vae_task
from framepack_jax.training.config import OptimizerConfig
from framepack_jax.training.vae_config import VaeTrainConfig
from framepack_jax.training.vae_validation import middle_clips, psnr
from scripts import make_toy_bundle
from tests.fixtures.compiling import quick_flags

CONFIG = """
from framepack_jax.training.config import CheckpointConfig, OptimizerConfig
from framepack_jax.training.vae_config import VaeTrainConfig

def get_config():
    return VaeTrainConfig(
        bundle="random", init="scratch",
        network={
            "channels": (4, 8), "layers_per_block": 1, "norm_groups": 2,
            "space_compression": 4, "time_compression": 2,
        },
        frames=5, size=(16, 24), holdout=2, batch=2, steps=8, ema=0.5,
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, weight_decay=0.0),
        validate_every=8, checkpoints=CheckpointConfig(every=4, keep=3), log_every=1,
    )
"""

PATCHES = """
from framepack_jax.training.config import CheckpointConfig, OptimizerConfig
from framepack_jax.training.vae_config import VaeTrainConfig

def get_config():
    return VaeTrainConfig(
        bundle="{bundle}", init="scratch", frames=5, size=(16, 24), holdout=2, batch=2, steps=4,
        error="absolute", gradient_error=0.5, edge_weight=5.0, latent_noise=0.05, ema=0.5,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=2, weight_decay=0.0),
        validate_every=4, checkpoints=CheckpointConfig(every=4), log_every=1,
    )
"""

SPIKES = "--skip-spikes.factor", "1.0001", "--skip-spikes.window", "1"
PATCH_VAE = PatchVaeConfig(latent_channels=8, width=16, blocks=1)
# Of two resolutions, which compile in half the time of four.
SMALL = model.VaeConfig(
    channels=(4, 8), layers_per_block=1, norm_groups=2, space_compression=4, time_compression=2
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Videos, and a configuration."""
    folder = tmp_path_factory.mktemp("vae")
    (folder / "videos").mkdir()
    for number in range(8):
        world.write(folder / "videos", number, 0, 0.5, (32, 32))
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def of_patches(place):
    """A configuration of a VAE of matrix products, which compiles in a third of the time."""
    config = make_toy_bundle.get_config()
    make_toy_bundle.write(dataclasses.replace(config, vae=PATCH_VAE), place / "start")
    (place / "patches.py").write_text(PATCHES.format(bundle=place / "start"))
    return place / "patches.py"


def flags(place, output, *more: str, config: Path | None = None) -> list[str]:
    return ["--config", str(config or place / "config.py"), "--videos", str(place / "videos"),
            "--output", str(output), *more]  # fmt: skip


def run(place, output) -> str:
    """In a process that compiles quickly; what it printed."""
    env = os.environ | {
        "XLA_FLAGS": quick_flags(), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "framepack_jax", "train-vae", *flags(place, output)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(place):
    """A run from its first step to its last."""
    run(place, place / "whole")
    return place / "whole"


def params_of(folder, step: int):
    return checkpoints.restore_params(folder, step, abstract(), "ema")


def abstract():
    return jax.eval_shape(lambda: model.init(SMALL, jax.random.key(0)))


def test_what_is_given_back_comes_nearer(whole) -> None:
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    ratios = [line["psnr"] for line in lines if "psnr" in line]
    assert len(ratios) == 8 and ratios[-1] > ratios[0] + 1
    (held,) = (line for line in lines if "held_out/psnr" in line)
    assert held["held_out/least_psnr"] <= held["held_out/psnr"]
    assert (whole / "validation" / "step_0000008.png").exists()


def test_a_run_that_was_stopped_goes_on_exactly(whole, place, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    # The place of a run is no part of it.
    assert "resumes after step 4" in run(place, tmp_path / "run")
    same = jax.tree.map(np.array_equal, params_of(whole, 8), params_of(tmp_path / "run", 8))
    assert all(jax.tree.leaves(same))
    changed = jax.tree.map(np.array_equal, params_of(whole, 8), params_of(whole, 4))
    assert not any(leaf for leaf in jax.tree.leaves(changed))
    with pytest.raises(SystemExit, match=r"started with other settings \(the optimizer\)"):
        train_vae.main(flags(place, tmp_path / "run", "--optimizer.name", "adafactor"))
    with pytest.raises(
        SystemExit, match=r"started with other settings \(kl = 1e-05 then, 0\.1 now\)"
    ):
        train_vae.main(flags(place, tmp_path / "run", "--kl", "0.1"))
    name = checkpoints.read_record(whole)["videos"][0]
    shutil.copytree(place / "videos", tmp_path / "fewer", ignore=shutil.ignore_patterns(name))
    with pytest.raises(SystemExit, match=rf"1 videos are gone or held out: {name}"):
        train_vae.main(flags(place, tmp_path / "run", "--videos", str(tmp_path / "fewer")))
    shutil.copytree(place / "videos", tmp_path / "more")
    (tmp_path / "more" / "folder.mp4").mkdir()
    pictures = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(5)]
    pictures[0].save(tmp_path / "more" / "a.gif", save_all=True, append_images=pictures[1:])
    with pytest.raises(SystemExit, match=r"more kinds count as .*: a\.gif; move them out"):
        train_vae.main(flags(place, tmp_path / "run", "--videos", str(tmp_path / "more")))
    with pytest.raises(SystemExit, match="holds a run up to step 8"):
        train_vae.main(flags(place, tmp_path / "run", "--resume", "never"))


def test_videos_that_are_gone_end_a_run_before_the_step(
    place, of_patches, tmp_path, monkeypatch
) -> None:
    read, steps = vae_clips.read_clip, []

    def gone_after_two_steps(*args) -> np.ndarray:
        if len(steps) >= 2:
            raise ValueError("the disk is gone")
        return read(*args)

    class CountingBar(trainer.Bar):
        def update(self, n: int = 1) -> None:
            steps.append(n)
            super().update(n)

    monkeypatch.setattr(trainer, "Bar", CountingBar)
    monkeypatch.setattr(vae_clips, "read_clip", gone_after_two_steps)
    monkeypatch.setattr(vae_clips, "KEPT_BYTES", 0)
    with pytest.raises(SystemExit) as left:
        # The limit of the gradient makes it the program of the test of spikes.
        more = "--steps", "60", *SPIKES
        train_vae.main(flags(place, tmp_path / "run", *more, config=of_patches))
    step = max(checkpoints.steps_of(tmp_path / "run"))
    assert str(left.value) == (
        f"error: step {step + 1} has no data: the disk is gone. Once the data can be read, run the"
        f" same command again to resume after step {step}"
    )
    position = tmp_path / "run" / "checkpoints" / str(step) / "data" / "metadata"
    assert json.loads(position.read_text())["global_next_index"] == 2 * step


def test_spikes_are_skipped(place, of_patches, tmp_path) -> None:
    """Steps whose gradient is larger than two steps before."""
    more = "--max-skipped-steps", "99", "--optimizer.learning-rate", "0.3", "--steps", "8"
    train_vae.main(
        flags(place, tmp_path / "run", *SPIKES, *more, "--holdout", "0", config=of_patches)
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in log if "grad_norm" in line]
    norms = [line["grad_norm"] for line in lines]
    skipped = [bool(line["skipped"]) for line in lines]
    larger = [b > 1.0001 * a for a, b in zip(norms, norms[2:], strict=False)]
    assert skipped == [False, False, *larger] and 0 < sum(skipped) < 6


def test_the_bundle_has_the_vae_and_the_spread_of_its_latents(whole, place) -> None:
    made = whole / "bundle"
    manifest = bundle.read_manifest(made)
    spec, cfg = bundle.vae_config(manifest)
    assert cfg == SMALL
    params = bundle.load_params(made, manifest, "vae", dtype=jnp.float32)
    trained = params_of(whole, 8)
    np.testing.assert_allclose(
        params["encoder"]["conv_in"]["kernel"], trained["encoder"]["conv_in"]["kernel"], rtol=1e-2
    )
    found = vae_clips.find_videos(place / "videos", 5, (16, 24))
    train, held = vae_clips.hold_out(found, 2)
    latents = np.concatenate([
        conditioning.clip_latents(
            spec, cfg, params, vae_clips.read_clip(video, (video.frames - 5) // 2, 5)[None],
            manifest.latent_mean, manifest.latent_std,
        )
        for video in train
    ])  # fmt: skip
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, atol=0.05)
    # The other networks are those of the bundle that it began from.
    begun = bundle.read_manifest(bundle.resolve("random"))
    for role in ("transformer", "text_encoder"):
        assert manifest.roles[role].source == begun.roles[role].source
        bundle.load_params(made, manifest, role)
    assert len(held) == 2
    story = manifest.roles["vae"].source["training"]
    assert (story["step"], story["videos"], story["config"]["seed"]) == (8, len(train), 0)
    assert story["metrics"]["held_out/psnr"] > 0


def test_a_patch_vae_starts_from_principal_components(place, of_patches, tmp_path) -> None:
    train_vae.main(flags(place, tmp_path / "run", config=of_patches))
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in log]
    first = next(line for line in found if "psnr" in line)
    # Random weights reconstruct with 5 dB.
    assert first["psnr"] > 20 and first["still_psnr"] > 20
    (held,) = (line for line in found if "held_out/psnr" in line)
    # The bundle reconstructs as well, section by section too.
    made = tmp_path / "run" / "bundle"
    manifest = bundle.read_manifest(made)
    assert bundle.vae_config(manifest)[1] == PATCH_VAE
    pipe = FramePack.open(made, dtype="float32").with_weights(made)
    # A preview of latents has the colours of the clip.
    grey = np.full((1, 16, 24, 3), (200, 40, 90), np.uint8)
    weight, offset = preview_of(pipe)
    colour = (pipe.encode_clip(grey) @ weight + offset).mean((0, 1, 2))
    np.testing.assert_allclose(colour, grey[0, 0, 0] / 127.5 - 1, atol=0.25)
    _, kept = vae_clips.hold_out(vae_clips.find_videos(place / "videos", 5, (16, 24)), 2)
    ratios = [
        metrics.psnr(baselines.reconstructed(pipe, clip[0]), clip[0])
        for clip in middle_clips(kept, 5)
    ]
    np.testing.assert_allclose(np.mean(ratios), held["held_out/psnr"], atol=0.2)


def test_the_stream_of_clips_does_not_depend_on_hosts(place) -> None:
    videos = vae_clips.find_videos(place / "videos", 5, (16, 24))
    alone = vae_clips.Clips(videos, 5, (16, 24), 4, seed=3)
    shares = [vae_clips.Clips(videos, 5, (16, 24), 4, seed=3, share=(i, 2)) for i in range(2)]
    batches = [next(alone) for _ in range(3)]
    assert batches[0].shape == (4, 5, 16, 24, 3) and batches[0].dtype == np.uint8
    for batch in batches:
        parts = [next(share) for share in shares]
        # Shares are taken in strides.
        joined = np.stack(parts, axis=1).reshape(batch.shape)
        assert np.array_equal(joined, batch)
    state = alone.get_state()
    after = next(alone)
    again = vae_clips.Clips(videos, 5, (16, 24), 4, seed=3)
    again.set_state(state)
    assert np.array_equal(next(again), after)
    assert not np.array_equal(after, batches[0])


def test_held_out_videos_stay_when_others_come(place) -> None:
    videos = vae_clips.find_videos(place / "videos", 5, (16, 24))
    few, held = vae_clips.hold_out(videos[:6], 2)
    assert {*few, *held} == set(videos[:6]) and len(held) == 2
    more, _ = vae_clips.hold_out(videos, 4)
    assert len(more) == 4 and not set(more) & set(vae_clips.hold_out(videos, 2)[1])
    with pytest.raises(ValueError, match="--holdout 8 leaves none of 8"):
        vae_clips.hold_out(videos, 8)


def test_noise_ratio_and_divergence() -> None:
    np.testing.assert_allclose(psnr([4.0, 0.04, 0.004]), [0, 20, 30], atol=1e-6)
    params = model.init(SMALL, jax.random.key(0))
    # Latents of mean m and variance s for every clip: (m^2 + s - 1 - log s) / 2.
    params["encoder"]["quant"]["kernel"] *= 0
    bias = np.repeat([0.5, np.log(2.0)], 16)
    params["encoder"]["quant"]["bias"] = jnp.asarray(bias, jnp.float32)
    clips, key = jnp.zeros((1, 5, 8, 8, 3)), jax.random.key(1)
    found = vae_losses.losses(VAE, SMALL, VaeTrainConfig(), params, clips, key)
    np.testing.assert_allclose(found.kl, (0.25 + 2 - 1 - np.log(2)) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "40", "40"], "has 15 frames of 32x32"),
        (["--frames", "17"], r"clips of 17 frames"),
        (["--holdout", "8"], "--holdout 8 leaves none"),
        (["--init", "bundle"], "--init scratch"),
        (["--init", "nowhere"], "nowhere has no checkpoint"),
        (["--bundle", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named(place, tmp_path, more, message) -> None:
    with pytest.raises(SystemExit, match=message):
        train_vae.main(flags(place, tmp_path / "new", *more))
    assert not (tmp_path / "new" / "run.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 6}, r"--frames 6: expected 1 \+ 4 k"),
        ({"size": (20, 16)}, r"--size \(20, 16\): expected multiples of 8"),
        ({"batch": 0}, "--batch 0"),
        ({"ema": 1.0}, "--ema 1"),
        ({"kl": -1.0}, "--kl -1"),
        ({"trainable": "encoder"}, "--trainable encoder: expected one of all, decoder"),
    ],
)
def test_impossible_settings_are_named(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        VaeTrainConfig(**fields)


def test_a_folder_without_videos_is_named(place, tmp_path) -> None:
    with pytest.raises(SystemExit, match="has no videos"):
        train_vae.main(flags(place, tmp_path / "new", "--videos", str(tmp_path)))
    with pytest.raises(SystemExit, match=r"give --videos \(.*, --bundle \(.*, --output \("):
        train_vae.main([])


def test_a_vae_of_single_frames_takes_a_clip_frame_by_frame() -> None:
    """Inflated, a convolution gives of each frame of a clip what it gave of that frame alone."""
    clip = jax.random.normal(jax.random.key(0), (2, 5, 6, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 4))
    params = {"conv": {"kernel": kernel, "bias": jnp.ones(4)}, "qkv": {"kernel": jnp.ones((3, 4))}}
    made = vae_task.inflated(params)
    assert jax.tree.structure(made) == jax.tree.structure(params)
    np.testing.assert_array_equal(made["qkv"]["kernel"], params["qkv"]["kernel"])
    whole = causal_conv3d(clip, made["conv"]["kernel"], made["conv"]["bias"])
    for number in range(5):
        alone = causal_conv3d(clip[:, number : number + 1], kernel, jnp.ones(4))
        np.testing.assert_allclose(whole[:, number : number + 1], alone, rtol=1e-4, atol=1e-4)


def test_only_a_run_of_single_frames_is_inflated(whole, tmp_path) -> None:
    """A run of clips, taken as it is; and one that says that it was of single frames."""
    shutil.copytree(whole, tmp_path / "single")
    record = checkpoints.read_record(whole)
    record["config"]["frames"] = 1
    checkpoints.write_record(tmp_path / "single", record)
    manifest = bundle.read_manifest(bundle.resolve("random"))
    trained = params_of(whole, 8)["encoder"]["conv_in"]["kernel"]
    for folder, changed in ((whole, False), (tmp_path / "single", True)):
        cfg = VaeTrainConfig(network=record["config"]["network"], init=str(folder), frames=5)
        spec, network = vae_task.network_of(cfg, manifest)
        begun = vae_task.first_params(cfg, spec, network, manifest, bundle.resolve("random"))
        kernel = np.asarray(begun["encoder"]["conv_in"]["kernel"])
        assert (np.abs(kernel[:-1]).max() == 0) == changed
        np.testing.assert_allclose(kernel.sum(0), trained.sum(0), rtol=1e-5, atol=1e-6)
        still = vae_task.first_params(
            dataclasses.replace(cfg, frames=1), spec, network, manifest, bundle.resolve("random")
        )
        np.testing.assert_array_equal(still["encoder"]["conv_in"]["kernel"], trained)


def test_a_decoder_alone_leaves_latents_as_they_are(whole, place, tmp_path) -> None:
    """No update of the encoder, also by weight decay; and the bundle's statistics are kept."""
    cfg = VaeTrainConfig(trainable="decoder", optimizer=OptimizerConfig("muon", weight_decay=0.1))
    params = model.init(SMALL, jax.random.key(0))
    tx = vae_task.transformation(cfg)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params, learning_rate=1e-3)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates["encoder"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(updates["decoder"]))

    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    record = checkpoints.read_record(whole)
    record["config"] |= {"trainable": "decoder", "init": "bundle"}
    checkpoints.write_record(tmp_path / "run", record)
    vae_export.export(f"{tmp_path / 'run'}@8", whole / "bundle", str(tmp_path / "made"))
    begun, made = (bundle.read_manifest(path) for path in (whole / "bundle", tmp_path / "made"))
    assert (made.latent_mean, made.latent_std) == (begun.latent_mean, begun.latent_std)
