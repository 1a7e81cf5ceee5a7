"""Compare the schedules of the TPU's two attention kernels, as libtpu compiles them.

python scripts/attention_schedules.py [MACHINE ...]

A TPU core executes one bundle of instructions a cycle unless it waits for memory or the matrix
unit. For each chip, compile `ops/flash.py` and the forward pass of JAX's kernel "splash" at the
tiles of `ops/splash.py`, with padding after the last key, and count the bundles in which a tile of
queries meets a tile of keys. Prints a table in Markdown. No TPU is needed, and nothing is timed.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={tempfile.mkdtemp()} --xla_jf_dump_llo_text=true"
)

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from framepack_jax.ops import splash
from framepack_jax.parallel import hardware

MACHINES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
LENGTH, HEADS, WIDTH = 4096, 2, 128
DUMP = Path(os.environ["LIBTPU_INIT_ARGS"].split()[0].partition("=")[2])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    return splash.attend(q, k, v, valid, causal=False)


def with_residuals(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    return jax.vjp(lambda *qkv: attend(*qkv, valid), q, k, v)[0]


def main(machines: list[str]) -> None:
    print("| chip | tiles | splash | flash | last tile | flash / splash |")
    print("|---|---|--:|--:|--:|--:|", flush=True)
    for machine in machines or MACHINES:
        chip = hardware.compile_devices(hardware.parse(machine))[:1]
        mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=chip)
        with jax.set_mesh(mesh):
            tiles = splash._tiles(LENGTH, LENGTH, WIDTH)
            (theirs,) = blocks(with_residuals, mesh)[-1:]
            whole, last = sorted(blocks(attend, mesh)[-2:])
        print(
            f"| {machine.partition(':')[0]} | {tiles[0]} x {tiles[1]} | {theirs} | {whole} |"
            f" {last} | {whole / theirs:.2f} |",
            flush=True,
        )


def blocks(run: Callable[..., jax.Array], mesh: jax.sharding.Mesh) -> list[int]:
    """Return the lengths of the kernel's blocks without a branch, in bundles, the longest last."""
    where = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, WIDTH), jnp.bfloat16, sharding=where)
    valid = jax.ShapeDtypeStruct((1, LENGTH), jnp.bool_, sharding=where)
    before = set(DUMP.iterdir())
    jax.jit(run).lower(x, x, x, valid).compile()
    (schedule,) = (
        path
        for path in set(DUMP.iterdir()) - before
        if re.fullmatch(r"\d+-(flash|splash)[\w.]*-\d+-final_bundles\.txt", path.name)
    )
    lengths = [0]
    for line in schedule.read_text(errors="replace").splitlines():
        if re.match(r"\s*(0x[0-9a-f]+|0)\s", line):
            lengths[-1] += 1
            if re.search(r"= sbr|LB:|PF:", line):
                lengths.append(0)
    return sorted(lengths)


if __name__ == "__main__":
    main(sys.argv[1:])
