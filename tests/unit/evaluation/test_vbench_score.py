"""Scores of VBench, by a stand-in of the same interface in another process."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.cli import evaluate
from framepack_jax.evaluation import vbench_score
from tests.fixtures.paths import ROOT

STAND_IN = ROOT / "tests" / "fixtures" / "vbench_stand_in"
PYTHON = Path(sys.executable)
FRAMES = 60


@pytest.fixture(scope="module")
def rising(tmp_path_factory) -> Path:
    """A video that becomes brighter: frame i has the level 40 + 2 i."""
    levels = 40 + 2 * np.arange(FRAMES)
    shown = np.broadcast_to(levels[:, None, None, None], (FRAMES, 32, 48, 3)).astype(np.uint8)
    file = tmp_path_factory.mktemp("vbench") / "rise.mp4"
    video.write_mp4(file, shown, 30.0)
    return file


@pytest.fixture
def installed(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))


def test_parts_of_a_video_are_scored_and_stand_in_the_table(
    rising, installed, tmp_path, capsys
) -> None:
    output = tmp_path / "out"
    evaluate.main(
        ["--video", str(rising), "--vbench", str(PYTHON), "--caption", "it rises", "--output",
         str(output)]
    )  # fmt: skip
    rows = json.loads((output / "report.json").read_text())["rows"]
    # 9 of 60 frames are 15 %; brightness is the same number by our own metric.
    for part in ("first 15 %", "last 15 %", "drift", "whole video"):
        ours = rows[part]["brightness"]["mean"]
        assert rows[part]["motion_smoothness"]["mean"] == pytest.approx(ours, abs=0.01)
        # Divided by 100, as VBench divides its own mean.
        assert rows[part]["imaging_quality"]["mean"] == pytest.approx(ours, abs=0.01)
    assert rows["drift"]["motion_smoothness"]["mean"] == pytest.approx(2 * 51 / 255, abs=0.01)
    scored = rows["whole video"]["overall_consistency"]["mean"]
    assert scored == pytest.approx(rows["whole video"]["brightness"]["mean"] + 8, abs=0.01)
    degrees = [rows[part]["dynamic_degree"]["mean"] for part in vbench_score.PARTS]
    assert degrees == [0, 0, 1]
    assert "| VBench motion smoothness (0 to 1) |" in capsys.readouterr().out
    report = (output / "report.md").read_text()
    assert "VBench imaging quality" in report and "plots/brightness.png" in report
    assert "plots/imaging_quality.png" not in report


def test_without_a_caption_only_what_needs_none(rising, installed) -> None:
    found = vbench_score.measure(PYTHON, rising)
    assert list(found) == [n for n in vbench_score.METRICS if n != "overall_consistency"]
    found = vbench_score.measure(PYTHON, rising, dimensions=["imaging_quality"])
    assert list(found) == ["imaging_quality"]


def test_other_containers_and_odd_sizes_are_brought_to_mp4(rising, installed, tmp_path) -> None:
    import av

    file = tmp_path / "odd.mkv"
    with av.open(file, "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 33, 31, "bgr0"
        for level in range(40, 100):
            frame = np.full((31, 33, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = vbench_score.measure(PYTHON, file, dimensions=["motion_smoothness"])
    assert found["motion_smoothness"]["drift"] == pytest.approx(51 / 255, abs=0.01)


@pytest.mark.parametrize(
    ("python", "frames", "options", "words"),
    [
        ("nowhere/python", 60, {}, r"nowhere/python: there is no such program; .* install vb"),
        (PYTHON, 60, {}, r"not installed there \(No module named .*pip install vbench"),
        (PYTHON, 20, {}, r"of the 20 frames of .* are 3; expected at least 8, of a video of 50"),
        (PYTHON, 60, {"dimensions": ["color"]}, "color: expected one of subject_consistency"),
        (PYTHON, 60, {"dimensions": ["overall_consistency"]}, "add --caption"),
    ],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, python, frames, options, words) -> None:
    # An environment without VBench; PyTorch is not loaded either.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "torch.py").write_text("")
    file = tmp_path / "v.mp4"
    video.write_mp4(file, np.zeros((frames, 16, 16, 3), np.uint8), 30.0)
    with pytest.raises(ValueError, match=words):
        vbench_score.measure(Path(python), file, **options)


def test_a_failure_of_vbench_is_reported(rising, tmp_path, monkeypatch) -> None:
    (tmp_path / "torch.py").write_bytes((STAND_IN / "torch.py").read_bytes())
    (tmp_path / "vbench.py").write_text("class VBench:\n    def __init__(self, *_): 1 / 0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="ended with exit code 1; see its messages"):
        vbench_score.measure(PYTHON, rising)
