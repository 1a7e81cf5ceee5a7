"""Every script of examples/ runs, with the inputs that the ones before it made."""

import functools
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from framepack_jax import FramePack, bundle
from framepack_jax.video import count_frames
from tests.fixtures.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module", autouse=True)
def one_load() -> Iterator[None]:
    """Load each bundle once: what is compiled for it is shared by the scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FramePack, "load", functools.cache(FramePack.load))
        yield


def run(monkeypatch: pytest.MonkeyPatch, script: str, *args: Path | int) -> None:
    monkeypatch.setattr("sys.argv", [script, *map(str, args)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_videos(outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    video = outputs / "sample" / "video.mp4"
    run(monkeypatch, "sample.py", video.parent, 64)
    assert count_frames(video, 30) == 37
    run(monkeypatch, "continue_video.py", video, outputs / "continued")
    assert count_frames(outputs / "continued" / "continued.mp4", 30) == 73
    capsys.readouterr()
    run(monkeypatch, "evaluate.py", video)
    assert "37 frames" in capsys.readouterr().out


def test_conversion(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "convert.py", outputs / "converted")
    assert "transformer" in bundle.read_manifest(outputs / "converted" / "bundle").roles


def test_training(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "prepare.py", outputs / "prepared")
    run(monkeypatch, "train_lora.py", outputs / "prepared" / "dataset", outputs / "lora")
    assert (outputs / "lora" / "bundle" / "lora.safetensors").exists()


def test_every_script_is_run() -> None:
    tests = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tests for path in EXAMPLES.glob("*.py"))
