"""Runs that are stopped anywhere and gone on with: nothing is lost, and nothing becomes different.

A chain is one run that is stopped at a point, resumed and stopped at the next one, until it is
finished. Encoders of mp4 may give other bytes each time, so latents and the frames that are encoded
are compared bit for bit, and videos as they decode.
"""

import json
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.cli import resume
from tests.fixtures import stopped_run
from tests.fixtures.paths import ROOT
from tests.fixtures.stopped_run import Ended, Stop

PHOTO = ROOT / "examples" / "astronaut.jpg"
SIZE = ("--height", 64, "--width", 80)
INVERTED = ("--schedule", "f1k1_x_g2_f1k1f2k2f16k4_td")
FORWARD = ("--schedule", "f1k1_x_f16k4f2k2f1k1_g2")
SHORT = ("--sections", 3, "--steps", 2)
STEP = "framepack_jax.diffusion.sampler.step"
AFTER_STEP = "framepack_jax.jobs.progress.Progress.step"
FRAME = "framepack_jax.video.mp4._yuv"
EXIT_CODES = {SIGINT: 130, SIGTERM: 143, SIGKILL: -SIGKILL}
LUMA = (0.2126, 0.7152, 0.0722)
# What encoding changes in the luma of a frame, in the mean, of 0 .. 255: less than what most frames
# differ by from the next.
ENCODED_ALIKE = 6.0

