"""The comparison of packed models with and without history."""

import numpy as np
import pytest

from benchmarks import history


def test_losses_are_paired_by_clip() -> None:
    """Clips differ by far more than the models do."""
    clips = np.asarray([1.0, 5.0, 9.0])
    rises = np.asarray([0.1, 0.2, 0.3])
    better = np.stack([clips] * history.SECTIONS)
    worse = better + [[0.0], [1.0], [2.0], [3.0]] * rises
    found = history.compared(worse[1:], better[1:])
    assert found.mean == pytest.approx(0.4)
    assert found.error == pytest.approx(np.std(2 * rises, ddof=1) / 3**0.5)
    losses = {"without": worse, "with": better, "blanked": worse, "exchanged": worse}
    _, _, *rows = history.table(losses).splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["0", "1", "2", "3", "1 to 3"]
    assert "| 5.4000 | 5.0000 | 0.4000 ± 0.1155 | 3.5 |" in rows[-1]
