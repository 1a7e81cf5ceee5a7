"""Sampling, training, converting and preparing work without the packages of the extra [eval]."""

import subprocess
import sys

import pytest

from framepack_jax import packing
from framepack_jax.__main__ import COMMANDS
from framepack_jax.cli.evaluate import Evaluate
from framepack_jax.cli.explain import Explain
from framepack_jax.cli.prepare import Prepare
from framepack_jax.data.scenes import SceneSettings
from framepack_jax.generation.settings import Settings
from framepack_jax.utils import extras

WITHOUT_EVAL = f"""
import contextlib, importlib, io, sys
for module in {list(extras.EVAL)}:
    sys.modules[module] = None
import framepack_jax
from framepack_jax import FramePack
from framepack_jax.__main__ import main as framepack
for command in ("sample", "train", "convert", "prepare"):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            framepack([command, "--help"])
        except SystemExit as left:
            assert not left.code, (command, left.code)
    assert "usage" in out.getvalue(), command
framepack(["evaluate", "--bundle", "random", "--output", "out"])
"""


def test_the_core_does_without_the_extra_eval(tmp_path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_EVAL], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 1, ran.stderr
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith("error: framepack evaluate needs OpenCV (") and "Matplotlib (" in line
    assert line.endswith('pip install "framepack-jax[eval]"')
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_installed_is_not_asked_for() -> None:
    extras.require("eval", extras.EVAL, "this")
    with pytest.raises(extras.MissingExtra, match=r"this needs a thing \(.*framepack-jax\[x\]"):
        extras.require("x", {"no_module_of_this_name": "a thing"}, "this")


def test_evaluate_samples_with_the_defaults_of_the_release() -> None:
    flags = Evaluate()
    assert (flags.steps, flags.sampler, flags.distilled_guidance, flags.cfg_scale) == (
        Settings().steps, Settings().sampler,
        Settings().distilled_guidance, Settings().cfg_scale,
    )  # fmt: skip


def test_flags_written_out_for_a_quick_help_are_the_defaults_of_the_library() -> None:
    assert Explain().schedule == packing.RELEASED_INVERTED
    assert Prepare.scene_threshold == SceneSettings.cut


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_import_jax(command) -> None:
    program = f"""
import sys
sys.modules["jax"] = None
from framepack_jax.__main__ import main
main([{command!r}, "--help"])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0 and "usage" in ran.stdout, ran.stderr


def test_sampling_does_not_import_torch() -> None:
    """It would take seconds of each run, where torch is installed."""
    program = """
import sys
from framepack_jax import bundle, conditioning
from framepack_jax.cli import session
conditioning.load_tokenizer(bundle.resolve("random") / "tokenizer")
assert "torch" not in sys.modules, "torch"
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
