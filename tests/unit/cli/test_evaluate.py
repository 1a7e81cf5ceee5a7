"""Errors of the command evaluate."""

import pytest

from framepack_jax.cli import evaluate


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--bundle"),
        (["--video", "nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["--video", "x.mp4", "--bundle", "random"], "--video"),
        (["--video", "x.mp4", "--caption", "waves"], "give --clip"),
        (["--bundle", "random", "--output", "out", "--clip", "x"], "need --video"),
        (["--bundle", "random", "--output", "out", "--vbench", "python"], "need --video"),
        (["--video", "x.mp4", "--vbench-dimensions", "color"], "needs --vbench PYTHON"),
        (["--rows", "rows.jsonl", "--output", "out"], "--rows rows.jsonl cannot be read"),
        (["--video", "x.mp4", "--rows", "rows.jsonl"], "exclude each other"),
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
