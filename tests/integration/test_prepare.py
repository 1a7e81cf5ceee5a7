"""Videos become a dataset: what gets in, what does not and why, and that a stopped run goes on."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from framepack_jax import bundle, conditioning, packing, video
from framepack_jax.cli import prepare
from framepack_jax.data import (
    build,
    clip_cache,
    decode_ahead,
    filters,
    fingerprint,
    listing,
    loader,
    pixel_batch,
    precompute,
    probe,
    ray_backend,
    records,
    scenes,
)
from framepack_jax.data.config import DataConfig
from framepack_jax.data.filters import Thresholds
from framepack_jax.data.records import DatasetError, Record, VideoSource
from framepack_jax.data.rejected import Rejected
from framepack_jax.data.scenes import SceneSettings
from framepack_jax.toy import world
from tests.fixtures.hosts import ended, launch
from tests.fixtures.paths import ROOT

BUCKETS = ((32, 48), (48, 32))
SETTINGS = SceneSettings(buckets=BUCKETS)


def scene_frames(number: int, seconds: float, height=64, width=96):
    """Under a moving camera, so that all of every picture changes, whatever the scene is."""
    scene = dataclasses.replace(world.scene(0, number, height, width), camera="left")
    return list(world.frames(scene, seconds))


def write_video(path: Path, frames, fps=30, caption: str | None = "waves") -> Path:
    video.write_mp4(path, frames, fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


class FakeEncoder:
    """Encodes in no time, and counts; before clip `stop_at` somebody presses Ctrl-C."""

    def __init__(self) -> None:
        self.calls = 0
        self.stop_at: int | None = None

    def prompt(self, caption):
        return np.full((3, 4), len(caption) % 7, np.float32), np.zeros(4, np.float32)

    def records(self, clips, frames):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        small = np.resize(frames[::4, ::8, ::8, :1], (1 + (len(frames) - 1) // 4, 4, 6, 16))
        for clip in clips:
            yield Record(clip, *self.prompt(clip.caption), np.zeros((2, 4)), small / 255)


@pytest.fixture
def fake(monkeypatch):
    encoder = FakeEncoder()
    monkeypatch.setattr(precompute.Encoder, "load", lambda *_: encoder)
    return encoder


def run(videos: Path, output: Path, *more: str) -> dict:
    """Prepare by command; what rejected.jsonl says, by name of the source."""
    prepare.main(
        ["--videos", str(videos), "--bundle", "random", "--output", str(output),
         "--buckets", "32x48,48x32", *more]
    )  # fmt: skip
    rows = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    return {Path(row["source"]).name: row for row in rows}


# The stages.


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


def test_scores_say_what_they_mean() -> None:
    moving = np.stack(scene_frames(0, 0.5))
    still = np.repeat(moving[:1], 15, axis=0)
    blurred = np.stack(
        [np.asarray(Image.fromarray(f).resize((6, 4)).resize((96, 64))) for f in moving]
    )  # fmt: skip
    barred = moving.copy()
    barred[:, :8] = barred[:, -8:] = 0
    clips = {"moving": moving, "still": still, "blurred": blurred, "barred": barred}
    found = {name: filters.scores(clip) for name, clip in clips.items()}
    assert found["still"]["motion"] == 0 and found["still"]["still"] == 1
    assert found["moving"]["motion"] > 0.5 and found["moving"]["still"] == 0
    assert found["blurred"]["sharpness"] < found["moving"]["sharpness"] / 5
    assert found["barred"]["black_bars"] == 0.25 and found["moving"]["black_bars"] == 0
    assert found["moving"]["hash"] != filters.scores(moving[:, :, ::-1])["hash"]
    dark = filters.scores(moving // 20)
    assert dark["brightness"] < 8 < found["moving"]["brightness"]


@pytest.mark.parametrize("fps", [8, 10, 12, 15])
def test_frames_that_are_repeated_for_the_rate_are_not_still(tmp_path, fps) -> None:
    """Of an animation every frame differs from the one before; at 30 a second most do not."""
    frames = [np.roll(scene_frames(0, 0.1)[0], 3 * k, axis=1) for k in range(3 * fps)]
    (cut,) = scenes.clips(write_video(tmp_path / "a.mp4", frames, fps), SETTINGS)
    assert len(cut.frames) == 89 and cut.scores["still"] == 0
    repeated = [frames[k - k % 3] for k in range(3 * fps)]
    (cut,) = scenes.clips(write_video(tmp_path / "b.mp4", repeated, fps), SETTINGS)
    assert cut.scores["still"] > 0.5, "those of the video itself are"


def test_thresholds_name_the_first_that_is_not_met() -> None:
    good = {"motion": 3.0, "sharpness": 90.0, "brightness": 90.0, "black_bars": 0.0, "still": 0.0,
            "hash": 5.0}  # fmt: skip
    cases = {
        "motion": (0.0, "little_motion"), "sharpness": (0.1, "blurred"),
        "brightness": (2.0, "dark"), "black_bars": (0.3, "black_bars"), "still": (0.9, "still"),
    }  # fmt: skip
    judge = Thresholds().judge
    assert judge(2.0, good, ()) is None
    for name, (value, reason) in cases.items():
        assert judge(2.0, good | {name: value}, ()) == reason
    assert judge(1.0, good, ()) == "too_short"
    assert judge(2.0, good, {5.0}) == "duplicate"
    assert Thresholds(keep_duplicates=True).judge(2.0, good, {5.0}) is None


# The command.


def test_bad_files_are_told_and_stop_nothing(tmp_path, fake) -> None:
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    good = write_video(videos / "good.mp4", scene_frames(0, 2.0))
    write_video(videos / "deep" / "odd.mp4", scene_frames(1, 2.0, 70, 118))
    write_video(videos / "again.mp4", scene_frames(0, 2.0))
    write_video(videos / "short.mp4", scene_frames(2, 1.0))
    write_video(videos / "one_frame.mp4", scene_frames(2, 1 / 30))
    write_video(videos / "untold.mp4", scene_frames(3, 2.0), caption=None)
    write_video(videos / "long_caption.mp4", scene_frames(4, 2.0), caption="x" * 100_000)
    write_video(videos / "still.mp4", [scene_frames(5, 0.1)[0]] * 60)
    (videos / "zero.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("this is no video" * 100)
    data = good.read_bytes()
    (videos / "cut.mp4").write_bytes(data[: len(data) // 2])
    middle = bytearray(data)
    noise = np.random.default_rng(0).bytes(len(data) // 2 - len(data) // 3)
    middle[len(data) // 3 : len(data) // 2] = noise
    (videos / "noise.mp4").write_bytes(middle)
    for name in ("zero", "text", "cut", "noise"):
        (videos / f"{name}.txt").write_text("waves")
    write_sound(videos / "sound.mp4")
    rejected = run(videos, tmp_path / "out")
    reasons = {name: row["reason"] for name, row in rejected.items()}
    # Of two equal clips the one whose name comes first gets in.
    twin = "good.mp4" if "good.mp4" in reasons else "again.mp4"
    noise = reasons.pop("noise.mp4", None)
    assert noise in (None, "damaged", "unreadable", "too_short")
    assert reasons == {
        twin: "duplicate", "short.mp4": "too_short", "one_frame.mp4": "too_short",
        "untold.mp4": "no_caption", "still.mp4": "little_motion", "zero.mp4": "empty_file",
        "text.mp4": "unreadable", "cut.mp4": "damaged", "sound.mp4": "no_video",
    }  # fmt: skip
    assert "has no caption; write one into untold.txt" in rejected["untold.mp4"]["detail"]
    index = records.read_index(tmp_path / "out")
    assert index.clips == 3 + (noise is None)
    captions = [
        VideoSource(tmp_path / "out", index.shards)[i].clip.caption for i in range(index.clips)
    ]
    assert "x" * 100_000 in captions
    for name in ("accepted.png", "rejected.png"):
        assert np.asarray(Image.open(tmp_path / "out" / name)).std() > 20


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    path.with_suffix(".txt").write_text("waves")


def test_odd_rates_and_turned_videos_are_taken(tmp_path, fake) -> None:
    """Variable frame rate, no sound, a rotation in the header."""
    videos = tmp_path / "videos"
    videos.mkdir()
    frames = scene_frames(6, 2.0)
    with av.open(str(videos / "vfr.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        times = np.cumsum(np.random.default_rng(0).integers(10, 90, len(frames)))
        for frame, time_ in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = int(time_), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    (videos / "vfr.txt").write_text("waves")
    rejected = run(videos, tmp_path / "out")
    assert not rejected
    index = records.read_index(tmp_path / "out")
    (length,) = index.shards[0].lengths
    seconds = (times[-1] - times[0]) / 1000
    assert abs((1 + 4 * (length - 1)) / 30 - seconds) < 0.2


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


def test_other_thresholds_encode_nothing_again(tmp_path, fake) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(3):
        write_video(videos / f"{number}.mp4", scene_frames(number, 1.0 + 0.5 * number))
    assert len(run(videos, tmp_path / "out")) == 1
    calls = fake.calls
    assert calls == 3
    assert len(run(videos, tmp_path / "out", "--min-seconds", "0.5")) == 0
    assert fake.calls == calls
    assert records.read_index(tmp_path / "out").clips == 3
    # A caption that has changed, and another video, are encoded; other settings encode all.
    (videos / "0.txt").write_text("bows")
    write_video(videos / "3.mp4", scene_frames(3, 2.0))
    run(videos, tmp_path / "out")
    assert fake.calls == calls + 2
    run(videos, tmp_path / "out", "--scene-threshold", "0.5")
    assert fake.calls == calls + 6


def test_a_manifest_names_videos_and_captions(tmp_path, fake, capsys) -> None:
    write_video(tmp_path / "a.mp4", scene_frames(0, 2.0), caption=None)
    rows = [{"video": "a.mp4", "caption": "she waves"}, {"video": "gone.mp4", "caption": "x"}]
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    rejected = run(manifest, tmp_path / "out")
    assert rejected["gone.mp4"]["reason"] == "missing"
    assert VideoSource(tmp_path / "out", records.read_index(tmp_path / "out").shards)[
        0
    ].clip.caption == ("she waves")
    assert "accepted  1 clips" in capsys.readouterr().out
    before = hashes(tmp_path / "out")
    manifest.write_text('{"film": "a.mp4"}\n')
    with pytest.raises(SystemExit, match=r"1 bad_row.*row 1: it names no video; .* are film"):
        run(manifest, tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    with pytest.raises(SystemExit, match="no video that can be taken"):
        run(manifest, tmp_path / "other")
    (row,) = map(json.loads, (tmp_path / "other" / "rejected.jsonl").read_text().splitlines())
    assert row["row"] == 1 and row["reason"] == "bad_row"


def test_each_caption_and_span_of_a_video_makes_records(tmp_path, fake) -> None:
    """The frames of a span are those that the whole video has there; spans of a video are held out
    together; a row that is added encodes no other again."""
    frames = [*scene_frames(0, 2.0), *scene_frames(1, 3.0)]
    file = write_video(tmp_path / "a.mp4", frames, caption=None)
    rows = [
        {"video": "a.mp4", "start": 0, "end": 1.5, "caption": ["she waves", "a hand moves"]},
        {"video": "a.mp4", "start": "0:00:03", "caption": "he bows"},
        {"video": "a.mp4", "start": 60, "end": 61, "caption": "past its end"},
    ]
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows[:2])))
    assert not run(manifest, tmp_path / "out") and fake.calls == 2
    index = records.read_index(tmp_path / "out")
    found = [VideoSource(tmp_path / "out", index.shards)[i] for i in range(index.clips)]
    assert {(r.clip.caption, r.clip.start, r.clip.frames) for r in found} == {
        ("a hand moves", 0, 45), ("she waves", 0, 45), ("he bows", 3, 57),
    }  # fmt: skip
    assert len({r.clip.id for r in found}) == 3 and len({r.clip.video for r in found}) == 1
    (shard,) = index.shards
    assert len(set(shard.videos)) == 1
    (cut,) = scenes.clips(file, SETTINGS, 3.0)
    expected = [video.resize_center_crop(f, 32, 48) for f in list(video.read_frames(file, 30))[90:]]
    np.testing.assert_array_equal(cut.frames, expected[:57])
    manifest.write_text("\n".join(map(json.dumps, rows)))
    rejected = run(manifest, tmp_path / "out")
    assert fake.calls == 2 and records.read_index(tmp_path / "out").clips == 3
    assert rejected["a.mp4"]["reason"] == "too_short"
    assert "0 frames between 60 and 61 s" in rejected["a.mp4"]["detail"]


def test_the_summary_counts_cut_captions_and_files_left_out(tmp_path, capsys) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", scene_frames(0, 2.0), caption="she waves " * 200)
    write_video(tmp_path / "videos" / "b.mp4", scene_frames(1, 2.0), caption="she waves")
    for name in ("c.jpg", "d.JPG", "e.srt", "f.txt"):
        (tmp_path / "videos" / name).touch()
    for _ in range(2):
        run(tmp_path / "videos", tmp_path / "out", "--mode", "pixels")
        said = capsys.readouterr().out
        assert "captions cut: 1, after 256 tokens" in said
        assert "left out: 2 .jpg, 1 .srt\n" in said
    rows = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    tokens = {Path(row["source"]).name: row["caption_tokens"] for row in rows}
    assert tokens["a.mp4"] > 256 > tokens["b.mp4"] > 2


def test_a_dataset_from_before_says_its_videos_in_one_object(three, fake) -> None:
    """It is known by them, and replaced with all of its files."""
    lines = (three / "out" / build.VIDEOS).read_text().splitlines()
    head, *rows = map(json.loads, lines)
    stamps = {row["video"]: row["stamp"] for row in rows}
    (three / "out" / build.VIDEOS).unlink()
    old = three / "out" / build.VIDEOS_BEFORE
    old.write_text(json.dumps(head | {"videos": stamps}) + "\n")
    (three / "others").mkdir()
    write_video(three / "others" / "0.mp4", scene_frames(7, 2.0))
    with pytest.raises(SystemExit, match=r"of the videos of .*/videos, and --videos .*/others has"):
        run(three / "others", three / "out")
    (three / "videos").rename(three / "moved")
    run(three / "moved", three / "out")
    assert not old.exists() and (three / "out" / build.VIDEOS).exists() and fake.calls == 3


def test_memory_does_not_grow_with_the_videos_that_wait(monkeypatch) -> None:
    """Of a million videos, those are asked for that are decoded now."""
    asked = []

    def videos():
        for number in range(1_000_000):
            asked.append(number)
            yield clip_cache.CachedVideo(
                str(number), "", Path(f"/nowhere/{number}.mp4"), ("waves",)
            )

    found = decode_ahead.decode_videos(videos(), SETTINGS, 3)
    for number in range(5):
        one, cuts = next(found)
        assert one.id == str(number) and len(asked) <= number + 3
        with pytest.raises(Rejected, match="does not exist"):
            next(cuts)
    found.close()


def test_a_manifest_has_lines_as_json_has_them(tmp_path) -> None:
    """Marks that other programs take for ends of lines are part of a caption."""
    rows = [{"video": "a.mp4", "caption": "waves\u2028bows\x85"}, {"video": "b.mp4"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "list.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt").write_text("jumps")
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    found = listing.list_videos(tmp_path / "list.jsonl")
    assert {v.captions for v in found} == {("waves\u2028bows\x85",), ("jumps",)}


def test_other_settings_that_were_stopped_leave_nothing_that_looks_done(tmp_path, fake) -> None:
    """Nor do those from before, whose clips were replaced."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", scene_frames(0, 4.0))
    run(tmp_path / "videos", tmp_path / "out")
    before = hashes(tmp_path / "out")
    fake.stop_at = fake.calls + 1
    with pytest.raises(SystemExit, match="interrupted"):
        run(tmp_path / "videos", tmp_path / "out", "--max-seconds", "1.2")
    fake.stop_at = None
    run(tmp_path / "videos", tmp_path / "out")
    assert hashes(tmp_path / "out") == before


