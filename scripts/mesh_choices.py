"""Check `--mesh auto`: does its choice come near the best of all meshes?

python scripts/mesh_choices.py [--limit N] [MACHINE ...]

For each workload, compile the training step for every mesh of the ranking, or the first N, and
compare the modelled step of the mesh that `--mesh auto` would choose with the best of them. Prints
a table in Markdown, and each mesh to stderr as soon as it is compiled; the exit code is 1 if a
choice is more than 10 % slower. Each mesh takes minutes.
"""

import dataclasses
import logging
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

from framepack_jax import bundle
from framepack_jax.cli.config_file import read_config
from framepack_jax.parallel import hardware
from framepack_jax.planning import mesh_choice
from framepack_jax.training.config import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE = (608, 640)
# Machine: configuration and batch.
WORKLOADS = {
    "h100:8": ("lora_i2v", 8),
    "h100:16": ("finetune_i2v", 16),
    "gb200:8": ("finetune_i2v", 8),
    "v5p-32": ("finetune_i2v", 16),
    "2*v6e-8": ("lora_i2v", 16),
}
ALLOWED = 1.1


def main(args: list[str]) -> None:
    """Compile the meshes of the workloads, and print a row for each workload."""
    limit = int(args[1]) if args[:1] == ["--limit"] else sys.maxsize
    names = args[2:] if args[:1] == ["--limit"] else args
    logging.basicConfig(format="%(message)s")
    mesh_choice.LOGGER.setLevel(logging.INFO)
    jax.config.update("jax_enable_compilation_cache", False)
    print("| machine, run, batch | meshes | chosen | its step | best of all | its step |")
    print("|---|--:|---|--:|---|--:|", flush=True)
    slower = [name for name in names or WORKLOADS if not check(name, limit)]
    if slower:
        raise SystemExit(f"error: more than 10 % slower than the best: {', '.join(slower)}")


def check(name: str, limit: int) -> bool:
    """Print the row of a workload; return True if the choice is near the best."""
    config, batch = WORKLOADS[name]
    cfg = read_config(CONFIGS / f"{config}.py", TrainConfig)
    cfg = dataclasses.replace(cfg, batch=batch)
    machine, path = hardware.parse(name), bundle.resolve(cfg.bundle)
    every = mesh_choice.choose(cfg, path, machine, SIZE, limit=limit)
    # The choice is the best of the first few of the ranking, and of more until one fits.
    manifest = bundle.read_manifest(path)
    devices = hardware.compile_devices(machine)
    order = mesh_choice.rank(cfg, manifest, machine, devices, SIZE)
    by_rank = sorted(every, key=lambda report: order.index(report.mesh))
    first = next((i for i, report in enumerate(by_rank) if report.fits), len(by_rank) - 1)
    tried = by_rank[: max(mesh_choice.COMPILED, first + 1)]
    chosen, best = min(tried, key=mesh_choice.quality), every[0]
    cells = [f"`{name}`, {config}, {batch}", f"{len(every)}"]
    for report in (chosen, best):
        sizes = ", ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1)
        cells += [sizes, f"{report.step_seconds:.3f} s"]
    print("| " + " | ".join(cells) + " |", flush=True)
    return chosen.step_seconds <= ALLOWED * best.step_seconds


if __name__ == "__main__":
    main(sys.argv[1:])
