"""One video on many devices, from the command line: eight of them, made of this CPU.

Decoding is left to test_sharding.py: to compile it for eight devices takes minutes.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from framepack_jax.cli import sample
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.compiling import quick_flags
from tests.fixtures.paths import ROOT
from tests.fixtures.torch_reference import relative_error

FLAGS = (
    "--bundle", "random", "--image", str(ROOT / "examples" / "astronaut.jpg"), "--prompt", "waves",
    "--schedule", "f1k1_x_f16k4f2k2f1k1_g2", "--sections", "2", "--steps", "2",
    "--height", "64", "--width", "64", "--latents-only",
)  # fmt: skip
PROGRAM = """
import sys
import jax
from framepack_jax import bundle
from framepack_jax.cli import sample
from framepack_jax.diffusion import sampler

load, shares = bundle.load_params, []

def watch(root, manifest, name, **options):
    params = load(root, manifest, name, **options)
    if name == "transformer":
        whole = sum(leaf.size for leaf in jax.tree.leaves(params))
        here = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params))
        print("share", here / whole)
    return params

bundle.load_params = watch
sample.main(sys.argv[1:])
print("programs", sampler.step._cache_size())
"""


def on_devices(count: int, *flags: str) -> str:
    """Run `sample.py` where there are `count` devices; returns what it printed."""
    env = os.environ | {"XLA_FLAGS": quick_flags(count)}
    command = [sys.executable, "-c", PROGRAM, *FLAGS, *flags]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("alone")
    sample.main([*FLAGS, "--output", str(folder)])
    return RunDir.open(folder)


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=4,context=2",
        pytest.param("fsdp=4,tensor=2", marks=pytest.mark.slow),
        pytest.param("fsdp=8", marks=pytest.mark.slow),
    ],
)
def test_many_devices_make_the_same_video(alone, tmp_path, mesh: str) -> None:
    printed = on_devices(8, "--mesh", mesh, "--output", str(tmp_path))
    # Small vectors are whole on every device, the rest is divided.
    share = float(printed.split("share ")[1].split()[0])
    assert share < (0.25 if mesh == "fsdp=8" else 0.4)
    assert "programs 1\n" in printed, "the step was compiled again"
    ours, theirs = RunDir.open(tmp_path), alone
    assert ours.record["frames"] == theirs.record["frames"]
    for position, z in theirs.latents().items():
        assert relative_error(ours.latents()[position], z) < 1e-4
        assert np.isfinite(z).all()


@pytest.mark.parametrize(
    ("mesh", "named"),
    [
        ("context=4,fsdp=2", "context=4 does not divide the 2 attention heads"),
        ("data=8", "batch = 1 on a mesh with data=8: devices would make the same video"),
    ],
)
def test_meshes_that_do_not_serve_are_refused(mesh: str, named: str) -> None:
    env = os.environ | {"XLA_FLAGS": quick_flags(8)}
    command = [sys.executable, "sample.py", *FLAGS, "--mesh", mesh]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert named in done.stderr.replace("\n", " ")


def test_a_mesh_of_another_size_is_refused(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*8"):
        sample.main([*FLAGS, "--mesh", "fsdp=8", "--output", str(tmp_path)])
