"""The commands as a person types them: convert_weights.py, sample.py, framepack."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from framepack_jax import FramePack, __main__, bundle, packing, video
from framepack_jax.cli import sample
from framepack_jax.generation import pipeline
from framepack_jax.generation.crossfade import to_uint8
from framepack_jax.jobs.run_dir import RunDir
from scripts import make_toy_bundle
from tests.fixtures.paths import ROOT

PHOTO = ROOT / "examples" / "astronaut.jpg"


def command(script: str, *flags: str) -> str:
    """Run a root script; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def photo_run(golden, tmp_path_factory):
    """A photograph at a true 480p bucket: PyTorch weights -> bundle -> mp4, all by command."""
    folder = tmp_path_factory.mktemp("photo")
    weights = golden / "diffusers_pipeline" / "pipeline"
    schedule = "f1k1_x_g1_f1k1f2k2f16k4_td"
    command(
        "convert_weights.py", "--pipeline", str(weights), "--output", str(folder / "bundle"),
        "--schedule", schedule,
    )  # fmt: skip
    printed = command(
        "sample.py", "--bundle", str(folder / "bundle"), "--image", str(PHOTO),
        "--prompt", "The astronaut smiles", "--sections", "1", "--steps", "2", "--seed", "7",
        "--fps", "24", "--output", str(folder / "run"),
    )  # fmt: skip
    return folder / "bundle", folder / "run", printed


@pytest.mark.golden
def test_the_mp4_is_what_was_asked_for(photo_run) -> None:
    _, output, printed = photo_run
    with av.open(output / "video.mp4") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 24
    # 1 section of 1 latent: 1 + 4 frames. A square photo takes the 640 x 608 bucket.
    assert np.shape(frames) == (5, 640, 608, 3)
    assert "5 frames" in printed and "peak memory" in printed and "s a frame" in printed
    with Image.open(output / "preview.png") as preview:
        assert min(preview.size) > 300


@pytest.mark.golden
def test_the_record_tells_how_to_repeat_it(photo_run) -> None:
    bundle_path, output, _ = photo_run
    record = json.loads((output / "run.json").read_text())
    assert record["flags"]["seed"] == 7 and record["flags"]["bundle"] == str(bundle_path)
    assert (record["frames"], record["height"], record["width"]) == (5, 640, 608)
    assert record["schedule"] == "f1k1_x_g1_f1k1f2k2f16k4_td" and record["order"] == "inverted"
    assert {"jax", "flax", "framepack-jax"} <= set(record["versions"])
    assert record["timings"]["seconds_per_frame"] > 0


@pytest.mark.golden
def test_frames_are_those_of_the_saved_latents(photo_run, tmp_path) -> None:
    """As far from them as the codec brings them, and no further."""
    bundle_path, output, _ = photo_run
    saved, record = RunDir.open(output).latents(), RunDir.open(output).record
    latents = np.stack([saved[position] for position in (0, 1)])[None]
    pipe = FramePack.load(bundle_path, dtype="float32")
    spec, cfg, params = pipe.vae
    z = jnp.asarray(latents * pipe.latent_std + pipe.latent_mean)
    decoded = np.asarray(to_uint8(spec.decode(cfg, params, z)))[0]
    flags = record["flags"]
    video.write_mp4(tmp_path / "again.mp4", decoded, fps=flags["fps"], crf=flags["crf"])

    def distance(file: Path) -> np.ndarray:
        frames = video.read_mp4(file)[0]
        return np.abs(frames - decoded.astype(float)).mean(axis=(1, 2, 3))

    codec, ours = distance(tmp_path / "again.mp4"), distance(output / "video.mp4")
    # The encoder's threads leave it some freedom.
    assert (ours <= 1.1 * codec).all(), (ours, codec)


def test_the_random_bundle_makes_the_same_video_again(tmp_path) -> None:
    """The embedded bundle from Python, twice, and streamed."""
    pipe = FramePack.load(
        bundle.BUILTIN_BUNDLES["random"], schedule=packing.parse("f1k1_x_f16k4f2k2f1k1_g2")
    )
    image = video.load_image(PHOTO)
    options = {"sections": 2, "height": 64, "width": 48, "seed": 1}
    options["settings"] = pipeline.Settings(steps=2)
    made = pipe(image, "The astronaut smiles", **options)
    assert made.frames.shape == (17, 64, 48, 3) and made.frames.dtype == np.uint8
    assert made.latents.shape == (5, 8, 6, 16)
    spans = list(pipe.stream(image, "The astronaut smiles", **options))
    assert [span.positions for span in spans] == [(0, 1, 2), (3, 4)]
    np.testing.assert_array_equal(np.concatenate([s.frames for s in spans]), made.frames)
    np.testing.assert_array_equal(np.concatenate([s.latents for s in spans]), made.latents)
    other = pipe(image, "The astronaut smiles", **{**options, "seed": 2})
    assert np.abs(other.latents - made.latents).max() > 0.1


