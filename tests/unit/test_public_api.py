"""The names that `framepack_jax` exports, and how quickly it is imported."""

import subprocess
import sys

import pytest

import framepack_jax
from tests.fixtures.paths import ROOT


def test_all_exports_are_there() -> None:
    assert set(framepack_jax.EXPORTS) | {"__version__"} == set(framepack_jax.__all__)
    for name in framepack_jax.__all__:
        assert getattr(framepack_jax, name) is not None
    assert framepack_jax.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'Framepack'"):
        framepack_jax.Framepack  # noqa: B018


def test_commands_parse_flags_without_jax() -> None:
    """So that `import framepack_jax` and `--help` are quick."""
    light = "sample", "resume", "decode"
    modules = ", ".join(f"framepack_jax.cli.{name}" for name in light)
    program = f"import sys, framepack_jax, framepack_jax.__main__, {modules}"
    program += (
        "; heavy = {'jax', 'numpy', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
