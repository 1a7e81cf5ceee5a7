"""Implement the training commands after their flags are parsed."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import jax
from etils import epath

from framepack_jax import bundle
from framepack_jax.cli.common import (
    FAILED,
    HOPELESS,
    MultihostFlags,
    cli_errors,
    configure_jax,
    configure_jax_for_dry_run,
)
from framepack_jax.data.records import DatasetError
from framepack_jax.parallel import hardware, multihost, sharding
from framepack_jax.parallel.multihost import assert_same_facts, is_primary, on_primary
from framepack_jax.planning import mesh_choice
from framepack_jax.planning.training import dry_run_training
from framepack_jax.training import flow_matching_task, vae_task
from framepack_jax.training.checkpoints import CheckpointError
from framepack_jax.training.config import RunConfig, TrainConfig
from framepack_jax.training.default_mesh import default_mesh
from framepack_jax.training.export import export as export_run
from framepack_jax.training.host_facts import command_facts
from framepack_jax.training.skips import TooManySkips
from framepack_jax.training.stop_signal import INTERRUPTED, StopSignal
from framepack_jax.training.trainer import Trainer
from framepack_jax.training.vae_config import VaeTrainConfig
from framepack_jax.training.vae_export import export as export_vae
from framepack_jax.utils.messages import first_line

# Value of --mesh that compiles several meshes, for a bucket of this height and width.
AUTO, BUCKET = "auto", (608, 640)
# Folder of a run on several hosts with compiled programs.
COMPILED = "compiled"
FAILURES = (ValueError, OSError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError)


def training_errors() -> AbstractContextManager[None]:
    """Handle the errors of a training command, and print how long it took."""
    # For signals before the first or after the last step; in between, the trainer saves and ends.
    return cli_errors(
        FAILURES, explain=_explained, code=_exit_code, interrupted=INTERRUPTED, duration=True
    )


def train(
    cfg: TrainConfig, mesh: str | None, hosts: MultihostFlags, *, resume: bool, export: bool
) -> None:
    """Train a transformer and export it. Raises ValueError, OSError, TooManySkips."""
    check_given(cfg, {
        "--output": (cfg.output, "the run folder"),
        "--bundle": (cfg.bundle, "the bundle to train, or tiny"),
        "--data.path": (" ".join(cfg.data.paths), "a dataset made by framepack prepare"),
    })  # fmt: skip
    decodes = cfg.validation.every and cfg.validation.videos and cfg.data.holdout
    roles = ["transformer"] * (cfg.init == "bundle") + ["vae"] * bool(decodes)
    path = bundle.resolve(cfg.bundle)
    bundle.check_present(path, roles)
    # The first process writes compiled programs, and all hosts read them.
    shared = f"{bundle.absolute(cfg.output)}/{COMPILED}" if hosts.coordinator_address else None
    configure_jax(shared, training=True)
    hosts.join()
    assert_same_facts(command_facts, cfg, mesh=mesh, resume=resume, export=export)
    with StopSignal(cfg.stop_seconds) as stop:
        devices = jax.devices()
        sizes = _mesh_sizes(cfg, path, mesh, devices)
        task = flow_matching_task.open_task(cfg, path, sharding.make_mesh(**sizes, devices=devices))
        step = Trainer(task, _print_on_primary(), stop).fit(resume)
        _end_if_stopped(cfg, step, stop)
        on_primary(print, f"{cfg.output}: {step} steps; {cfg.output}/log.jsonl has the metrics")
        if export:
            _export_alone(f"{cfg.output}@{step}", path)


def _mesh_sizes(
    cfg: TrainConfig, path: epath.PathLike, mesh: str | None, devices: Sequence[jax.Device]
) -> dict[str, int]:
    """Return the sizes of --mesh, of the best of several meshes, or by default."""
    if mesh == AUTO:
        machine = hardware.machine_of(devices)
        best = mesh_choice.choose(cfg, path, machine, BUCKET, devices)[0]
        on_primary(print, f"--mesh {mesh_choice.summary(best)}")
        return best.mesh
    if mesh:
        return sharding.parse_mesh(mesh)
    return default_mesh(cfg, bundle.read_manifest(path), devices)


def train_vae(cfg: VaeTrainConfig, *, resume: bool, dtype: Literal["bfloat16", "float32"]) -> None:
    """Train a VAE and export it. Raises ValueError, OSError, TooManySkips."""
    check_given(cfg, {
        "--videos": (cfg.videos, "a folder of videos"),
        "--bundle": (cfg.bundle, "the bundle to train"),
        "--output": (cfg.output, "the run folder"),
    })  # fmt: skip
    configure_jax()
    path = bundle.resolve(cfg.bundle)
    mesh = sharding.make_mesh(data=jax.device_count())
    with StopSignal(cfg.stop_seconds) as stop:
        step = Trainer(vae_task.open_task(cfg, path, mesh), stop=stop).fit(resume)
        _end_if_stopped(cfg, step, stop)
        print(export_vae(f"{cfg.output}@{step}", path, f"{cfg.output}/bundle", dtype=dtype))


def dry_run(cfg: TrainConfig, machine: str, mesh: str | None, size: tuple[int, int]) -> None:
    """Compile for another machine; exit with code 1 if the step does not fit."""
    if not cfg.bundle:
        raise ValueError("give --bundle: that of the run, or framepack_i2v for the released model")
    configure_jax_for_dry_run()
    path, parsed = bundle.resolve(cfg.bundle), hardware.parse(machine)
    if mesh == AUTO:
        report = mesh_choice.choose(cfg, path, parsed, size)[0]
    else:
        sizes = sharding.parse_mesh(mesh) if mesh else None
        report = dry_run_training(cfg, path, parsed, sizes, size)
    print(report)
    if not report.fits:
        raise SystemExit(1)


def check_given(cfg: RunConfig, required: dict[str, tuple[str | None, str]]) -> None:
    """Raise ValueError if a required flag, or the package of an option, is missing."""
    if absent := [f"{flag} ({what})" for flag, (given, what) in required.items() if not given]:
        raise ValueError(f"give {', '.join(absent)}, or a --config that does")
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f'--wandb {cfg.wandb} needs Weights & Biases: pip install "framepack-jax[wandb]"'
        )


def _end_if_stopped(cfg: RunConfig, step: int, stop: StopSignal) -> None:
    """If a signal has come before the export, say so and end with the exit code of the signal."""
    if step < cfg.steps or stop.called():
        text = f"stopped after step {step} of {cfg.steps}, which is saved"
        on_primary(print, f"{cfg.output}: {text}; run the same command again to resume")
        raise SystemExit(stop.exit_code)


def _print_on_primary() -> Callable[[str], None]:
    """Return a function that prints in the first process, and never waits for the others."""
    return print if is_primary() else lambda text: None


def _export_alone(run: str, path: epath.PathLike) -> None:
    """Export a finished run in the first process, and let the others end before."""
    if jax.process_count() == 1:
        print(export_run(run, None, path, overwrite=True))
        return
    first = is_primary()
    multihost.leave()
    if first:
        print(_exported(run, path))


def _exported(run: str, path: epath.PathLike) -> str:
    """Export a run in a process of its own, because Orbax reads and writes collectively; return a
    line about the result. Raises OSError."""
    command = [sys.executable, "-m", "framepack_jax", "export-run", run, "--bundle", str(path)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--overwrite"], env=env, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"the run is complete, but its export failed: {done.stderr[-500:]}")
    return done.stdout.splitlines()[0]


def _exit_code(error: Exception) -> int:
    """Tell what the same command would end with again from what may pass: a disk that is full or
    away, a lost process."""
    passing = isinstance(error, DatasetError | CheckpointError)
    lasting = isinstance(error, ValueError | TooManySkips) and not passing
    return HOPELESS if lasting else FAILED


def _explained(error: Exception) -> str:
    """Return the line that a command prints for an error."""
    if isinstance(error, TooManySkips | ValueError | OSError):
        return str(error)
    first = first_line(error)
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return (
            f"out of memory ({first}); try --grad-accum-steps 2, --remat full or more devices;"
            " --dry-run reports what fits"
        )
    return first
