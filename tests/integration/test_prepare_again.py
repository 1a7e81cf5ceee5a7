"""Preparing again: other settings, moved videos, interruptions, full disks."""

import errno
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from framepack_jax.data import build, clip_cache, records
from framepack_jax.data.records import VideoSource
from framepack_jax.data.shard_writer import ShardWriter
from tests.fixtures.preparing import hashes, run, scene_frames, write_video


def test_other_thresholds_encode_nothing_again(tmp_path, fake_encoder) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(3):
        write_video(videos / f"{number}.mp4", scene_frames(number, 1.0 + 0.5 * number))
    assert len(run(videos, tmp_path / "out")) == 1
    calls = fake_encoder.calls
    assert calls == 3
    assert len(run(videos, tmp_path / "out", "--min-seconds", "0.5")) == 0
    assert fake_encoder.calls == calls
    assert records.read_index(tmp_path / "out").clips == 3
    # A caption that has changed, and another video, are encoded; other settings encode all.
    (videos / "0.txt").write_text("bows")
    write_video(videos / "3.mp4", scene_frames(3, 2.0))
    run(videos, tmp_path / "out")
    assert fake_encoder.calls == calls + 2
    run(videos, tmp_path / "out", "--scene-threshold", "0.5")
    assert fake_encoder.calls == calls + 6


def test_a_dataset_from_before_says_its_videos_in_one_object(three, fake_encoder) -> None:
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
    assert not old.exists() and (three / "out" / build.VIDEOS).exists() and fake_encoder.calls == 3


