"""The evaluation on the demo world: its truth passes, other videos do not; the command as typed."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest

from framepack_jax.__main__ import main as framepack
from framepack_jax.generation.pipeline import Settings
from framepack_jax.toy import baselines, results, scenes, suites
from framepack_jax.toy.evaluation import make_all
from framepack_jax.toy.suites import Row, Suite

SIZE = 64, 64


def mean(figures: list[scenes.Figures], name: str) -> float:
    return float(np.nanmean(np.concatenate([np.ravel(each[name]) for each in figures])))


def test_the_truth_is_itself_and_does_what_it_says() -> None:
    made = scenes.drift_cases(0, 4, 120, SIZE, "drift")
    truth = [scenes.drift_figures(case, case.truth()) for case in made]
    # Of a sprite behind the wall nothing is said that could be looked for.
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
    made = scenes.counterfactual_cases(0, 4, 60, SIZE, "prompts")
    assert len(made) == 8
    truth = [scenes.prompt_figures(case, case.truth()) for case in made]
    assert mean(truth, "match") == 1 and mean(truth, "psnr") == 99
    pairs = [made[i ^ 1] for i in range(8)]
    swapped = [scenes.prompt_figures(c, o.truth()) for c, o in zip(made, pairs, strict=True)]
    assert mean(swapped, "match") == 0 and mean(swapped, "psnr") == 99


def test_counterfactual_truth_matches_its_own_caption() -> None:
    made = scenes.counterfactual_cases(0, 3, 73, SIZE, "prompts")
    assert len(made) == 6 and {case.name for case in made} >= {"000a", "000b", "002b"}
    for case, twin in zip(made[::2], made[1::2], strict=True):
        assert case.scene.caption != twin.scene.caption and case.seed == twin.seed
        np.testing.assert_array_equal(case.image, twin.image)
        assert {case.shuffled, twin.shuffled}.isdisjoint((case.scene.caption, twin.scene.caption))
        mine, others = case.truth(), twin.truth()
        found = scenes.prompt_figures(case, mine)
        assert found["match"] == 1 and found["psnr"] == 99 and found["dynamics"] > 0
        assert scenes.prompt_figures(case, others)["match"] == 0
        assert scenes.prompt_figures(twin, others)["match"] == 1


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys) -> None:
    """As typed: every part and every row, at toy size."""
    flags = [
        "evaluate", "--bundle", "random", "--schedule", "f1k1_x_f16k4f2k2f1k1_g2",
        "--size", "32x32", "--steps", "1", "--videos", "2", "--seconds", "0.6",
        "--occlusion-videos", "2",
        "--occlusion-seconds", "0.5", "--prompt-pairs", "1", "--pair-seconds", "0.3",
        "--output", str(tmp_path),
    ]  # fmt: skip
    # Few shapes to compile: clips of 9 frames, 2 videos side by side.
    monkeypatch.setattr(baselines, "CLIP_LATENTS", 2)
    stopped, save = [], results.save

    def stop_in_time(*args) -> None:
        if len(stopped) == 12:
            raise KeyboardInterrupt
        stopped.append(args[1])
        save(*args)

    monkeypatch.setattr(results, "save", stop_in_time)
    with pytest.raises(SystemExit) as ended:
        framepack(flags)
    assert ended.value.code == 130
    assert "interrupted; run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()
    monkeypatch.setattr(results, "save", lambda *args: (stopped.append(args[1]), save(*args)))
    framepack(flags)
    # Drift: 4 references and the model, twice; forgetting: also without k2, k4, both; prompts: also
    # the control.
    assert len(stopped) == 2 * 5 + 2 * 8 + 2 * 6
    found = json.loads((tmp_path / "report.json").read_text())
    name = "random f1k1_x_f16k4f2k2f1k1_g2"
    titles = [table["title"] for table in found["tables"]]
    assert [title.split()[0] for title in titles] == [
        "Over",
        "Drift",
        "Forgetting:",
        "Counterfactual",
    ]
    for table in found["tables"]:
        assert {*suites.REFERENCES, name} <= set(table["rows"])
        assert all(set(cells) == set(table["columns"]) for cells in table["rows"].values())
    assert f"{name}, without k2 and k4" in found["tables"][2]["rows"]
    frozen = found["tables"][0]["rows"][suites.FROZEN]
    assert frozen["dynamics"] == {"mean": 0.0, "error": 0.0, "videos": 2}
    text = (tmp_path / "report.md").read_text()
    for picture in re.findall(r"\]\((.+?\.png)\)", text):
        assert (tmp_path / picture).exists()
    assert f"Against {name}, the frozen first frame is better in" in text

    for row in ("ground truth", "VAE reconstruction", "frozen first frame", "repeated short"):
        assert row in text
    assert list((tmp_path / "sheets").glob("*.png"))
    figures = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz")}
    assert len(figures) > 30

    def refuse(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(results, "save", refuse)
    framepack(flags)
    again = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz")}
    assert again == figures and (tmp_path / "report.md").read_text() == text
    monkeypatch.setattr(results, "save", save)
    # Videos of another length are others.
    only_pairs = ["--videos", "0", "--occlusion-videos", "0", "--pair-seconds", "0.6"]
    framepack([*flags, *only_pairs])
    assert list((tmp_path / "videos" / "prompts_0.6s").rglob("*.npz"))
    with pytest.raises(SystemExit, match="steps = 1 there, 2 here"):
        framepack([*flags, "--steps", "2"])
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(SystemExit, match="not empty"):
        framepack(flags)


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


def test_rows_share_a_table_and_may_be_added(tmp_path, capsys) -> None:
    """Any list of schedules and methods, with the same starts: one table, a sheet for each row."""
    lines = [
        {"name": "one step", "bundle": "random", "schedule": "f1k1_x_f16k4f2k2f1k1_g2"},
    ]
    lines.append(lines[0] | {"name": "chained", "repeated": True})
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("\n".join(map(json.dumps, lines)))
    flags = [
        "evaluate", "--rows", str(rows), "--size", "32x32", "--steps", "1", "--videos", "2",
        "--seconds", "0.6", "--occlusion-videos", "0", "--prompt-pairs", "0", "--batch", "2",
        "--output", str(output),
    ]  # fmt: skip
    framepack(flags)
    first = json.loads((output / "report.json").read_text())
    names = [line["name"] for line in lines]
    assert list(first["summary"]["rows"]) == [*suites.REFERENCES, *names]
    assert all(first["summary"]["rows"][name]["drift_sharpness"]["error"] > 0 for name in names)
    # The reference row chains the sections of the first row's model.
    whole = first["tables"][0]["rows"]
    assert whole["chained"] == whole[suites.REPEATED] != whole["one step"]
    text = (output / "report.md").read_text()
    for name, sheet in first["sheets"].items():
        assert (output / sheet).exists() and f"| [{name}]({sheet}) |" in text
    times = {file: file.stat().st_mtime_ns for file in output.rglob("*.npz")}
    inverted = {"schedule": "f1k1_x_g2_f1k1f2k2f16k4_td", "steps": 2}
    lines.append(lines[0] | inverted | {"name": "inverted, two steps"})
    rows.write_text("\n".join(map(json.dumps, lines)))
    framepack(flags)
    second = json.loads((output / "report.json").read_text())
    assert list(second["summary"]["rows"]) == [*suites.REFERENCES, *names, lines[2]["name"]]
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    for name in names:
        assert second["summary"]["rows"][name] == first["summary"]["rows"][name]
    added = json.loads((output / "evaluation.json").read_text())["rows"]["inverted, two steps"]
    assert added["order"] == "inverted" and added["settings"] == {"steps": 2}
    rows.write_text(json.dumps(lines[0] | {"steps": 3}))
    with pytest.raises(SystemExit, match="one step has other settings there"):
        framepack(flags)
