"""Settings in the video, frames as pictures, and videos that are folders of pictures."""

import json

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.cli import inspect
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.paths import ROOT
from tests.fixtures.run_folders import F1, PHOTO, frames_of, make, watch_encoder


@pytest.fixture(scope="module")
def pictured(tmp_path_factory) -> tuple[RunDir, dict[int, np.ndarray]]:
    """A run with --png, and the frames that were encoded."""
    with pytest.MonkeyPatch.context() as patched:
        given = watch_encoder(patched)
        folder = tmp_path_factory.mktemp("pictured") / "run"
        run = make(folder, "--png", "--sections", 3, "--prompt", "she waves", schedule=F1)
    return run, given


def test_pictures_are_the_frames_without_loss(pictured) -> None:
    run, given = pictured
    made = np.concatenate([given[start] for start in sorted(given)])
    files = sorted((run.folder / "frames").iterdir())
    assert [file.name for file in files] == [f"frame_{i:06d}.png" for i in range(25)]
    np.testing.assert_array_equal([video.load_image(file) for file in files], made)


def test_the_video_says_how_it_was_made(pictured, capsys) -> None:
    run, _ = pictured
    tags = video.read_tags(run.folder / "video.mp4")
    assert tags["title"] == "she waves"
    settings = json.loads(tags["comment"])
    expected = {"prompt": "she waves", "steps": 2, "seed": 0, "schedule": F1, "bundle": "random"}
    assert expected.items() <= settings.items() and settings["image"] == PHOTO.name
    assert str(ROOT) not in tags["comment"], "a path of this machine is in the file"
    inspect.main([str(run.folder / "video.mp4")])
    shown = capsys.readouterr().out
    assert "schedule" in shown and F1 in shown and settings["weights"] in shown


def test_a_video_of_another_program_is_said_to_have_no_settings(tmp_path) -> None:
    video.write_mp4(tmp_path / "plain.mp4", np.zeros((3, 64, 64, 3), np.uint8), 30)
    with pytest.raises(SystemExit, match=r"plain.mp4 has no settings of framepack-jax"):
        inspect.main([str(tmp_path / "plain.mp4")])


def test_a_folder_of_pictures_is_continued(pictured, tmp_path) -> None:
    """As the frames themselves: the first ones of the new video are these pictures."""
    run, given = pictured
    flags = ("--extend", run.folder / "frames", "--sections", 1, "--height", 64, "--width", 48)
    more = make(tmp_path / "more", *flags, schedule=F1, image=False)
    assert more.record["frames"] == 25 + 8 and len(frames_of(more)) == 33
    made = np.concatenate([given[start] for start in sorted(given)])
    for number, frame in enumerate(frames_of(more)[:9]):
        apart = np.abs(frame.astype(int) - made).mean((1, 2, 3))
        assert np.argmin(apart) == number


def test_a_folder_without_pictures_is_named(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SystemExit, match=r"it is no run folder, and a folder of frames needs"):
        make(tmp_path / "out", "--extend", tmp_path, image=False)