def test_other_settings_that_were_stopped_leave_nothing_that_looks_done(
    tmp_path, fake_encoder, capsys
) -> None:
    """Nor do those from before, whose clips were replaced."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", scene_frames(0, 4.0))
    run(tmp_path / "videos", tmp_path / "out")
    before = hashes(tmp_path / "out")
    fake_encoder.stop_at = fake_encoder.calls + 1
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "videos", tmp_path / "out", "--max-seconds", "1.2")
    assert ended.value.code == 130
    assert "interrupted; run the same command again to resume" in capsys.readouterr().err
    fake_encoder.stop_at = None
    run(tmp_path / "videos", tmp_path / "out")
    assert hashes(tmp_path / "out") == before


@pytest.fixture
def three(tmp_path, fake_encoder) -> Path:
    """A folder with videos/, and out/, a dataset of two of its three clips."""
    (tmp_path / "videos").mkdir()
    for number in range(3):
        write_video(tmp_path / "videos" / f"{number}.mp4", scene_frames(number, 1.0 + number / 2))
    run(tmp_path / "videos", tmp_path / "out")
    assert records.read_index(tmp_path / "out").clips == 2
    return tmp_path


@pytest.mark.parametrize("what", ["full disk", "no record", "interrupt", "index"])
def test_a_dataset_stays_until_the_next_is_whole(three, fake_encoder, monkeypatch, what) -> None:
    """Whatever the packing with other thresholds fails by."""
    before = hashes(three / "out")

    def fail(*_):
        raise KeyboardInterrupt if what == "interrupt" else OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        name = {"interrupt": "write_empty", "index": "write_index"}
        if what == "full disk":
            patched.setattr(ShardWriter, "add", fail)
        elif what in name:
            patched.setattr(records, name[what], fail)
        else:
            patched.setattr(clip_cache, "is_done", lambda *_: True)
            next((three / "out" / clip_cache.STORE).glob("*/*.rec")).unlink()
        with pytest.raises(SystemExit, match=r"No space|No such file|^130$"):
            run(three / "videos", three / "out", "--min-seconds", "0.5")
    assert hashes(three / "out") == before
    source = VideoSource(three / "out", records.read_index(three / "out").shards)
    assert len({source[number].clip.id for number in range(2)}) == 2
    run(three / "videos", three / "out", "--min-seconds", "0.5")
    assert records.read_index(three / "out").clips == 3


def contents(folder: Path) -> list[bytes]:
    """All that training reads of a dataset."""
    index = records.read_index(folder)
    source = VideoSource(folder, index.shards)
    empty = (array.tobytes() for array in records.read_empty(folder, index))
    return [*(records.pack(source[n]) for n in range(len(source))), *empty]


@pytest.mark.parametrize("layout", ["now", "before"])
def test_killed_at_any_moment_a_dataset_is_the_old_one_or_the_new_one(
    three, monkeypatch, layout
) -> None:
    """Also if the old one has files without digests in their names."""
    out = three / "out"
    if layout == "before":
        without_digests(out)
    old = contents(out)
    shutil.copytree(out, three / "old", ignore=shutil.ignore_patterns(clip_cache.STORE))
    run(three / "videos", out, "--min-seconds", "0.5")
    new, new_files, rename, kills = contents(out), hashes(out), os.replace, []
    for moment in itertools.count():
        for name in (records.INDEX, records.SHARDS, records.EMPTY):
            remove(out / name)
        shutil.copytree(three / "old", out, dirs_exist_ok=True)
        done = itertools.count()
        with monkeypatch.context() as patched:

            def killed(path, target, moment=moment, done=done, patched=patched):
                if next(done) == moment:
                    # A process that is killed does not tidy up.
                    patched.setattr(shutil, "rmtree", lambda *_, **__: None)
                    patched.setattr(records, "remove_unlisted", lambda *_: None)
                    raise KeyboardInterrupt
                return rename(path, target)

            patched.setattr(os, "replace", killed)
            try:
                run(three / "videos", out, "--min-seconds", "0.5")
                break
            except SystemExit:
                kills.append(moment)
        assert contents(out) in (old, new)
        run(three / "videos", out, "--min-seconds", "0.5")
        assert contents(out) == new and hashes(out) == new_files
    # Once when they are written, tables a second time when they are moved.
    assert len(kills) > len(new_files)


def without_digests(folder: Path) -> None:
    """Give the files of a dataset the names and the index of an older dataset."""
    fields = json.loads((folder / records.INDEX).read_text())
    (folder / fields.pop("empty")).rename(folder / records.EMPTY)
    for shard in fields["shards"]:
        digest = shard.pop("digest")
        file = folder / records.SHARDS / shard["file"]
        file.with_stem(f"{file.stem}-{digest}").rename(file)
    (folder / records.INDEX).write_text(json.dumps(fields))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("what", ["folders", "files", "index"])
def test_renames_that_are_refused_leave_the_old_dataset(three, monkeypatch, what) -> None:
    """Folders: as mounts of object stores do. Then nothing is lost, and the new dataset appears."""
    old, rename, replace = contents(three / "out"), os.rename, os.replace

    def refused(work):
        def call(path, target, **places):
            folder = os.path.isdir(path)
            index = os.fspath(target) == os.fspath(three / "out" / records.INDEX)
            if {"folders": folder, "files": not folder, "index": index}[what]:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path), None, str(target))
            return work(path, target, **places)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refused(rename))
        patched.setattr(os, "replace", refused(replace))
        if what == "folders":
            run(three / "videos", three / "out", "--min-seconds", "0.5")
        else:
            with pytest.raises(SystemExit, match="Too many open files"):
                run(three / "videos", three / "out", "--min-seconds", "0.5")
            assert contents(three / "out") == old
    run(three / "videos", three / "out", "--min-seconds", "0.5")
    assert records.read_index(three / "out").clips == 3


def test_a_record_that_is_gone_is_encoded_again(three, fake_encoder) -> None:
    before, calls = hashes(three / "out"), fake_encoder.calls
    stored = sorted((three / "out" / clip_cache.STORE).glob("*/000.*"))
    assert len(stored) == 6
    for number, file in enumerate(stored[1:3], 1):
        file.unlink()
        run(three / "videos", three / "out")
        assert fake_encoder.calls == calls + number
        assert hashes(three / "out") == before and file.exists()


def test_a_dataset_of_other_videos_is_not_replaced_unasked(three, fake_encoder) -> None:
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
    calls = fake_encoder.calls
    run(manifest, three / "out")
    assert fake_encoder.calls == calls and records.read_index(three / "out").clips == 1
    run(three / "others", three / "out", "--replace")
    assert records.read_index(three / "out").clips == 1
    with pytest.raises(SystemExit, match=r"of the videos of .*/others, and --videos .*/videos has"):
        run(three / "videos", three / "out")
    (three / "out" / build.VIDEOS).write_text("{}")
    with pytest.raises(SystemExit, match=r"videos\.json.* is damaged.*give --replace"):
        run(three / "videos", three / "out")


@pytest.mark.parametrize("mode", ["latents", "pixels"])
def test_videos_that_were_moved_are_not_encoded_again(three, fake_encoder, mode) -> None:
    (three / "videos" / "4.mp4").write_text("no video")
    (three / "videos" / "4.txt").write_text("waves")
    rejected = run(three / "videos", three / "out", "--mode", mode)
    assert str(three) not in rejected["4.mp4"]["detail"]
    before, calls = hashes(three / "out"), fake_encoder.calls
    (three / "videos").rename(three / "moved")
    assert run(three / "moved", three / "out", "--mode", mode).keys() == rejected.keys()
    assert fake_encoder.calls == calls
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
    assert fake_encoder.calls == calls + 1


def test_a_full_disk_leaves_no_dataset_and_goes_on(tmp_path, fake_encoder, monkeypatch) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(2):
        write_video(videos / f"{number}.mp4", scene_frames(number, 2.0))

    def full(*_):
        raise OSError(28, "No space left on device", "shards")

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", full)
        with pytest.raises(SystemExit, match="No space left"):
            run(videos, tmp_path / "out")
    assert not (tmp_path / "out" / records.INDEX).exists()
    calls = fake_encoder.calls
    run(videos, tmp_path / "out")
    assert fake_encoder.calls == calls and records.read_index(tmp_path / "out").clips == 2


def test_shards_are_written_while_clips_are_encoded(tmp_path, fake_encoder, monkeypatch) -> None:
    """The last of twelve clips waits for the first record of the dataset."""
    one = write_video(tmp_path / "0.mp4", scene_frames(0, 1.0)).read_bytes()
    (tmp_path / "videos").mkdir()
    for number in range(12):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(one)
        (tmp_path / "videos" / f"{number}.txt").write_text("waves")
    encode, began = fake_encoder.records, []

    def records_of(clips, frames):
        until = time.monotonic() + 20
        while fake_encoder.calls == 11 and not began and time.monotonic() < until:
            began.extend((tmp_path / "out" / "shards").glob("*.part"))
            time.sleep(0.01)
        return encode(clips, frames)

    monkeypatch.setattr(fake_encoder, "records", records_of)
    run(tmp_path / "videos", tmp_path / "out", "--keep-duplicates", "--min-seconds", "0.5")
    assert began and fake_encoder.calls == 12
    index = records.read_index(tmp_path / "out")
    assert index.clips == 12 and len(list((tmp_path / "out" / "shards").iterdir())) == 2