def test_of_parquet_only_the_columns_that_are_needed_are_read(tmp_path, monkeypatch) -> None:
    """Others may hold the videos themselves. With a stand-in for pyarrow."""
    table = {"video": ["a.mp4", "b.mp4"], "bytes": [b"", b""], "caption": ["waves", None]}

    class ParquetFile:
        schema_arrow = types.SimpleNamespace(names=list(table))

        def iter_batches(self, columns):
            assert columns == [name for name in ("video", "caption") if name in table]
            rows = zip(*(table[name] for name in columns), strict=True)
            made = [dict(zip(columns, row, strict=True)) for row in rows]
            yield types.SimpleNamespace(to_pylist=lambda: made)

    opened = types.SimpleNamespace(ParquetFile=lambda _: contextlib.nullcontext(ParquetFile()))
    arrow = types.SimpleNamespace(ArrowException=ArithmeticError, parquet=opened)
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    for name in ("list.parquet", "a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("jumps")

    def captions():
        found = listing.list_videos(tmp_path / "list.parquet")
        return {video.source: video.captions for video in found}

    assert captions() == {"a.mp4": ("waves",), "b.mp4": ("jumps",)}
    del table["caption"]
    ParquetFile.schema_arrow.names.remove("caption")
    assert captions() == {"b.mp4": ("jumps",)}
    ParquetFile.schema_arrow.names.remove("video")
    with pytest.raises(DatasetError, match=r"list\.parquet has no column of videos, only bytes"):
        captions()


@pytest.fixture
def three(tmp_path, fake) -> Path:
    """A folder with videos/, and out/, a dataset of two of its three clips."""
    (tmp_path / "videos").mkdir()
    for number in range(3):
        write_video(tmp_path / "videos" / f"{number}.mp4", scene_frames(number, 1.0 + number / 2))
    run(tmp_path / "videos", tmp_path / "out")
    assert records.read_index(tmp_path / "out").clips == 2
    return tmp_path


@pytest.mark.parametrize("what", ["full disk", "no record", "interrupt", "index"])
def test_a_dataset_stays_until_the_next_is_whole(three, fake, monkeypatch, what) -> None:
    """Whatever the packing with other thresholds fails by."""
    before = hashes(three / "out")

    def fail(*_):
        raise KeyboardInterrupt if what == "interrupt" else OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        name = {"full disk": "write_shards", "interrupt": "write_empty", "index": "write_index"}
        if what in name:
            patched.setattr(records, name[what], fail)
        else:
            patched.setattr(clip_cache, "is_done", lambda *_: True)
            next((three / "out" / clip_cache.STORE).glob("*/*.rec")).unlink()
        with pytest.raises(SystemExit, match=r"No space|No such file|interrupted"):
            run(three / "videos", three / "out", "--min-seconds", "0.5")
    assert hashes(three / "out") == before
    source = VideoSource(three / "out", records.read_index(three / "out").shards)
    assert len({source[number].clip.id for number in range(2)}) == 2
    run(three / "videos", three / "out", "--min-seconds", "0.5")
    assert records.read_index(three / "out").clips == 3


def test_killed_at_any_moment_a_dataset_is_the_old_one_the_new_one_or_none(
    three, monkeypatch
) -> None:
    """The new one takes the old one's place by renames; killed before each of them."""
    old = hashes(three / "out")
    run(three / "videos", three / "out", "--min-seconds", "0.5")
    new, kills, rename = hashes(three / "out"), [], Path.rename
    # Of the shards there is one file: as many are renamed.
    assert len(old) == 8 and len(new) == 7
    for moment in itertools.count():
        run(three / "videos", three / "out")
        assert hashes(three / "out") == old
        done = itertools.count()
        with monkeypatch.context() as patched:

            def killed(path, target, moment=moment, done=done, patched=patched):
                if next(done) == moment:
                    # A process that is killed does not tidy up.
                    patched.setattr(shutil, "rmtree", lambda *_, **__: None)
                    raise KeyboardInterrupt
                return rename(path, target)

            patched.setattr(Path, "rename", killed)
            try:
                run(three / "videos", three / "out", "--min-seconds", "0.5")
                break
            except SystemExit:
                kills.append(moment)
        there = {n: h for n, h in hashes(three / "out").items() if not n.startswith(records.NEW)}
        try:
            records.read_index(three / "out")
            assert there in (old, new)
        except DatasetError as error:
            assert "is an unfinished dataset" in str(error)
        run(three / "videos", three / "out", "--min-seconds", "0.5")
        assert hashes(three / "out") == new
    assert len(kills) == 8 + 7


def test_a_record_that_is_gone_is_encoded_again(three, fake) -> None:
    before, calls = hashes(three / "out"), fake.calls
    stored = sorted((three / "out" / clip_cache.STORE).glob("*/000.*"))
    assert len(stored) == 6
    for number, file in enumerate(stored[1:3], 1):
        file.unlink()
        run(three / "videos", three / "out")
        assert fake.calls == calls + number
        assert hashes(three / "out") == before and file.exists()


def test_a_dataset_of_other_videos_is_not_replaced_unasked(three, fake) -> None:
    before = hashes(three / "out")
    (three / "others").mkdir()
    write_video(three / "others" / "0.mp4", scene_frames(7, 2.0))
    with pytest.raises(SystemExit, match=r"of the videos of .*/videos, and --videos .*/others has"):
        run(three / "others", three / "out")
    assert hashes(three / "out") == before
    # More videos, fewer, and a manifest of some of them are no others.
    write_video(three / "videos" / "3.mp4", scene_frames(3, 2.0))
    run(three / "videos", three / "out")
    (three / "videos" / "3.mp4").unlink()
    run(three / "videos", three / "out")
    manifest = three / "videos" / "list.jsonl"
    manifest.write_text(json.dumps({"video": str(three / "videos" / "2.mp4")}))
    calls = fake.calls
    run(manifest, three / "out")
    assert fake.calls == calls and records.read_index(three / "out").clips == 1
    run(three / "others", three / "out", "--replace")
    assert records.read_index(three / "out").clips == 1
    with pytest.raises(SystemExit, match=r"of the videos of .*/others, and --videos .*/videos has"):
        run(three / "videos", three / "out")
    (three / "out" / build.VIDEOS).write_text("{}")
    with pytest.raises(SystemExit, match=r"videos\.json.* is damaged.*give --replace"):
        run(three / "videos", three / "out")


@pytest.mark.parametrize("mode", ["latents", "pixels"])
def test_videos_that_were_moved_are_not_encoded_again(three, fake, mode) -> None:
    (three / "videos" / "4.mp4").write_text("no video")
    (three / "videos" / "4.txt").write_text("waves")
    rejected = run(three / "videos", three / "out", "--mode", mode)
    assert str(three) not in rejected["4.mp4"]["detail"]
    before, calls = hashes(three / "out"), fake.calls
    (three / "videos").rename(three / "moved")
    assert run(three / "moved", three / "out", "--mode", mode).keys() == rejected.keys()
    assert fake.calls == calls
    index = records.read_index(three / "out")
    sources = {VideoSource(three / "out", index.shards)[i].clip.source for i in range(2)}
    if mode == "pixels":
        assert sources == {str(three / "moved" / name) for name in ("1.mp4", "2.mp4")}
    else:
        assert sources == {"1.mp4", "2.mp4"}
        now = hashes(three / "out")
        assert [name for name in now if now[name] != before[name]] == [build.VIDEOS]
    # Another video of the same name is another.
    write_video(three / "moved" / "2.mp4", scene_frames(9, 2.0))
    run(three / "moved", three / "out", "--mode", mode)
    assert fake.calls == calls + 1


def test_a_manifest_names_the_same_video_in_many_ways(tmp_path) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    names = ["./a.mp4", str(tmp_path / "here/b.mp4"), "deep//c.mp4", str(elsewhere / "d.mp4")]
    rows = [{"video": name, "caption": "waves"} for name in [*names, "a.mp4"]]
    sources = {"a.mp4", "b.mp4", "deep/c.mp4", str(elsewhere / "d.mp4")}
    for source in sources:
        (tmp_path / "here" / source).touch()
    (tmp_path / "here" / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = listing.list_videos(tmp_path / "here" / "list.jsonl")
    assert {v.source for v in found} == sources
    assert {v.path for v in found} == {tmp_path / "here" / source for source in sources}
    (problem,) = found.problems()
    assert (problem.source, problem.row, problem.reason) == ("a.mp4", 5, "repeated")


def test_what_cannot_be_prepared_is_named(tmp_path, fake) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", scene_frames(0, 1.0))
    cases = [
        (tmp_path / "none", tmp_path / "o", (), "does not exist"),
        (tmp_path / "empty", tmp_path / "o", (), "has no videos"),
        (videos, tmp_path / "full", (), "not empty; choose another"),
        (videos, tmp_path / os.fsdecode(b"caf\xe9"), (), "--output .* expected text in UTF-8"),
        (videos, tmp_path / "o", ("--buckets", "30x48"), "multiples of 16"),
        (videos, tmp_path / "o", ("--max-seconds", "0.1"), "--max-seconds 0.1"),
        (videos, tmp_path / "o", ("--workers", "0"), "--workers 0"),
        (videos, tmp_path / "o", (), "none of 1 videos gave a clip.*too_short"),
    ]
    for source, output, more, message in cases:
        with pytest.raises(SystemExit, match=rf"error: .*{message}"):
            run(source, output, *more)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_leaves_no_dataset_and_goes_on(tmp_path, fake, monkeypatch) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(2):
        write_video(videos / f"{number}.mp4", scene_frames(number, 2.0))

    def full(*_):
        raise OSError(28, "No space left on device", "shards")

    with monkeypatch.context() as patched:
        patched.setattr(records, "write_shards", full)
        with pytest.raises(SystemExit, match="No space left"):
            run(videos, tmp_path / "out")
    assert not (tmp_path / "out" / records.INDEX).exists()
    calls = fake.calls
    run(videos, tmp_path / "out")
    assert fake.calls == calls and records.read_index(tmp_path / "out").clips == 2


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "clips" not in file.parts
    }


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
    cfg, params = encoder.vae
    start = conditioning.start_latent(cfg, params, frames[:1], encoder.mean, encoder.std)
    np.testing.assert_array_equal(record.latents[0], np.asarray(start)[0, 0].astype(bf16))
    spec, _ = bundle.vae_config(manifest)
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
    source = VideoSource(output, opened.index.shards)
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


def test_a_cluster_sends_clips_as_they_come(tmp_path, monkeypatch) -> None:
    """Not those of a whole video at once; what is wrong with its end comes after them."""
    given = []

    def clips(path, settings, start, end):
        for number in range(3):
            given.append(number)
            yield scenes.SceneClip(number, np.zeros((5, 2, 2, 3), np.uint8), {})
        raise Rejected("damaged", "its end is missing")

    monkeypatch.setattr(scenes, "clips", clips)
    row = {"number": 0, "path": "a.mp4", "start": 0.0, "end": math.inf}
    rows = ray_backend.clip_rows(row, dataclasses.asdict(SETTINGS))
    assert next(rows)["first"] == 0 and given == [0]
    assert [cut.first for cut in ray_backend.cuts(itertools.islice(rows, 2))] == [1, 2]
    with pytest.raises(Rejected, match="its end is missing"):
        list(ray_backend.cuts(rows))


def test_store_names_are_readable_and_differ() -> None:
    names = [
        clip_cache.video_id(source) for source in ("a/b c.mp4", "b c.mp4", "a/b-c.mp4", "ä.mp4")
    ]
    assert len(set(names)) == 4 and names[0].startswith("b_c-")
    # Of a million sources, two share 64 bits once in 37 million times.
    assert {len(name.rpartition("-")[2]) for name in names} == {16}


def test_probe_raises_only_rejections(tmp_path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0" * 500)
    with pytest.raises(Rejected) as error:
        probe.probe(tmp_path / "a.mp4")
    assert error.value.reason == "unreadable"
