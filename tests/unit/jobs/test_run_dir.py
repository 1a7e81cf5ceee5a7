"""Run folders: locks, latents, segments, and other files in them."""

from pathlib import Path

import numpy as np
import pytest

from framepack_jax import packing, video
from framepack_jax.generation.request import Request, SourceVideo
from framepack_jax.jobs.output_folder import make_output_folder, new_output_folder
from framepack_jax.jobs.record import REQUIRED
from framepack_jax.jobs.run_dir import Busy, RunDir, check_folder, check_free
from framepack_jax.jobs.run_files import DamagedFile

PLAN = packing.plan(packing.parse("f1k1_x_f16k4f2k2f1k1_g2"), 2)
SHAPE = (2, 3, 4)


@pytest.fixture
def run(tmp_path) -> RunDir:
    for name in ("inputs", "latents", "segments"):
        (tmp_path / name).mkdir()
    record = {name: [] for name in REQUIRED} | {
        "format": 2, "status": "begun", "beginning": 0, "weights": {},
        "flags": {"fps": 30.0, "crf": 20, "prompt": "she waves"},
    }  # fmt: skip
    made = RunDir(tmp_path, record)
    made.write_record()
    return made


def latents(number: int) -> np.ndarray:
    return np.full((len(PLAN[number].targets), *SHAPE), number, np.float32)


def frames(count: int) -> np.ndarray:
    return np.zeros((count, 16, 16, 3), np.uint8)


def test_a_run_is_locked_once(run) -> None:
    other = RunDir.open(run.folder)
    run.lock()
    run.lock()
    with pytest.raises(Busy, match="is in use by another process"):
        other.lock()
    with pytest.raises(Busy):
        check_free(run.folder)
    run.unlock()
    check_free(run.folder)
    with RunDir.locked(run.folder) as locked:
        assert locked.record["flags"]["crf"] == 20
        with pytest.raises(Busy):
            run.lock()
    run.lock()


def test_what_a_lock_finds_is_what_was_written_last(run) -> None:
    run.write_record(status="sampled")
    with RunDir.locked(run.folder) as locked:
        assert locked.record["status"] == "sampled"


def test_sections_are_read_up_to_the_first_missing_one(run) -> None:
    assert run.sections(PLAN, SHAPE) == [] and not run.has_sections()
    run.save_section(1, PLAN[1], latents(1))
    assert run.sections(PLAN, SHAPE) == []
    run.save_section(0, PLAN[0], latents(0))
    found = run.sections(PLAN, SHAPE)
    assert run.has_sections() and len(found) == 2
    for number, each in enumerate(found):
        np.testing.assert_array_equal(each, latents(number))
    run.record["status"] = "beginning"
    assert not run.has_sections()


def test_all_latents_by_position(run) -> None:
    run.save_known({0: np.ones(SHAPE, np.float32)})
    run.save_section(0, PLAN[0], latents(0))
    assert sorted(run.latents()) == sorted({0, *PLAN[0].targets})
    np.testing.assert_array_equal(run.known()[0], np.ones(SHAPE))


@pytest.mark.parametrize(("kept", "first"), [(0, 2), (3, 3), (4, 4), (5, 2)])
def test_frames_of_an_extended_video_that_sections_change_are_saved(tmp_path, kept, first) -> None:
    """Of 5 frames, of which the last 3 are read; all of these if no section changes any."""
    read = np.tile(np.arange(2, 5, dtype=np.uint8)[:, None, None, None], (1, 16, 16, 3))
    flags = {
        "extend": "a.mp4", "prompt": "", "negative_prompt": "", "seed": 0, "end_image_as": "auto",
    }  # fmt: skip
    record = {"flags": flags, "beginning": kept, "starts_empty": True, "key_frames": []}
    run = RunDir(tmp_path, record)
    run.begin(Request("", source_video=SourceVideo(5, read[0], read)), {}, None)
    saved = run.request().source_video
    assert saved.frames == 5
    np.testing.assert_array_equal(saved.last[:, 0, 0, 0], range(first, 5))


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ((PLAN[0], latents(1)), "holds other positions than the plan"),
        ((PLAN[1], latents(1)[:, :1]), "holds latents"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_section_keeps_those_before(run, saved, named) -> None:
    run.save_section(0, PLAN[0], latents(0))
    if saved is None:
        (run.folder / "latents" / "section_001.npz").write_bytes(b"PK")
    else:
        run.save_section(1, *saved)
    with pytest.raises(DamagedFile, match=named) as error:
        run.sections(PLAN, SHAPE)
    assert len(error.value.done) == 1


def test_frames_are_joined_up_to_the_first_gap(run) -> None:
    run.add_span(0, 0, frames(0))
    assert not (run.folder / "video.mp4").exists() and run.spans() == 1
    run.add_span(1, 0, frames(3))
    run.add_span(2, 3, frames(2))
    assert video.mp4_info(run.folder / "video.mp4").frames == 5 and run.spans() == 3
    (run.folder / "segments" / "frames_00000003.mp4").unlink()
    run.join()
    assert video.mp4_info(run.folder / "video.mp4").frames == 3 and run.spans() == 2
    run.add_span(1, 7, frames(1))
    assert run.record["spans"] == [[0, 0], [7, 8]]


def test_other_files_are_refused_by_name(tmp_path) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / "latents").mkdir()
    check_folder(tmp_path)
    (tmp_path / "latents" / "mine.txt").touch()
    with pytest.raises(ValueError, match="has a latents that belongs to no run"):
        check_folder(tmp_path)
    (tmp_path / "run.json").touch()
    check_folder(tmp_path)
    with pytest.raises(OSError, match="cannot be written"):
        check_folder(tmp_path / "run.json")


def test_a_status_is_noted_also_on_a_full_disk(run) -> None:
    run.note("failed")
    assert RunDir.open(run.folder).record["status"] == "failed"
    (run.folder / "run.json.part").symlink_to("/dev/full")
    run.note("interrupted")
    assert run.record["status"] == "interrupted"
    assert RunDir.open(run.folder).record["status"] == "failed"


def test_an_output_folder_that_stays_empty_is_removed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_output_folder(Path("photo.png")) as folder:
        assert folder.is_dir() and folder.parent == Path("outputs")
        assert folder.name.endswith("_photo")
    assert not folder.exists()
    with new_output_folder(None) as folder:
        (folder / "run.json").touch()
    assert folder.exists() and folder.name.endswith("_text")
    assert len(make_output_folder(Path("é" * 200)).name.encode()) < 150


def test_outputs_that_is_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs").touch()
    with pytest.raises(OSError, match="give --output"):
        make_output_folder(None)