# Inverted: section 1 has no final frames, section 2 gives frames 17 to 24, section 3 the rest.
INVERTED_STOPS = [
    Stop(SIGINT, STEP, 2),
    Stop(SIGTERM, AFTER_STEP, 1, after=True),
    Stop(SIGKILL, "section_000.npz"),
    Stop(SIGKILL, "section_000.npz", after=True),
    Stop(SIGINT, "section_001.npz"),
    Stop(SIGTERM, FRAME, 3),
    Stop(SIGKILL, "frames_00000017.mp4"),
    Stop(SIGKILL, "video.mp4"),
    Stop(SIGKILL, STEP, 2),
    Stop(SIGKILL, "run.json"),
    # The record has the last frames already, video.mp4 has not.
    Stop(SIGKILL, "run.json", after=True),
    Stop(SIGTERM, "video.mp4"),
    Stop(SIGKILL, "video.mp4", after=True),
    Stop(SIGTERM, "preview.png"),
    Stop(SIGINT, "run.json"),
    Stop(SIGKILL, "run.json"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder of what processes share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def forward(shared, tmp_path_factory) -> Path:
    """A finished run of three sections."""
    return finished(shared, tmp_path_factory.mktemp("forward"), *flags_of(FORWARD))


def flags_of(schedule: tuple[object, ...], *flags: object) -> tuple[object, ...]:
    return "--bundle", "random", "--image", PHOTO, *SIZE, *SHORT, *schedule, *flags


def finished(shared: Path, folder: Path, *flags: object) -> Path:
    """The folder of a run that nothing stops."""
    ended = stopped_run.run(shared, None, *flags, "--output", folder)
    assert ended.code == 0, ended.stderr
    return folder


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def latents_of(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.load(file)["latents"] for file in (folder / "latents").glob("*.npz")}


def made_frames(folder: Path) -> np.ndarray:
    """The frames (P, height, width, 3) that the encoder was given, by time."""
    return np.concatenate([np.load(file) for file in sorted(folder.glob("segments/*.npy"))])


def check_stopped(folder: Path, stop: Stop, ended: Ended, whole: Path) -> None:
    """All that is there is right, and what the program said is so."""
    assert ended.code == EXIT_CODES[stop.signal], (stop, ended)
    expected = latents_of(whole)
    for name, latents in latents_of(folder).items():
        np.testing.assert_array_equal(latents, expected[name], err_msg=f"{stop} {name}")
    check_video(folder, stop)
    if stop.signal != SIGKILL:
        assert record_of(folder)["status"] == "interrupted", stop
        assert f"framepack resume {folder}" in ended.stderr and "Traceback" not in ended.stderr, (
            stop
        )
        assert not list(folder.rglob(f"{stop.at}.part")), stop


def check_video(folder: Path, stop: Stop) -> None:
    """Whatever video is there is playable, and has all frames of some segments."""
    if (folder / "video.mp4").exists():
        frames, _ = video.read_mp4(folder / "video.mp4")
        segments = [video.mp4_info(s).frames for s in (folder / "segments").glob("*.mp4")]
        assert 0 < len(frames) <= sum(segments), stop


def check_same(folder: Path, whole: Path) -> None:
    """A run that was stopped is what an uninterrupted one is."""
    record, expected = record_of(folder), record_of(whole)
    assert record["status"] == "finished"
    assert record["spans"] == expected["spans"] and record["frames"] == expected["frames"]
    latents, others = latents_of(folder), latents_of(whole)
    assert latents.keys() == others.keys() and len(latents) > record["sections"]
    for name in latents:
        np.testing.assert_array_equal(latents[name], others[name], err_msg=name)
    made = made_frames(folder)
    np.testing.assert_array_equal(made, made_frames(whole))
    frames, fps = video.read_mp4(folder / "video.mp4")
    assert len(frames) == len(made) == record["frames"] and fps == record["flags"]["fps"]
    assert np.abs((frames - made.astype(float)) @ LUMA).mean(axis=(1, 2)).max() < ENCODED_ALIKE
    assert (folder / "preview.png").exists()
    assert not list(folder.rglob("*.part"))


def stop_and_resume(shared: Path, folder: Path, whole: Path, stops: list[Stop]) -> None:
    """Go on with a run from stop to stop, and then to its end."""
    for stop in stops:
        ended = stopped_run.run(shared, stop, folder, command=resume)
        check_stopped(folder, stop, ended, whole)
    ended = stopped_run.run(shared, None, folder, command=resume)
    assert ended.code == 0, ended.stderr
    check_same(folder, whole)


def test_a_run_stopped_before_its_record_is_begun_again(shared, tmp_path) -> None:
    flags = *flags_of(INVERTED), "--output", tmp_path
    ended = stopped_run.run(shared, Stop(SIGKILL, "known.npz"), *flags)
    assert ended.code == -SIGKILL and record_of(tmp_path)["status"] == "beginning"
    assert list(tmp_path.rglob("*.part"))
    ended = stopped_run.run(shared, None, tmp_path, command=resume)
    assert ended.code == 1 and "was stopped before its inputs were saved" in ended.stderr
    ended = stopped_run.run(shared, Stop(SIGINT, "run.json", 2), *flags)
    assert ended.code == 130 and "framepack resume" not in ended.stderr
    assert not list(tmp_path.rglob("*.part"))


def test_inverted_run_stopped_at_every_point(shared, tmp_path) -> None:
    whole = finished(shared, tmp_path / "whole", *flags_of(INVERTED))
    folder, stop = tmp_path / "stopped", INVERTED_STOPS[0]
    ended = stopped_run.run(shared, stop, *flags_of(INVERTED), "--output", folder)
    check_stopped(folder, stop, ended, whole)
    stop_and_resume(shared, folder, whole, INVERTED_STOPS[1:])
    ended = stopped_run.run(shared, None, folder, command=resume)
    assert ended.code == 0 and "already finished" in ended.stdout


def test_forward_run(shared, forward, tmp_path) -> None:
    stop = Stop(SIGKILL, STEP, 3)
    ended = stopped_run.run(shared, stop, *flags_of(FORWARD), "--output", tmp_path)
    check_stopped(tmp_path, stop, ended, forward)
    stops = [Stop(SIGINT, FRAME, 2), Stop(SIGKILL, "video.mp4", 2)]
    stop_and_resume(shared, tmp_path, forward, stops)


@pytest.mark.parametrize("schedule", [INVERTED, FORWARD], ids=["inverted", "forward"])
def test_extended_run(shared, forward, tmp_path, schedule) -> None:
    flags = "--bundle", "random", *schedule, *SIZE, *SHORT, "--extend", forward / "video.mp4"
    whole, folder = finished(shared, tmp_path / "whole", *flags), tmp_path / "stopped"
    stop = Stop(SIGKILL, "section_001.npz")
    ended = stopped_run.run(shared, stop, *flags, "--output", folder)
    check_stopped(folder, stop, ended, whole)
    stop_and_resume(shared, folder, whole, [Stop(SIGTERM, "run.json", 2, after=True)])


def test_batch_stopped_between_the_latents_of_its_videos(shared, tmp_path) -> None:
    jobs = [{"name": name, "prompt": name, "seed": i} for i, name in enumerate("ab")]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(json.dumps(job) for job in jobs))
    flags = *flags_of(FORWARD), "--jobs", file, "--batch", 2
    whole, folder = finished(shared, tmp_path / "whole", *flags), tmp_path / "stopped"
    flags_here = *flags, "--output", folder
    # The first video is begun, the second is not yet.
    ended = stopped_run.run(shared, Stop(SIGINT, "known.npz", 2), *flags_here)
    assert ended.code == 130 and ended.stderr.count("framepack resume") == 1, ended
    assert record_of(folder / "a")["status"] == "interrupted"
    assert record_of(folder / "b")["status"] == "beginning"
    ended = stopped_run.run(shared, Stop(SIGKILL, "section_001.npz", after=True), *flags_here)
    assert ended.code == -SIGKILL
    saved = [sorted(file.name for file in (folder / name / "latents").iterdir()) for name in "ab"]
    assert len(saved[0]) == len(saved[1]) + 1
    finished(shared, folder, *flags)
    for name in "ab":
        check_same(folder / name, whole / name)