def test_the_random_bundle_is_that_of_its_config() -> None:
    manifest = bundle.read_manifest(bundle.BUILTIN_BUNDLES["random"])
    config = make_toy_bundle.get_config()
    for role in bundle.ROLES:
        assert bundle.role_config(manifest, role)[1] == getattr(config, role)
    assert str(manifest.schedule) == config.schedule


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--bundle", "nowhere"], "nowhere is not a bundle"),
        (["--steps", "0"], "steps = 0"),
        (["--crf", "0"], "crf is 0"),
        (["--seconds", "nan"], "seconds = nan"),
        (["--height", "101", "--width", "64"], "height = 101"),
        (["--height", "8", "--width", "64"], "height = 8"),
        (["--batch", "0"], "batch = 0"),
        (["--step-cache", "tea", "--cache-threshold", "-1"], "-1"),
        (["--cache-threshold", "0.2"], "cache_threshold = 0.2"),
        (["--extend", "nowhere.mp4"], "exclude each other"),
        (["--distilled-guidance", "nan"], "distilled_guidance = nan"),
        (["--attention", "cudnn"], "'cudnn' runs on gpu, this is a cpu"),
        (["--attention", "splash"], "'splash' runs on tpu, this is a cpu"),
        (["--schedule", "f1k1_g9+E"], "+E"),
        (["--schedule", "td_f16k4f2k2f1k1_g9_x_f1k1@planned"], "planned(4)"),
        (["--schedule", "f1k1_x_f16k8f2k2f1k1_g2"], "k8"),
        (["--schedule", "g9"], "reads no context"),
        (["--vae-tile", "100"], "size 100"),
        (["--sections", "0"], "sections = 0"),
        (["--seed", "-2"], "seed = -2"),
        (["--seed", str(2**64)], f"seed = {2**64}"),
    ],
)
def test_errors_are_one_line_that_names_the_value(tmp_path, flags, named) -> None:
    base = {"--bundle": "random", "--image": str(PHOTO), "--prompt": "", "--output": "run"}
    base |= {"--output": str(tmp_path / "run"), "--height": "64", "--width": "64"}
    base |= dict(zip(flags[::2], flags[1::2], strict=True))
    with pytest.raises(SystemExit) as error:
        sample.main([part for pair in base.items() for part in pair])
    assert str(error.value).startswith("error: ") and named in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_finished_run_is_not_lost(tmp_path) -> None:
    (tmp_path / "run.json").write_text("{}")
    flags = ["--bundle", "random", "--image", str(PHOTO), "--prompt", "", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"run.json cannot be read"):
        sample.main(flags)
    with pytest.raises(SystemExit, match="sections = -1"):
        sample.main([*flags, "--overwrite", "--sections", "-1"])
    assert (tmp_path / "run.json").exists()


def test_commands_are_listed(capsys) -> None:
    __main__.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sample", "convert", "explain"))
    with pytest.raises(SystemExit, match="'sampel'"):
        __main__.main(["sampel"])
    with pytest.raises(SystemExit):
        __main__.main(["sample", "--help"])
    assert "--distilled-guidance" in capsys.readouterr().out


def test_compiled_programs_are_kept_for_the_next_run(tmp_path) -> None:
    """In the user's cache folder, unless JAX is told another or none."""
    program = "import jax; from framepack_jax.cli import common; common.enable_compilation_cache();"
    program += "print(jax.config.jax_compilation_cache_dir)"

    def run(program: str, **env: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        env = inherited | {"JAX_ENABLE_COMPILATION_CACHE": "1", "HOME": str(tmp_path)} | env
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def folder(**env: str) -> str:
        return run(program, **env).stdout.strip()

    assert folder(XDG_CACHE_HOME="") == str(tmp_path / ".cache" / "framepack-jax" / "compiled")
    cache = str(tmp_path / "c")
    assert folder(XDG_CACHE_HOME=cache) == f"{cache}/framepack-jax/compiled"
    assert folder(JAX_COMPILATION_CACHE_DIR="/mine") == "/mine"
    assert folder(JAX_ENABLE_COMPILATION_CACHE="0") == "None"
    # A user without HOME and without an entry in passwd, and a home that cannot be written.
    nobody = "import os, pwd; del os.environ['HOME']; pwd.getpwuid = {}.__getitem__;"
    for ran in (run(nobody + program, XDG_CACHE_HOME=""), run(program, XDG_CACHE_HOME="/proc")):
        assert ran.stdout.strip() == "None"
        assert "compiled programs are not kept for the next run" in ran.stderr
        assert ran.stderr.count("\n") == 1
