"""Videos become a dataset: what is accepted, what is rejected, and why."""

import contextlib
import json
import os
import sys
import types
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from framepack_jax import video
from framepack_jax.data import listing, records, scenes
from framepack_jax.data.records import DatasetError, VideoSource
from tests.fixtures.preparing import SETTINGS, hashes, run, scene_frames, write_video


def test_bad_files_are_told_and_stop_nothing(tmp_path, fake_encoder) -> None:
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


def test_odd_rates_and_turned_videos_are_taken(tmp_path, fake_encoder) -> None:
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


def test_a_manifest_names_videos_and_captions(tmp_path, fake_encoder, capsys) -> None:
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


def test_each_caption_and_span_of_a_video_makes_records(tmp_path, fake_encoder) -> None:
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
    assert not run(manifest, tmp_path / "out") and fake_encoder.calls == 2
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
    assert fake_encoder.calls == 2 and records.read_index(tmp_path / "out").clips == 3
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
    # States of these tokens are kept, and none of padding.
    source = VideoSource(tmp_path / "out", records.read_index(tmp_path / "out").shards)
    kept = {Path(r.clip.source).name: len(r.text) for r in map(source.__getitem__, range(2))}
    assert kept == {"a.mp4": 256, "b.mp4": tokens["b.mp4"]}


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


def test_what_cannot_be_prepared_is_named(tmp_path, fake_encoder) -> None:
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
        (videos, tmp_path / "o", (), "every clip of 1 videos was rejected.*too_short"),
    ]
    for source, output, more, message in cases:
        with pytest.raises(SystemExit, match=rf"error: .*{message}"):
            run(source, output, *more)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
