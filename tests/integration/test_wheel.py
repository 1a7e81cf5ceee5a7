"""The sdist makes the wheel, and the wheel works outside of the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT
from tests.fixtures.training_data import write_dataset

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
# Runs the installed program for each command, in one process, so that JAX starts once.
PROGRAM = """
import json, runpy, sys

program, commands = sys.argv[1], json.loads(sys.argv[2])
for command in commands:
    sys.argv = [program, *command]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
ours = [m for name, m in sys.modules.items() if name.split(".")[0] == "framepack_jax"]
print(json.dumps([module.__file__ for module in ours]))
"""


def files() -> list[str]:
    """Return the files of the working tree that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in found.stdout.split("\0") if name and (ROOT / name).exists()]


def build(kind: str, source: Path, output: Path) -> Path:
    """Run the build backend as pip and `python -m build` do; return the file."""
    command = [sys.executable, "-c", BUILD.format(kind), str(output)]
    found = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    (file,) = output.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel that is built from the sdist alone."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in files():
        if not name.startswith(("tests/", "docs/")):
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "clone" / name)
    sdist = build("sdist", folder / "clone", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source, folder)


@pytest.fixture(scope="module")
def program(wheel: Path) -> Path:
    """`framepack` in a new environment, with the packages of this one but for its own."""
    environment = wheel.parent / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", str(wheel)], check=True)
    (site,) = (environment / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Folders named here are searched last, and the .pth files in them are not read.
    (site / "others.pth").write_text("\n".join(others) + "\n")
    return environment / "bin" / "framepack"


def run(cwd: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_what_git_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = [name for name in files() if name.startswith(("framepack_jax/", "configs/"))]
    expected = {n if n.startswith("framepack_jax/") else f"framepack_jax/{n}" for n in ours}
    assert held == expected
    assert "framepack_jax/configs/lora_i2v.py" in held


def check_commands(program: Path, cwd: Path, *commands: list[str]) -> str:
    """Run commands in a folder, with modules of the environment alone; return what they print."""
    found = run(cwd, program.with_name("python"), "-c", PROGRAM, program, json.dumps(commands))
    assert found.returncode == 0, found.stderr[-3000:]
    places = json.loads(found.stdout.splitlines()[-1])
    assert places and all(Path(place).is_relative_to(program.parents[1]) for place in places)
    return found.stdout


def test_an_installed_wheel_examines_the_machine(program: Path, tmp_path: Path) -> None:
    """And the bundle `tiny`, all weights of it."""
    said = check_commands(program, tmp_path, ["doctor", "--skip", "kernels", "--skip", "video"])
    assert "bundle tiny: transformer, vae" in said and "problem" not in said


@pytest.mark.slow
def test_an_installed_wheel_samples_and_trains(program: Path, tmp_path: Path) -> None:
    """In a folder elsewhere, with a configuration by its name; a minute of compilation."""
    write_dataset(tmp_path / "dataset", {(32, 48): (7, 5)})
    shutil.copyfile(ROOT / "examples" / "sprites.png", tmp_path / "sprites.png")
    sample = [
        "sample", "--bundle", "tiny", "--image", "sprites.png", "--prompt", "it stays",
        "--sections", "1", "--steps", "1", "--height", "32", "--width", "32", "--output", "sampled",
    ]  # fmt: skip
    train = [
        "train", "--config", "lora_i2v", "--bundle", "random", "--data.path", "dataset",
        "--output", "trained", "--batch", "1", "--data.holdout", "0", "--validation.every", "0",
        "--schedule", "f1k1_x_g2_f1k1f2k2f16k4_td", "--lora.rank", "2", "--steps", "1",
        "--dtype", "float32", "--remat", "none", "--no-tensorboard",
    ]  # fmt: skip
    check_commands(program, tmp_path, sample, train)
    assert (tmp_path / "sampled" / "video.mp4").stat().st_size > 1000
    assert (tmp_path / "trained" / "bundle" / "lora.safetensors").exists()
    record = json.loads((tmp_path / "trained" / "run.json").read_text())
    assert record["config"]["optimizer"]["learning_rate"] == 2e-4


def test_an_unknown_configuration_lists_the_installed_ones(program: Path, tmp_path: Path) -> None:
    found = run(tmp_path, program, "train", "--config", "lora_i2w")
    assert found.returncode == 1
    assert "--config lora_i2w: no configuration has this name; expected ablation, " in found.stderr
    assert ", lora_i2v, tiny, " in found.stderr and "Traceback" not in found.stderr
