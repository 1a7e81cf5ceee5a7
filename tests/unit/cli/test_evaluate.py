"""The command evaluate: its errors, and resuming."""

import json
import re

import pytest

from framepack_jax.cli import evaluate
from framepack_jax.toy import baselines, results, suites


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--bundle"),
        (["--video", "nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["--video", "x.mp4", "--bundle", "random"], "--video"),
        (["--video", "x.mp4", "--caption", "waves"], "give --clip"),
        (["--bundle", "random", "--output", "out", "--clip", "x"], "need --video"),
        (["--bundle", "random"], "--output"),
        (["--bundle", "nowhere", "--output", "out"], "nowhere"),
        (["--bundle", "random", "--output", "out", "--size", "64"], "--size 64"),
        (["--bundle", "random", "--output", "out", "--size", "64x72"], "--size 64x72"),
        (["--bundle", "random", "--output", "out", "--seconds", "0"], "--seconds 0"),
        (
            ["--bundle", "random", "--output", "out", "--occlusion-seconds", "1", "1"],
            "--occlusion-seconds",
        ),
        (["--bundle", "random", "--output", "out", "--videos", "-1"], "--videos -1"),
        (["--bundle", "random", "--output", "out", "--batch", "0"], "--batch 0"),
        (["--bundle", "random", "--output", "out", "--steps", "0"], "steps = 0"),
        (
            ["--bundle", "random", "--bundle", "random", "--output", "out"],
            "two bundles are called random",
        ),
        (["--bundle", "random", "--output", "out", "--schedule", "g9x"], "g9x"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, flags, named) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        evaluate.main(flags)
    assert str(error.value).startswith("error: ") and named in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys) -> None:
    flags = [
        "--bundle", "random", "--schedule", "f1k1_x_f16k4f2k2f1k1_g2", "--size", "32x32",
        "--steps", "1", "--videos", "2", "--seconds", "0.6", "--occlusion-videos", "2",
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
        evaluate.main(flags)
    assert ended.value.code == 130
    assert "interrupted; run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()
    monkeypatch.setattr(results, "save", lambda *args: (stopped.append(args[1]), save(*args)))
    evaluate.main(flags)
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

    def refuse(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(results, "save", refuse)
    evaluate.main(flags)
    with pytest.raises(SystemExit, match="steps = 1 there, 2 here"):
        evaluate.main([*flags, "--steps", "2"])
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(SystemExit, match="not empty"):
        evaluate.main(flags)
