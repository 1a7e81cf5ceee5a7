"""What a dry run says of a program, on devices of this CPU in place of another machine's."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from framepack_jax import topology
from framepack_jax.commands import dry_run, sample

ROOT = Path(__file__).parent.parent
# A loop of five rounds that gathers 8 x 4 float32 in each, and one sum outside of it.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from framepack_jax.commands.dry_run import collectives

mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
rows, whole = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P())

def step(x, w):
    w = jax.lax.with_sharding_constraint(w, whole)
    return jnp.tanh(x @ w), None

def run(x, weights):
    return jax.lax.scan(step, x, weights)[0]

x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=whole)
w = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
text = jax.jit(run, out_shardings=whole).lower(x, w).compile().as_text()
print(collectives(text))
"""


@pytest.fixture
def this_cpu(monkeypatch):
    monkeypatch.setattr(topology, "compile_devices", lambda machine: jax.devices()[: machine.count])


def test_collectives_of_a_loop_count_as_often_as_it_runs() -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str({"all-gather": (5, 5 * 8 * 8 * 4)})


FLAGS = ("--bundle", "tiny", "--height", "64", "--width", "80")


@pytest.mark.parametrize("more", [(), ("--step-cache", "tea"), ("--cfg", "3", "--batch", "2")])
def test_the_real_step_is_compiled(this_cpu, capsys, more) -> None:
    sample.main([*FLAGS, "--dtype", "float32", "--dry-run", "h200:1", *more])
    printed = capsys.readouterr().out
    assert "331,168" in printed and ": fits" in printed
    assert "64 x 80 pixels" in printed and "counted from the config" in printed


def test_what_does_not_fit_ends_with_code_1(this_cpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(dry_run.Report, "total", property(lambda report: 200 * 10**9))
    with pytest.raises(SystemExit) as ended:
        sample.main([*FLAGS, "--dry-run", "h200:1"])
    assert ended.value.code == 1
    assert "does not fit, 49.9 GB too much" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--dry-run", "h300:1"), "machine 'h300:1' is unknown"),
        (("--dry-run", "h200:1", "--mesh", "fsdp=2"), "2"),
        (("--dry-run", "h200:1", "--mesh", "fspd=1"), "fspd"),
    ],
)
def test_errors_name_what_is_wrong(this_cpu, more, named) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        sample.main([*FLAGS, *more])
