"""The notebooks run on a CPU, cell by cell, but for those that are large."""

import itertools
import os
import sys
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Cells that need the network, large weights, or minutes of the TPU's compiler.
LEFT_OUT = {"install", "large", "dry-run"}


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", ()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_large_cells_come_after_a_dry_run(path: Path) -> None:
    cells = nbformat.read(path, 4).cells
    nbformat.validate(nbformat.read(path, 4))
    code = [tags(cell) for cell in cells if cell.cell_type == "code"]
    for before, cell in itertools.pairwise(code):
        assert "large" not in cell or "dry-run" in before
    assert all(not cell.get("outputs") for cell in cells), "outputs are not committed"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch) -> None:
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" in tags(cell):
            cell.source += f"\nSOURCE = {str(ROOT)!r}"
    notebook.cells = [cell for cell in notebook.cells if not tags(cell) & LEFT_OUT]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    for cell in notebook.cells:
        texts = [output.get("text", "") for output in cell.get("outputs", ())]
        assert not any("error: " in text or "Traceback" in text for text in texts), texts
    for made in ("outputs/demo/video.mp4", "outputs/with_lora/video.mp4", "runs/mine/bundle"):
        assert (tmp_path / made).exists(), f"{made} was not made"
