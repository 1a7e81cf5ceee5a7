"""Runs of several methods are matched by their inputs; bad ones are refused by name."""

import json
from pathlib import Path

import pytest

from framepack_jax.evaluation.elo.runs import match, read_methods, unmatched
from tests.fixtures.elo_runs import make_run

F1 = "f1k1_x_f16k4f2k2f1k1_g2"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two methods with three runs each, two of them with equal inputs."""
    for name, schedule, seeds in (("inverted", None, (0, 1, 2)), ("f1", F1, (1, 2, 3))):
        for seed in seeds:
            options = {} if schedule is None else {"schedule": schedule}
            make_run(tmp_path / name / f"seed_{seed}", seed=seed, **options)
    return [tmp_path / "inverted", tmp_path / "f1"]


def test_pairs_have_equal_inputs(folders: list[Path]) -> None:
    methods = read_methods(folders)
    pairs = match(folders, methods)
    found = [tuple(run.folder.relative_to(folders[0].parent) for run in p.runs) for p in pairs]
    assert found == [(Path(f"inverted/seed_{i}"), Path(f"f1/seed_{i}")) for i in (1, 2)]
    assert {run.folder.name for run in unmatched(methods, pairs)} == {"seed_0", "seed_3"}


@pytest.mark.parametrize("change", [{"prompt": "she bows"}, {"image": "b" * 64}, {"seed": 7}])
def test_other_inputs_are_no_pair(tmp_path: Path, change: dict) -> None:
    given = [make_run(tmp_path / "a"), make_run(tmp_path / "b", schedule=F1, **change)]
    with pytest.raises(ValueError, match=rf"a: no run has the .* \({next(iter(change))} of"):
        match(given, read_methods(given))


def test_the_name_of_an_image_file_does_not_count(tmp_path: Path) -> None:
    """The start image is compared by its hash: the file may lie elsewhere."""
    given = [make_run(tmp_path / "a"), make_run(tmp_path / "b", schedule=F1)]
    record = json.loads((given[1] / "run.json").read_text())
    record["flags"]["image"] = "/elsewhere/x.jpg"
    record["files_sha256"] = {"/elsewhere/x.jpg": "a" * 64}
    (given[1] / "run.json").write_text(json.dumps(record))
    assert len(match(given, read_methods(given))) == 1


def test_three_methods_give_every_pair(tmp_path: Path) -> None:
    given = [make_run(tmp_path / n, steps=i) for i, n in enumerate("abc", start=1)]
    assert [p.methods for p in match(given, read_methods(given))] == [(0, 1), (0, 2), (1, 2)]


def test_one_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only .*a is given: expected the runs of two or more"):
        read_methods([make_run(tmp_path / "a")])
    with pytest.raises(ValueError, match="a is given twice"):
        read_methods([tmp_path / "a", tmp_path / "a" / ".." / "a"])


@pytest.mark.parametrize(
    ("status", "remedy"),
    [("sampled", "video yet; decode it: framepack decode"), ("begun", "framepack resume")],
)
def test_a_run_without_a_video_is_refused(tmp_path: Path, status: str, remedy: str) -> None:
    given = [make_run(tmp_path / "a"), make_run(tmp_path / "b", status=status)]
    with pytest.raises(ValueError, match=f"b has no .*{remedy} "):
        read_methods(given)
    video = make_run(tmp_path / "c") / "video.mp4"
    video.unlink()
    with pytest.raises(ValueError, match=r"c has no video\.mp4; decode it"):
        read_methods([given[0], tmp_path / "c"])


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no run: .*run\.json"):
        read_methods([run, tmp_path / "empty"])
    with pytest.raises(ValueError, match="missing is not a folder"):
        read_methods([run, tmp_path / "missing"])


def test_runs_of_a_method_must_have_the_same_settings(tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    for seed, steps in ((0, 25), (1, 10)):
        make_run(tmp_path / "mixed" / str(seed), seed=seed, steps=steps)
    with pytest.raises(ValueError, match=r"mixed/1 was .* than .*mixed/0 \(steps = 25 there, 10"):
        read_methods([other, tmp_path / "mixed"])
    for name in ("x", "y"):
        make_run(tmp_path / "double" / name)
    with pytest.raises(ValueError, match=r"double/x and .*double/y have the same start image"):
        read_methods([other, tmp_path / "double"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 64}, "but height 32 and 64; sample both at the same size"),
        ({"fps": 24.0}, "but fps 30.0 and 24.0"),
        ({"frames": 33}, "but 17 and 33 frames; sample both with the same --seconds"),
    ],
)
def test_pairs_of_other_size_or_length_are_refused(tmp_path: Path, change: dict, words) -> None:
    given = [make_run(tmp_path / "a"), make_run(tmp_path / "b", schedule=F1, **change)]
    with pytest.raises(ValueError, match=words):
        match(given, read_methods(given))


def test_windows_of_schedules_may_differ(tmp_path: Path) -> None:
    """Lengths that differ by less than a section are those of the same --seconds."""
    given = [make_run(tmp_path / "a"), make_run(tmp_path / "b", schedule=F1, frames=23)]
    assert len(match(given, read_methods(given))) == 1
