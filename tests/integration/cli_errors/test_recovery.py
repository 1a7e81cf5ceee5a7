"""Damaged files, full disks and NaN: one line says what is wrong, and no result is lost."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from framepack_jax.cli import decode, resume
from framepack_jax.generation import noise
from framepack_jax.jobs import run_dir, run_files
from tests.fixtures.small_run import (
    change_record,
    check_finished,
    check_same_latents,
    command,
    cut_short,
    latents_of,
    record_of,
    refused,
)


def test_latents_cut_short_are_made_again(stopped, whole, capsys) -> None:
    file = stopped / "latents" / "section_001.npz"
    cut_short(file)
    resume.main([str(stopped)])
    said = capsys.readouterr().err
    assert f"{file} is damaged" in said and "section 2 is sampled again" in said
    check_finished(stopped, whole)


def test_latents_of_the_first_section_cut_short(stopped, whole, capsys) -> None:
    cut_short(stopped / "latents" / "section_000.npz")
    resume.main([str(stopped)])
    assert "section 1 is sampled again" in capsys.readouterr().err
    check_finished(stopped, whole)


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
def test_given_latents_are_encoded_again(stopped, whole, capsys, damage) -> None:
    file = stopped / "latents" / "known.npz"
    damage(file)
    resume.main([str(stopped)])
    said = capsys.readouterr().err
    assert str(file) in said and "it is encoded again" in said
    check_finished(stopped, whole)


def test_a_video_cut_short_is_joined_again(stopped, whole) -> None:
    cut_short(stopped / "video.mp4")
    resume.main([str(stopped)])
    check_finished(stopped, whole)


@pytest.mark.parametrize(("name", "named"), [
    ("run.json", "run.json cannot be read"), ("inputs/image.png", "inputs/image.png is damaged"),
])  # fmt: skip
def test_what_cannot_be_made_again_is_named(stopped, whole, name, named) -> None:
    cut_short(stopped / name)
    for again in (resume, decode):
        with pytest.raises(SystemExit) as ended:
            again.main([str(stopped)])
        message = str(ended.value)
        assert str(stopped) in message and named in message and "--overwrite" in message
    check_same_latents(stopped, whole)


# A disk that is full


@pytest.mark.parametrize(
    "name",
    [
        "latents/section_001.npz",
        "segments/frames_00000000.mp4",
        "video.mp4",
        "preview.png",
        "run.json",
    ],
)
def test_a_full_disk_stops_a_run_that_goes_on_later(
    tmp_path, whole, monkeypatch, capsys, name
) -> None:
    begin = run_dir.RunDir.begin

    def begin_on_full_disk(self: run_dir.RunDir, *given: object) -> None:
        begin(self, *given)
        # All that is written to this file meets a full disk; once it is removed, there is space.
        os.symlink("/dev/full", self.folder / f"{name}.part")

    monkeypatch.setattr(run_dir.RunDir, "begin", begin_on_full_disk)
    message = refused(tmp_path)
    assert "No space left on device" in message and str(tmp_path / name) in message
    assert record_of(tmp_path)["status"] == "failed"
    assert f"framepack resume {tmp_path}" in capsys.readouterr().err
    expected = latents_of(whole)
    for file, latents in latents_of(tmp_path).items():
        np.testing.assert_array_equal(latents, expected[file])
    resume.main([str(tmp_path)])
    check_finished(tmp_path, whole)


@pytest.mark.parametrize("name", ["inputs/image.png", "latents/known.npz", "run.json"])
def test_a_full_disk_at_the_beginning(tmp_path, whole, monkeypatch, name) -> None:
    prepare = run_files.pictures

    def fill_disk(request: object) -> dict:
        (tmp_path / f"{name}.part").symlink_to("/dev/full")
        return prepare(request)

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "pictures", fill_disk)
        message = refused(tmp_path)
    assert "No space left on device" in message and str(tmp_path / name) in message
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "beginning"
    command(tmp_path)
    check_finished(tmp_path, whole)


# Numbers that are none


NAN_SEED = 13


@contextlib.contextmanager
def nan_in_section_2() -> Iterator[None]:
    """The noise of section 2 is not a number for the videos of one seed."""
    normal = noise._normal

    def broken(seed: int, section: int, *shape: object) -> object:
        return normal(seed, section, *shape) * (np.nan if (seed, section) == (NAN_SEED, 1) else 1)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(noise, "_normal", broken)
        yield


def test_nan_stops_a_run_and_keeps_what_is_done(tmp_path) -> None:
    with nan_in_section_2():
        message = refused(tmp_path, seed=NAN_SEED)
    assert "section 2, step 1 of 1" in message and "not finite in float32" in message
    assert record_of(tmp_path)["status"] == "failed"
    before = latents_of(tmp_path)
    assert sorted(before) == ["known.npz", "section_000.npz"]
    assert np.isfinite(before["section_000.npz"]).all()
    resume.main([str(tmp_path)])
    assert record_of(tmp_path)["status"] == "finished"
    after = latents_of(tmp_path)
    np.testing.assert_array_equal(after["section_000.npz"], before["section_000.npz"])
    assert np.isfinite(after["section_001.npz"]).all()


# Jobs


def write_jobs(folder: Path, *jobs: object) -> Path:
    lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    return folder / "jobs.jsonl"


def test_a_bad_job_does_not_stop_the_others(tmp_path, whole, capsys) -> None:
    jobs = write_jobs(
        tmp_path,
        '{"prompt": "cut',
        {"name": "absent", "image": str(tmp_path / "nowhere.png")},
        {"name": "odd", "heigth": 64},
        {"name": "good"},
    )
    output = tmp_path / "made"
    message = refused(output, jobs=jobs)
    assert "3 of 4 videos failed" in message
    for part in ("line 1", "nowhere.png", "'heigth' is not a flag of a video"):
        assert part in message
    check_finished(output / "good", whole)
    capsys.readouterr()
    refused(output, jobs=jobs)
    assert "already finished" in capsys.readouterr().out


def test_nan_in_one_of_two_does_not_stop_the_other(tmp_path, whole) -> None:
    jobs = write_jobs(tmp_path, {"name": "nan", "seed": NAN_SEED}, {"name": "good"})
    output = tmp_path / "made"
    with nan_in_section_2():
        message = refused(output, jobs=jobs, batch=2)
    assert "1 of 2 videos" in message and "nan: section 2, step 1 of 1" in message
    assert record_of(output / "nan")["status"] == "failed"
    assert sorted(latents_of(output / "nan")) == ["known.npz", "section_000.npz"]
    assert record_of(output / "good")["status"] == "finished"
    made, single = latents_of(output / "good"), latents_of(whole)
    for name in single:
        # Two at once round differently from one alone.
        np.testing.assert_allclose(made[name], single[name], atol=1e-4 * np.abs(single[name]).max())


def test_a_damaged_run_does_not_stop_its_neighbour(tmp_path, whole) -> None:
    jobs = write_jobs(tmp_path, {"name": "bad"}, {"name": "good", "seed": 1})
    output = tmp_path / "made"
    shutil.copytree(whole, output / "bad")
    change_record(output / "bad", status="interrupted")
    cut_short(output / "bad" / "inputs" / "image.png")
    message = refused(output, jobs=jobs, batch=2)
    assert "1 of 2 videos" in message and "image.png is damaged" in message
    assert record_of(output / "good")["status"] == "finished"


@pytest.mark.parametrize(
    ("text", "named"),
    [(b"", "is empty"), (b"\n \n", "is empty"), (b"\x89PNG", "in UTF-8")],
)
def test_files_that_hold_no_jobs(tmp_path, text, named) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_bytes(text)
    message = refused(tmp_path / "made", jobs=jobs)
    assert str(jobs) in message and named in message
