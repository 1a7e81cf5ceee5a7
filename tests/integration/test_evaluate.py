"""The evaluation on the demo world: its truth passes, other videos do not; the command as typed."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from framepack_jax.__main__ import main as framepack
from framepack_jax.generation.pipeline import Settings
from framepack_jax.toy import results, scenes
from framepack_jax.toy.evaluation import make_all
from framepack_jax.toy.suites import Row, Suite

SIZE = 64, 64


def mean(figures: list[scenes.Figures], name: str) -> float:
    return float(np.nanmean(np.concatenate([np.ravel(each[name]) for each in figures])))


def test_the_truth_is_itself_and_does_what_it_says() -> None:
    made = scenes.drift_cases(0, 8, 120, SIZE, "drift")
    truth = [scenes.drift_figures(case, case.truth()) for case in made]
    assert mean(truth, "identity") > 0.97 and mean(truth, "caption") > 0.95
    frozen = [scenes.drift_figures(c, np.repeat(c.image[None], c.frames, 0)) for c in made]
    assert mean(frozen, "caption") < 0.6 and mean(frozen, "dynamics") < 1e-3
    # Seen in other videos, the sprites are gone or do something else.
    after = made[1:] + made[:1]
    others = [scenes.drift_figures(c, o.truth()) for c, o in zip(made, after, strict=True)]
    assert mean(others, "identity") < 0.4 and mean(others, "caption") < 0.4


@pytest.mark.parametrize("hidden", [0.5, 2.0])
def test_a_sprite_that_comes_back_is_told_from_one_that_does_not(hidden) -> None:
    made = scenes.hiding_cases(0, 4, hidden, SIZE, "forgetting")
    truth = [scenes.forgetting_figures(case, case.truth()) for case in made]
    assert mean(truth, "identity") > 0.95 and mean(truth, "hidden") > 0.95
    assert mean(truth, "place") < 0.02
    for case in made:
        frames = case.truth()
        frames[case.back] = frames[case.away.start + 2]
        figures = scenes.forgetting_figures(case, frames)
        assert figures["identity"] == 0 and np.isnan(figures["place"])


def test_of_two_motions_the_one_that_was_asked_for_is_found() -> None:
    made = scenes.counterfactual_cases(0, 8, 60, SIZE, "prompts")
    assert len(made) == 16
    truth = [scenes.prompt_figures(case, case.truth()) for case in made]
    assert mean(truth, "match") == 1 and mean(truth, "psnr") == 99
    pairs = [made[i ^ 1] for i in range(16)]
    swapped = [scenes.prompt_figures(c, o.truth()) for c, o in zip(made, pairs, strict=True)]
    assert mean(swapped, "match") == 0 and mean(swapped, "psnr") == 99


def test_the_command_as_typed(tmp_path, capsys) -> None:
    """Every part, every row, at toy size; the second time nothing is made again."""
    flags = ["evaluate", "--bundle", "random", "--output", str(tmp_path / "out"), "--videos", "1",
             "--seconds", "1.2", "--occlusion-videos", "0", "--prompt-pairs", "1",
             "--pair-seconds", "1.2", "--size", "32x32", "--steps", "1"]  # fmt: skip
    framepack(flags)
    report = (tmp_path / "out" / "report.md").read_text()
    for row in (
        "ground truth",
        "VAE reconstruction",
        "frozen first frame",
        "repeated short",
        "random",
    ):
        assert f"{row}" in report
    assert json.loads((tmp_path / "out" / "report.json").read_text())
    assert list((tmp_path / "out" / "plots").glob("*.png"))
    assert list((tmp_path / "out" / "sheets").glob("*.png"))
    videos = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.npz")}
    assert len(videos) > 8
    framepack(flags)
    again = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.npz")}
    assert again == videos and (tmp_path / "out" / "report.md").read_text() == report
    # Videos of another length are others.
    framepack([*flags, "--videos", "0", "--pair-seconds", "2.4"])
    assert list((tmp_path / "out" / "videos" / "prompts_2.4s").rglob("*.npz"))
    with pytest.raises(SystemExit, match="steps"):
        framepack([*flags[:-1], "2"])


def test_a_longer_video_serves_for_a_shorter_one(tmp_path) -> None:
    """If it begins alike; all other videos are made for each length."""
    calls = []

    def make(name, pipe, asked, settings):
        calls.append((name, asked[0].frames, len(asked)))
        return [case.truth() for case in asked]

    rows = [Row(n, None, functools.partial(make, n), n == "onward") for n in ("onward", "back")]
    short, long = (
        Suite(name, scenes.drift_cases(0, 3, frames, SIZE, name), rows, scenes.drift_figures)
        for name, frames in (("drift_1s", 33), ("drift_2s", 65))
    )  # fmt: skip
    todo = [short, dataclasses.replace(long, shorter=(short,))]
    make_all(tmp_path, todo, [], Settings(), 2)
    both = [("back", 33, 2), ("back", 33, 1), ("back", 65, 2), ("back", 65, 1)]
    assert sorted(calls) == sorted([("onward", 65, 2), ("onward", 65, 1), *both])
    for case in short.cases:
        found = [results.load(tmp_path, name, case) for name in ("onward", "back")]
        for key in found[1]:
            np.testing.assert_array_equal(found[0][key], found[1][key])
        assert found[0]["sharpness"].shape == (33,)
    # What is there stays, also where a longer one is made later.
    files = [results.video_file(tmp_path, "onward", part.cases[0]) for part in (short, long)]
    before = files[0].stat().st_mtime_ns
    files[1].with_suffix(".npz").unlink()
    make_all(tmp_path, todo, [], Settings(), 2)
    assert calls[-1] == ("onward", 65, 1) and files[1].with_suffix(".npz").exists()
    assert files[0].stat().st_mtime_ns == before
