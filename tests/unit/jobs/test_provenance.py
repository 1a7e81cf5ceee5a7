"""Inputs in the records of runs."""

from pathlib import Path

import pytest

from framepack_jax.jobs import provenance


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run/video.mp4", "/a/b"])
def test_paths_that_hold_everywhere_stay(path) -> None:
    assert provenance.absolute(path) == path


def test_other_paths_are_taken_from_the_working_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance.absolute(Path("run") / "video.mp4") == str(tmp_path / "run" / "video.mp4")
