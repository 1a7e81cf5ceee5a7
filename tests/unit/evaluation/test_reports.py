"""Tables, curves and the report of a video file."""

import json

import numpy as np
import pytest
from PIL import Image

from framepack_jax import video
from framepack_jax.cli import evaluate
from framepack_jax.evaluation import plots, tables
from framepack_jax.evaluation.drift import Estimate
from framepack_jax.evaluation.metrics import Metric
from framepack_jax.toy import suites
from tests.fixtures.pictures import FPS


def test_tables_in_markdown_and_json() -> None:
    columns = {"a": Metric("Smoothness", "share", 1, 2), "b": Metric("Motion", "heights", 0, 1)}
    cells = {
        suites.TRUTH: (Estimate(0.4, 0.01, 4), Estimate(5.0, 0.5, 4)),
        suites.FROZEN: (Estimate(1.0, None, 1), Estimate(0.0, 0.0, 4)),
        "model": (Estimate(0.5, 0.125, 4), Estimate(7.0, 0.25, 4)),
        "empty": (None, None),
    }
    table = tables.Table(
        "T",
        "About.",
        columns,
        {row: dict(zip("ab", cell, strict=True)) for row, cell in cells.items()},
    )
    notes = tables.against(table, suites.TRUTH, suites.FROZEN, ["model"])
    assert notes == [
        "Against model, the frozen first frame is better in smoothness; worse in motion."
    ]
    text = tables.markdown(table, notes)
    assert "| model | 0.50 ± 0.12 | 7.0 ± 0.2 |" in text and "| empty | - | - |" in text
    assert "| frozen first frame | 1.00 | 0.0 ± 0.0 |" in text and notes[0] in text
    linked = tables.markdown(table, links={"model": "sheets/model.png"})
    assert "| [model](sheets/model.png) | 0.50 ± 0.12 |" in linked and "| empty | - |" in linked
    plain = json.loads(json.dumps(tables.plain(table), allow_nan=False))
    assert plain["rows"]["model"]["a"] == {"mean": 0.5, "error": 0.125, "videos": 4}
    assert plain["rows"]["empty"]["a"] is None


def test_curves_are_means_over_videos_where_there_are_figures() -> None:
    videos = [np.asarray([0.0, 1, 2, np.nan]), np.asarray([2.0, 3, np.nan, np.nan, 9])]
    times, mean, error = plots.curve(videos, 2.0)
    np.testing.assert_allclose(times, [0.25, 0.75, 1.25])
    np.testing.assert_allclose(mean, [1, 2, 2])
    np.testing.assert_allclose(error, [1, 1, 0])


def test_a_video_file_alone(tmp_path, capsys) -> None:
    levels = 60 + np.arange(40) * 2
    frames = np.broadcast_to(levels[:, None, None, None], (40, 32, 32, 3)).astype(np.uint8)
    video.write_mp4(tmp_path / "rise.mp4", frames, FPS)
    evaluate.main(["--video", str(tmp_path / "rise.mp4"), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "rise.mp4: 40 frames" in printed and "| drift |" in printed
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["rows"]["drift"]["brightness"]["mean"] == pytest.approx(2 * 34 / 255, abs=0.01)
    assert found["rows"]["last 15 %"]["brightness"]["mean"] == pytest.approx(133 / 255, abs=0.01)
    assert found["rows"]["drift"]["dynamics"]["mean"] < 0.05
    with Image.open(tmp_path / "out" / "plots" / "brightness.png") as plot:
        assert min(plot.size) > 300
    assert (tmp_path / "out" / "sheet.png").exists() and (tmp_path / "out" / "report.md").exists()
