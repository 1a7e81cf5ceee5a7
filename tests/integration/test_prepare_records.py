"""Records of a real bundle: the same after a kill, by several processes, and in training."""

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import bundle, conditioning, packing, video
from framepack_jax.data import (
    fingerprint,
    loader,
    pixel_batch,
    precompute,
    ray_backend,
    records,
    scenes,
)
from framepack_jax.data.config import DataConfig
from framepack_jax.data.records import DatasetError, VideoSource
from framepack_jax.data.rejected import Rejected
from framepack_jax.toy import world
from tests.fixtures.compiling import quick_flags
from tests.fixtures.hosts import ended, launch
from tests.fixtures.paths import ROOT
from tests.fixtures.preparing import SETTINGS, hashes, run, scene_frames, write_video


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Videos, and the dataset that the random bundle makes of them, uninterrupted."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "videos").mkdir()
    for number in range(5):
        scene = world.scene(0, number)
        frames = scene_frames(number, 1.7)
        write_video(folder / "videos" / f"{number}.mp4", frames, caption=scene.caption)
    run(folder / "videos", folder / "whole")
    return folder


def command(folder: Path, output: str) -> list[str]:
    return [
        "-m", "framepack_jax", "prepare", "--videos", str(folder / "videos"), "--bundle", "random",
        "--output", str(folder / output), "--buckets", "32x48,48x32",
    ]  # fmt: skip


