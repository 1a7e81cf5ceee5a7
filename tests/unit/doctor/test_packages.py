"""Packages that do not go together, as a user's environment may have them."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from framepack_jax.doctor import packages
from framepack_jax.utils import versions


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install the metadata of a package in front of all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    versions.version.cache_clear()

    def install(name: str, version: str, *requires: str) -> None:
        place = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir()
        lines = [f"Requires-Dist: {each}" for each in requires]
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
        (place / "METADATA").write_text(text + "\n")
        versions.version.cache_clear()

    yield install
    versions.version.cache_clear()


def problems(check) -> dict[str, tuple[str, str]]:
    return {each.subject: (each.text, each.remedy) for each in check() if each.status == "problem"}


def test_this_environment_is_whole() -> None:
    assert not problems(packages.packages) and not problems(packages.python)


def test_a_plug_in_of_another_version(installed) -> None:
    installed("jax-cuda13-plugin", "0.7.1")
    library = importlib.metadata.version("jaxlib")
    assert problems(packages.packages) == {
        "jax-cuda13-plugin": (
            f"version 0.7.1 does not go with jaxlib {library}",
            'pip install --upgrade "framepack-jax[cuda13]"',
        )
    }


def test_two_plug_ins(installed) -> None:
    library = importlib.metadata.version("jaxlib")
    for name in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        installed(name, library)
    (found,) = (each for each in packages.plugins() if each.subject == "CUDA")
    assert found.status == "warning"
    assert found.remedy == "pip uninstall jax-cuda12-plugin jax-cuda12-pjrt"


def test_a_libtpu_of_another_version(installed) -> None:
    version = importlib.metadata.version("jax")
    installed("jax", version, 'libtpu==0.0.99.*; extra == "tpu"', f"jaxlib=={version}")
    installed("libtpu", "0.0.1")
    text, remedy = problems(packages.packages)["libtpu"]
    assert "libtpu 0.0.1 is installed; jax needs libtpu==0.0.99.*" in text
    assert remedy == 'pip install --upgrade "framepack-jax[tpu]"'


def test_requirements_that_are_not_met(installed) -> None:
    installed(
        "framepack-jax", "0.1.0", "numpy>=99", "no-such-package>=1", 'torch>=99; extra == "torch"',
        'jax>=0.1; python_version >= "3.11"',
    )  # fmt: skip
    texts = [each.text for each in packages.packages() if each.status == "problem"]
    assert len(texts) == 2
    assert texts[0].startswith("numpy ") and texts[0].endswith("framepack-jax needs numpy>=99")
    assert texts[1] == "no-such-package is not installed; framepack-jax needs no-such-package>=1"


def test_a_clone_that_is_not_installed() -> None:
    assert list(packages.unmet("no-such-package")) == []


def test_an_old_python(monkeypatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert problems(packages.python)["Python"][1] == "install Python 3.11 or newer"


def test_the_oldest_python_is_that_of_the_package() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, packages.OLDEST_PYTHON))}"' in text
