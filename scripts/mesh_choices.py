"""Check `--mesh auto`: does its choice come near the best of all meshes?

python scripts/mesh_choices.py [MACHINE ...]

All meshes of a workload have the same roofline, and no modelled step is shorter. So if a mesh that
`--mesh auto` compiles fits and takes at most a tenth more than the roofline, its choice is within
10 % of the best of all, and no other mesh is compiled. Else all are compiled, and the choice is
compared with the best. Prints a table in Markdown, and each mesh to stderr as soon as it is
compiled; the exit code is 1 if a choice is more than 10 % slower. Each mesh takes minutes.
"""

import dataclasses
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
from framepack_jax.planning.training import TrainingReport, dry_run_training
from framepack_jax.training.config import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE = (608, 640)
# Machine: configuration and batch.
WORKLOADS = {
    "h100:8": ("lora_i2v", 8),
    "h100:16": ("finetune_i2v", 16),
    "gb200:8": ("finetune_i2v", 8),
    "v5p-32": ("finetune_i2v", 16),
    "2*v5p-16": ("lora_i2v", 16),
}
ALLOWED = 1.1


def main(names: list[str]) -> None:
    """Compile meshes of the workloads, and print a row for each workload."""
    jax.config.update("jax_enable_compilation_cache", False)
    print("| machine, run, batch | meshes | compiled | chosen | its step | no mesh is below |")
    print("|---|--:|--:|---|--:|--:|", flush=True)
    slower = [name for name in names or WORKLOADS if not check(name)]
    if slower:
        raise SystemExit(f"error: more than 10 % slower than the best: {', '.join(slower)}")


def check(name: str) -> bool:
    """Print the row of a workload; return True if the choice is near the best."""
    config, batch = WORKLOADS[name]
    cfg = dataclasses.replace(read_config(CONFIGS / f"{config}.py", TrainConfig), batch=batch)
    machine, path = hardware.parse(name), bundle.resolve(cfg.bundle)
    devices = hardware.compile_devices(machine)
    order = mesh_choice.rank(cfg, bundle.read_manifest(path), machine, devices, SIZE)
    reports: list[TrainingReport] = []
    chosen: TrainingReport | None = None
    for sizes in order:
        reports.append(dry_run_training(cfg, path, machine, sizes, SIZE, devices))
        print(f"{name}: {mesh_choice.summary(reports[-1])}", file=sys.stderr, flush=True)
        if chosen is None and (near(reports[-1]) or mesh_choice.is_enough(reports)):
            chosen = min(reports, key=mesh_choice.quality)
        if chosen is not None and near(chosen):
            break
    best = min(reports, key=mesh_choice.quality)
    chosen = chosen or best
    bound = chosen.roofline_seconds if near(chosen) else best.step_seconds
    sizes = ", ".join(f"{axis} {n}" for axis, n in chosen.mesh.items() if n > 1)
    cells = [f"`{name}`, {config}, {batch}", f"{len(order)}", f"{len(reports)}", sizes]
    cells += [f"{chosen.step_seconds:.3f} s", f"{bound:.3f} s"]
    print("| " + " | ".join(cells) + " |", flush=True)
    return chosen.step_seconds <= ALLOWED * bound


def near(report: TrainingReport) -> bool:
    return report.fits and mesh_choice.near_roofline(report, ALLOWED)


if __name__ == "__main__":
    main(sys.argv[1:])
