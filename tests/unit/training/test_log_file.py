"""The log of a run that was killed and resumed, on a disk and in parts."""

import json

import pytest
from etils import epath

from framepack_jax.training import log_file
from framepack_jax.training.log_file import LOG, PARTS, LogFile, LogParts, join, read_lines
from framepack_jax.utils.uploads import Uploads


def steps(run) -> list[tuple[int, str]]:
    return [(line["step"], line["life"]) for line in map(json.loads, read_lines(run))]


def life(run, name: str, first: int, last: int, end: bool) -> None:
    """Log the steps after `first`; a life that does not end is killed once the files are copied."""
    uploads = Uploads(run, seconds=3600)
    log = LogParts(run, uploads, first)
    for step in range(first + 1, last + 1):
        log.write(step, {"life": name})
    log.close()
    assert uploads.close()
    if end:
        join(run)


@pytest.mark.parametrize("place", ["tmp_path", "bucket"])
def test_lives_are_joined(place, request, monkeypatch) -> None:
    """Lines that a killed life wrote after its last checkpoint do not count."""
    monkeypatch.setattr(log_file, "PART_BYTES", 100)
    run = epath.Path(request.getfixturevalue(place)) / "run"
    life(run, "a", 0, 9, end=False)
    assert len(list((run / PARTS).iterdir())) > 1 and not (run / LOG).exists()
    life(run, "b", 4, 5, end=False)
    expected = [(n, "a") for n in range(1, 5)] + [(5, "b")]
    assert steps(run) == expected
    life(run, "c", 5, 7, end=True)
    expected += [(6, "c"), (7, "c")]
    assert steps(run) == expected and len((run / LOG).read_text().splitlines()) == 7
    life(run, "d", 6, 8, end=False)
    assert steps(run) == [*expected[:6], (7, "d"), (8, "d")]


def test_a_log_on_a_disk_is_read_alike(tmp_path) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "life": "a"}\n{"step": 2, "life": "a"}\n{"st')
    log = LogFile(tmp_path, 1)
    log.write(2, {"life": "b"})
    assert steps(tmp_path) == [(1, "a"), (2, "b")]


def test_a_store_that_is_away_ends_nothing(tmp_path, caplog) -> None:
    """Files are copied once it is back."""
    target = tmp_path / "run"
    target.write_text("in the way")
    uploads = Uploads(target, seconds=0.01)
    (uploads.folder / "a.txt").write_text("a")
    while "cannot be written yet" not in caplog.text:
        pass
    target.unlink()
    while not (target / "a.txt").exists():
        pass
    (uploads.folder / "a.txt").write_text("ab")
    assert uploads.close() and (target / "a.txt").read_text() == "ab"
    assert not uploads.folder.exists()
