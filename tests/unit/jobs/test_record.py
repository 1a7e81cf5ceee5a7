"""The record of a run: formats, damage, and what it is compared by."""

import json
from pathlib import Path

import pytest

from framepack_jax.jobs import record
from framepack_jax.jobs.provenance import EARLIER, differences

FLAGS = {"end_image": None, "end_image_as": "auto", "seed": 0, "cfg_scale": 1.0}


def example(**changes: object) -> dict:
    values: dict = {name: [] for name in record.REQUIRED}
    return values | {"format": record.FORMAT, "flags": dict(FLAGS), "offload": "auto"} | changes


def read(folder: Path, written: dict) -> dict:
    (folder / record.RECORD).write_text(json.dumps(written))
    return record.read_record(folder)


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    record.write_record(tmp_path, example(status="begun"))
    assert record.read_record(tmp_path) == example(status="begun")
    assert record.record_text(tmp_path) == (tmp_path / record.RECORD).read_text()
    assert record.record_text(tmp_path / "none") is None


@pytest.mark.parametrize(("memory", "mode"), [("auto", "auto"), ("high", "none"), ("low", "full")])
def test_the_first_format_is_read_with_the_names_of_today(tmp_path, memory, mode) -> None:
    flags = {"end_image": None, "end_image_as": "auto", "seed": 0, "cfg": 1.0}
    old = example(format=1, flags=flags, memory=memory)
    del old["offload"]
    assert read(tmp_path, old) == example(offload=mode)


@pytest.mark.parametrize(("end_image", "use"), [(None, "auto"), ("end.png", "still")])
def test_the_oldest_runs_ended_with_a_still(tmp_path, end_image, use) -> None:
    old = example(format=1, flags={"end_image": end_image})
    assert read(tmp_path, old)["flags"] == {"end_image": end_image, "end_image_as": use}


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (example(format=3), "its format is 3, expected 2"),
        ({"format": 2}, "it lacks status, flags"),
        ({}, "'format'"),
        ([], "list"),
    ],
)
def test_records_that_cannot_be_read(tmp_path, written, named) -> None:
    with pytest.raises(ValueError, match=rf"run.json cannot be read \(.*{named}.*--overwrite"):
        read(tmp_path, written)


def test_a_folder_without_a_record_holds_no_run(tmp_path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ValueError, match=r"holds no run: it has no run.json"):
            record.read_record(folder)


def run(flags: dict, files: dict | None = None, **weights: str) -> dict:
    hashes = {role: {"sha256": sha256} for role, sha256 in weights.items()}
    flags = FLAGS | EARLIER | flags
    return {"flags": flags, "files_sha256": files or {}, "weights": hashes}


def test_runs_are_compared_by_flags_files_and_weights() -> None:
    old = run({}, {"a.png": "1", "b.png": "2"}, vae="3")
    assert differences(old, old) == ""
    assert differences(old, run({"seed": 4}, vae="3")) == "seed = 0 there, 4 here"
    assert differences(old, run({}, {"a.png": "9", "b.png": None}, vae="3")) == "a.png has changed"
    assert differences(old, run({}, vae="4")) == "the vae of the bundle has changed"


def test_what_auto_meant_and_what_old_runs_lack_do_not_differ() -> None:
    old = run({"end_image_as": "guide"})
    assert differences(old, run({"end_image_as": "auto"})) == ""
    assert "end_image_as" in differences(old, run({"end_image_as": "still"}))
    for name in ("lora", "merge_lora", "gif", "history_noise"):
        del old["flags"][name]
    assert differences(old, run({"end_image_as": "auto"})) == ""
    found = differences(old, run({"end_image_as": "auto", "gif": True}))
    assert found == "gif = False there, True here"


def test_a_training_run_is_named(tmp_path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / record.RECORD).write_text(json.dumps({"format": 4, "config": {}}))
    with pytest.raises(ValueError, match=r"is a training run, .*--bundle .*/bundle\)"):
        record.read_record(tmp_path)
