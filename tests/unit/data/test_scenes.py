"""Videos are cut at scene changes, resampled and cropped."""

import dataclasses
import itertools

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.data import filters, probe, scenes
from framepack_jax.data.rejected import Rejected
from tests.fixtures.preparing import SETTINGS, scene_frames, write_video


def test_a_scene_ends_where_the_picture_changes(tmp_path) -> None:
    parts = [scene_frames(n, 1.0) for n in (0, 1, 2)]
    file = write_video(tmp_path / "a.mp4", itertools.chain(*parts))
    cuts = list(scenes.clips(file, SETTINGS))
    assert [cut.first for cut in cuts] == [0, 30, 60]
    assert [len(cut.frames) for cut in cuts] == [29, 29, 29]
    whole = list(scenes.clips(file, dataclasses.replace(SETTINGS, cut=1.0)))
    assert [len(cut.frames) for cut in whole] == [89]


def test_motion_is_no_cut() -> None:
    for number in range(8):
        frames = [filters.small_picture(frame) for frame in scene_frames(number, 1.0)]
        assert not any(scenes.is_cut(a, b, SETTINGS.cut) for a, b in itertools.pairwise(frames))


def test_long_scenes_are_divided(tmp_path) -> None:
    file = write_video(tmp_path / "a.mp4", scene_frames(0, 3.0))
    cuts = list(scenes.clips(file, dataclasses.replace(SETTINGS, max_frames=41)))
    assert [(cut.first, len(cut.frames)) for cut in cuts] == [(0, 41), (41, 41), (82, 5)]


def test_clips_are_resampled_by_time_and_cropped(tmp_path) -> None:
    frames = scene_frames(3, 2.0)
    slow = write_video(tmp_path / "slow.mp4", frames[::2], fps=15)
    (cut,) = scenes.clips(slow, SETTINGS)
    assert cut.frames.shape == (57, 32, 48, 3)
    shown = [video.resize_center_crop(frame, 32, 48) for frame in video.read_frames(slow)]
    for k in range(57):
        np.testing.assert_array_equal(cut.frames[k], shown[k // 2])


@pytest.mark.parametrize("turned", [False, True])
def test_a_clip_goes_to_the_bucket_of_its_shape(tmp_path, turned) -> None:
    size = (96, 64) if turned else (64, 96)
    file = write_video(tmp_path / "a.mp4", scene_frames(0, 1.0, *size))
    (cut,) = scenes.clips(file, SETTINGS)
    assert cut.frames.shape[1:3] == ((48, 32) if turned else (32, 48))


def test_two_hours_are_streamed(tmp_path, monkeypatch) -> None:
    """Never more than a clip's frames at a time, whatever the length: of a file that says it is two
    hours long, frames are read as they are asked for."""
    file = write_video(tmp_path / "long.mp4", scene_frames(0, 0.2))
    picture, read = scene_frames(0, 0.1)[0], 0

    def endless(path, fps, first):
        nonlocal read
        for read in range(2 * 3600 * 30):  # noqa: B007
            yield picture

    monkeypatch.setattr(scenes, "read_frames", endless)
    clips = scenes.clips(file, dataclasses.replace(SETTINGS, max_frames=61))
    for number, cut in enumerate(itertools.islice(clips, 5)):
        assert len(cut.frames) == 61 and read == 61 * (number + 1)
    clips.close()


def test_probe_raises_only_rejections(tmp_path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0" * 500)
    with pytest.raises(Rejected) as error:
        probe.probe(tmp_path / "a.mp4")
    assert error.value.reason == "unreadable"
