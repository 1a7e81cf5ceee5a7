"""Sampling, datasets and bundles in an object store, or on a disk that cannot rename folders:
make test-storage."""

import itertools

import numpy as np
import pytest
from etils import epath

from framepack_jax import bundle, packing
from framepack_jax.__main__ import main as framepack
from framepack_jax.cli import decode, resume
from framepack_jax.data import records
from framepack_jax.data.config import DataConfig
from framepack_jax.data.loader import open_loader
from framepack_jax.data.records import VideoSource
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.utils import storage
from tests.fixtures.loading import INVERTED, bits
from tests.fixtures.preparing import fake_encoder, run, scene_frames, write_video  # noqa: F401
from tests.fixtures.run_folders import assert_same_latents, command, frames_of, make
from tests.fixtures.training_data import write_dataset

pytestmark = pytest.mark.storage


@pytest.fixture
def store(request) -> epath.Path:
    """A place where folders cannot be renamed."""
    return epath.Path(request.getfixturevalue(request.param))


FILES = pytest.mark.parametrize("store", ["bucket", "s3_bucket", "mount"], indirect=True)
ARRAYS = pytest.mark.parametrize("store", ["bucket", "mount"], indirect=True)


@FILES
def test_a_video_is_stopped_resumed_and_decoded_again(store, tmp_path, monkeypatch) -> None:
    """It is that of a disk, bit for bit."""
    local, output, save = (
        make(tmp_path / "local", "--sections", 2),
        store / "video",
        RunDir.save_section,
    )

    def stopped(run: RunDir, number: int, *more) -> None:
        if number == 1:
            raise KeyboardInterrupt
        save(run, number, *more)

    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "save_section", stopped)
        with pytest.raises(SystemExit):
            command(output, "--sections", 2)
    made = RunDir.open(output)
    assert made.record["status"] == "interrupted" and not (output / "video.mp4").exists()
    resume.main([str(output)])
    made = RunDir.open(output)
    assert made.record["status"] == "finished"
    assert_same_latents(made, local)
    assert made.spans() == 2
    frames = frames_of(made)
    assert frames.shape == frames_of(local).shape
    (output / "video.mp4").unlink()
    decode.main([str(output)])
    # The encoder divides its work as cores are free: equal frames give files that differ a little.
    apart = np.abs(frames_of(made).astype(int) - frames)
    assert apart.mean() < 3
    with pytest.raises(SystemExit, match="already holds a run with these flags"):
        command(output, "--sections", 2)
    command(output, "--sections", 1, "--overwrite")
    assert len(list((output / "latents").iterdir())) == 2


def contents(folder: epath.Path) -> list[bytes]:
    """All that training reads of a dataset."""
    index = records.read_index(folder)
    source = VideoSource(folder, index.shards)
    empty = (array.tobytes() for array in records.read_empty(folder, index))
    return [*(records.pack(source[n]) for n in range(len(source))), *empty]


@FILES
def test_a_dataset_is_prepared_grows_and_is_packed_again(
    store,
    tmp_path,
    fake_encoder,  # noqa: F811
) -> None:
    """It is that of a disk; nothing is encoded twice."""
    (tmp_path / "videos").mkdir()
    for number in range(2):
        write_video(tmp_path / "videos" / f"{number}.mp4", scene_frames(number, 2.0))
    more = (["--min-seconds", "1"], ["--min-seconds", "2.5"], ["--no-keep-clips"])
    for number, flags in enumerate(more, 2):
        for place in (tmp_path / "local", store / "dataset"):
            assert run(tmp_path / "videos", place, *flags) is not None
        assert contents(store / "dataset") == contents(tmp_path / "local")
        files = {file.name for file in (store / "dataset").iterdir()}
        assert files == {file.name for file in (tmp_path / "local").iterdir()}
        write_video(tmp_path / "videos" / f"{number}.mp4", scene_frames(number, 3.0))
    assert fake_encoder.calls == 2 * 4 and "clips" not in files


@FILES
def test_a_dataset_there_is_mixed_with_one_of_a_disk(store, tmp_path) -> None:
    """The batches are those of two on a disk."""
    places = tmp_path / "first", tmp_path / "second", store / "second"
    for place in places:
        write_dataset(place, {(32, 48): (3, 5) if place.name == "first" else (4, 6, 7)})

    def batches(second) -> list[bytes]:
        cfg = DataConfig(path=(str(places[0]), str(second)), weights=(1, 3))
        loader = open_loader(cfg, packing.parse(INVERTED), 2)
        return [bits(batch) for batch in itertools.islice(loader, 8)]

    assert batches(places[2]) == batches(places[1])


@ARRAYS
def test_a_bundle_is_converted_verified_and_evaluated(store, tmp_path) -> None:
    """With the encoders of another bundle there."""
    storage.copy_tree(bundle.resolve("random"), store / "random")
    file, new = str(tmp_path / "vae.safetensors"), str(store / "new")
    framepack(["export", file, "--bundle", str(store / "random"), "--role", "vae"])
    convert = ["convert", "--vae", file, "--encoders-from", str(store / "random"), "--output", new]
    framepack(convert)
    framepack(["verify", file, new])
    with pytest.raises(SystemExit, match="holds a bundle"):
        framepack(convert)
    framepack([*convert, "--overwrite"])
    manifest = bundle.read_manifest(new)
    bundle.check_present(new)
    names = list(bundle.stored_dtypes(new, manifest, "vae"))
    for root in (new, bundle.resolve("random")):
        assert names == list(bundle.stored_dtypes(root, bundle.read_manifest(root), "vae"))
    framepack([
        "evaluate", "--bundle", new, "--output", str(tmp_path / "report"), "--videos", "1",
        "--seconds", "0.3", "--occlusion-videos", "0", "--prompt-pairs", "0", "--steps", "1",
        "--size", "64x64",
    ])  # fmt: skip
    assert (tmp_path / "report" / "report.md").exists()


def test_a_bundle_there_refers_to_no_disk(bucket, tmp_path) -> None:
    with pytest.raises(SystemExit, match="lies on a disk, and a bundle in gs://"):
        framepack(["convert", "--vae", str(tmp_path), "--encoders-from", "random",
                   "--output", f"{bucket}/new"])  # fmt: skip