def test_killed_and_gone_on_with_it_is_the_same_to_the_byte(real) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *command(real, "killed")], env=env, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list(real.glob("killed/clips/*.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (real / "killed" / records.INDEX).exists()
    done = set(real.glob("killed/clips/*.json"))
    assert 2 <= len(done) < 5
    times = {file: file.stat().st_mtime_ns for file in done}
    run(real / "videos", real / "killed")
    assert {file: file.stat().st_mtime_ns for file in done} == times
    assert hashes(real / "killed") == hashes(real / "whole")


def test_two_processes_make_the_same(real, tmp_path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    started = launch(
        folders,
        *command(real, "two"),
        "--coordinator-address",
        "localhost:{port}",
        "--num-processes",
        "2",
        devices=None,
    )
    for code, _, err in ended(started):
        assert code == 0, err[-2000:]
    assert hashes(real / "two") == hashes(real / "whole")


def test_all_devices_of_a_host_make_what_one_makes(real) -> None:
    """Each of four encodes clips. (As there are more threads for four devices of a CPU, which round
    differently, the one is of the same process.)"""
    script = (
        "import sys, jax\n"
        "from framepack_jax.cli.prepare import main\n"
        "devices = jax.local_devices()\n"
        "for count in (1, 4):\n"
        "    jax.local_devices = lambda: devices[:count]\n"
        "    main([*sys.argv[1:-1], f'{sys.argv[-1]}_{count}'])\n"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(4)}
    _, _, *flags = command(real, "devices")[1:]
    given = [*flags, "--output", str(real / "devices")]
    done = subprocess.run(
        [sys.executable, "-c", script, *given], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (counts,) = re.findall(r"encoded   5 clips on 4 devices: (.*)", done.stdout)
    assert sorted(map(int, counts.split(", "))) == [1, 1, 1, 2]
    assert hashes(real / "devices_4") == hashes(real / "devices_1")


def test_records_are_what_sampling_encodes(real) -> None:
    """The start latent, the conditions, and the latents of the clip, by the functions of sampling
    and the VAE itself."""
    index = records.read_index(real / "whole")
    record = VideoSource(real / "whole", index.shards)[0]
    manifest = bundle.read_manifest(bundle.resolve("random"))
    fingerprint.check_bundle(index, manifest)
    encoder = precompute.Encoder.load(bundle.resolve("random"), manifest, pixels=False)
    file = Path(record.clip.source)
    frames = np.stack(list(video.read_frames(real / "videos" / file, 30)))[: record.clip.frames]
    frames = np.stack([video.resize_center_crop(f, 32, 48) for f in frames])
    text, valid, pooled = conditioning.encode_prompt(encoder.encoders, [record.clip.caption])
    count = int(valid.sum())
    bf16 = records.BFLOAT16
    np.testing.assert_array_equal(record.text, np.asarray(text)[0, :count].astype(bf16))
    np.testing.assert_array_equal(record.pooled, np.asarray(pooled)[0].astype(bf16))
    image = np.asarray(conditioning.encode_image(encoder.encoders, frames[:1]))[0]
    np.testing.assert_array_equal(record.image, image.astype(bf16))
    spec, cfg, params = encoder.vae
    start = conditioning.start_latent(*encoder.vae, frames[:1], encoder.mean, encoder.std)
    np.testing.assert_array_equal(record.latents[0], np.asarray(start)[0, 0].astype(bf16))
    moments = spec.encode(cfg, params, jnp.asarray(frames[None] / 127.5 - 1, jnp.float32))
    expected = (np.asarray(moments[0])[0] - encoder.mean) / encoder.std
    assert len(record.latents) == 1 + (record.clip.frames - 1) // 4 == len(expected)
    np.testing.assert_allclose(
        np.asarray(record.latents[1:], np.float32), expected[1:], atol=0.02 * np.abs(expected).max()
    )


def test_pixels_are_read_in_training_and_encoded_in_the_step(real, tmp_path) -> None:
    """Frames of windows are those of the prepared clip, and what the step makes of a window that
    begins the clip is what the encoder makes of these frames."""
    output = tmp_path / "pixels"
    run(real / "videos", output, "--mode", "pixels")
    schedule = "f1k1_x_g2_f1k1f2k2f16k4_td"
    opened = loader.open_loader(DataConfig(path=str(output)), packing.parse(schedule), 4)
    batch = next(opened)
    assert isinstance(batch, pixel_batch.PixelBatch) and batch.frames.shape[1] == 1 + 4 * 21
    source = VideoSource(output, opened.datasets[0].index.shards)
    encoder = precompute.Encoder.load(
        bundle.resolve("random"), bundle.read_manifest(bundle.resolve("random")), pixels=False
    )
    for i in range(4):
        clip = source[batch.meta.clip[i]].clip
        assert source[batch.meta.clip[i]].latents is None
        (cut,) = scenes.clips(real / "videos" / Path(clip.source), SETTINGS)
        np.testing.assert_array_equal(batch.start_frame[i, 0], cut.frames[0])
        # Clips here are shorter than a window: all of it, and then the last frame again.
        count = len(cut.frames)
        np.testing.assert_array_equal(batch.frames[i, :count], cut.frames)
        assert (batch.frames[i, count:] == cut.frames[-1]).all()

    def encoded(frames: jax.Array) -> jax.Array:
        pictures = np.round((np.asarray(frames) + 1) * 127.5).astype(np.uint8)
        return jnp.asarray(
            conditioning.clip_latents(*encoder.vae, pictures, encoder.mean, encoder.std)
        )

    made = pixel_batch.to_batch(batch, encoded)
    whole = encoder.latents(batch.frames[0])
    for j, at in enumerate(batch.target_at[0]):
        expected = whole[int(at) - pixel_batch.WINDOW + 1]
        difference = np.asarray(made.target[0, j], np.float32) - expected
        assert np.abs(difference).max() < 0.02 * np.abs(whole).max()
    assert made.context.kernels == batch.kernels
    (real / "videos" / "moved").mkdir()
    try:
        for file in (real / "videos").glob("*.mp4"):
            shutil.move(file, real / "videos" / "moved")
        missing = (
            r"5 of the 5 videos of .* missing or changed: .*0\.mp4 \(No such file.* and 1 more"
        )
        with pytest.raises(DatasetError, match=missing):
            loader.open_loader(DataConfig(path=str(output)), packing.parse(schedule), 4)
        for number in (0, 1, 2, 4):
            name = f"{number}.mp4"
            shutil.copy(real / "videos" / "moved" / name, real / "videos")
        (real / "videos" / "3.mp4").write_bytes(b"another")
        changed = r"1 of the 5 videos of .*3\.mp4 \(7 bytes, \d+ when it was prepared\); put them"
        with pytest.raises(DatasetError, match=changed):
            loader.open_loader(DataConfig(path=str(output)), packing.parse(schedule), 4)
    finally:
        for file in (real / "videos" / "moved").glob("*.mp4"):
            file.replace(real / "videos" / file.name)
        (real / "videos" / "moved").rmdir()


def test_clips_from_a_cluster_are_those_of_threads(tmp_path) -> None:
    """The rows that travel between nodes, without the cluster."""
    file = write_video(tmp_path / "a.mp4", [*scene_frames(0, 1.0), *scene_frames(1, 1.0)])
    (tmp_path / "b.mp4").write_text("no video")
    fields = dataclasses.asdict(SETTINGS)
    whole = {"number": 0, "start": 0.0, "end": math.inf}
    rows = ray_backend.clip_rows(whole | {"path": str(file)}, fields)
    for ours, theirs in zip(
        ray_backend.cuts(iter(rows)), scenes.clips(file, SETTINGS), strict=True
    ):
        assert (ours.first, ours.scores) == (theirs.first, theirs.scores)
        np.testing.assert_array_equal(ours.frames, theirs.frames)
    rows = ray_backend.clip_rows(whole | {"path": str(tmp_path / "b.mp4")}, fields)
    with pytest.raises(Rejected, match="cannot be read"):
        list(ray_backend.cuts(iter(rows)))
