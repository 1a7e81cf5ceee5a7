"""Progress on a terminal and in a log."""

import io
import sys

import pytest

from framepack_jax.utils import progress


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_in_a_log_are_lines(monkeypatch, terminal: bool) -> None:
    log = io.StringIO()
    log.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0)
    with (
        progress.Bar(total=2, desc="sections", mininterval=0) as sections,
        progress.Bar(total=4, desc="steps", leave=False, mininterval=0) as steps,
    ):
        for _ in range(4):
            steps.update()
        sections.set_postfix(loss="0.1")
        sections.update(2)
    written = log.getvalue()
    assert ("\r" in written) == terminal
    if not terminal:
        lines = written.splitlines()
        assert "steps: 3/4 [" in written and lines[-1].startswith("sections: 2/2 [")
        assert "\x1b" not in written and "loss=0.1" in lines[-1]


def test_lines_in_a_log_are_apart(monkeypatch) -> None:
    """A quick bar has only the last line."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress.Bar(range(1000), desc="clips", mininterval=0)) == list(range(1000))
    (line,) = log.getvalue().splitlines()
    assert line.startswith("clips: 1000/1000 [")
