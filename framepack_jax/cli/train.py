"""`framepack train`: train a FramePack model on a dataset."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import tyro

from framepack_jax import bundle
from framepack_jax.cli.common import (
    ALONE,
    MultihostFlags,
    cli_errors,
    configure_jax,
    configure_jax_for_dry_run,
    parse_size,
)
from framepack_jax.parallel import hardware, sharding
from framepack_jax.parallel.multihost import on_primary
from framepack_jax.planning.training import dry_run_training
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.export import export
from framepack_jax.training.flow_matching_task import open_task
from framepack_jax.training.trainer import NonFiniteLoss, Trainer
from framepack_jax.utils.flags import parse

T = TypeVar("T")
FAILURES = (ValueError, OSError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Train(TrainConfig):
    """Train a FramePack model.

    Every field of the configuration is a flag, which overrides --config FILE. The run folder,
    --output, holds checkpoints, log.jsonl, tensorboard/, validation/ and at the end bundle/. Run
    the same command again to resume an interrupted run.
    """

    config: Path | None = None
    """Python file that defines get_config(), for example configs/tiny.py."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the last checkpoint in --output, if any. never: an existing run is an
    error."""
    mesh: str | None = None
    """Mesh axes and their sizes: fsdp=8 or data=4,fsdp=16,tensor=2. The product of the sizes is the
    number of devices. Default: all devices on fsdp."""
    export: bool = True
    """Export the last step as a bundle, or adapters as a LoRA file."""
    dry_run: str | None = None
    """Machine: v5p-64, h100:8, a100-80g:8. Compile the training step for it and report whether it
    fits, without training; exit code 0 if it fits, else 1. Needs neither a dataset nor weights: the
    bundles framepack_i2v and framepack_f1 are the released models without weights."""
    dry_run_size: str = "608x640"
    """Height and width in pixels of the bucket that --dry-run compiles."""
    multihost: tyro.conf.OmitArgPrefixes[MultihostFlags] = ALONE


CONFIG_FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def main(args: list[str] | None = None, prog: str = "train.py") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    args = sys.argv[1:] if args is None else args
    with training_errors():
        _run(parse(Train, args, prog, defaults(Train, TrainConfig, args)))


def training_errors() -> AbstractContextManager[None]:
    """Handle the errors of a training command, and print how long it took."""
    # For signals before the first or after the last step; in between, the trainer saves and ends.
    interrupted = "interrupted; saved steps are kept; run the same command again to resume"
    return cli_errors(FAILURES, explain=_explained, interrupted=interrupted, duration=True)


def _run(flags: Train) -> None:
    cfg = TrainConfig(**{name: getattr(flags, name) for name in CONFIG_FIELDS})
    if flags.dry_run is not None:
        return _dry_run(cfg, flags)
    _check(cfg)
    configure_jax()
    flags.multihost.join()
    sizes = sharding.parse_mesh(flags.mesh) if flags.mesh else {"fsdp": jax.device_count()}
    mesh = sharding.make_mesh(**sizes)
    path = bundle.resolve(cfg.bundle)
    trainer = Trainer(open_task(cfg, path, mesh), in_first_only(print))
    step = trainer.fit(resume=flags.resume == "auto")
    if step < cfg.steps:
        on_primary(print, f"{cfg.output}: stopped after step {step} of {cfg.steps}, which is saved;"
                 " run the same command again to resume")  # fmt: skip
        return
    on_primary(print, f"{cfg.output}: {step} steps; {cfg.output}/log.jsonl has the metrics")
    if flags.export:
        on_primary(print, on_primary(_export, f"{cfg.output}@{step}", path))


def _export(run: str, path: Any) -> str:
    """Export the bundle of a finished run. With several processes, a separate process exports it,
    because Orbax reads and writes collectively."""
    if jax.process_count() == 1:
        return export(run, None, path, overwrite=True)
    command = [sys.executable, "-m", "framepack_jax", "export-run", run, "--bundle", str(path)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([*command, "--overwrite"], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the run is complete, but its export failed: {done.stderr[-500:]}")
    return done.stdout.splitlines()[0]


def _dry_run(cfg: TrainConfig, flags: Train) -> None:
    """Compile for another machine; exit with code 1 if the step does not fit."""
    if not cfg.bundle:
        raise ValueError("give --bundle: that of the run, or framepack_i2v for the released model")
    configure_jax_for_dry_run()
    size = parse_size("--dry-run-size", flags.dry_run_size)
    report = dry_run_training(
        cfg, bundle.resolve(cfg.bundle), hardware.parse(flags.dry_run),
        sharding.parse_mesh(flags.mesh) if flags.mesh else None, size,
    )  # fmt: skip
    print(report)
    if not report.fits:
        raise SystemExit(1)


def in_first_only(work: Any) -> Any:
    """Return a function that runs `work` in the first process only, without synchronisation."""
    return work if jax.process_index() == 0 else lambda *_: None


def defaults(flags: type[T], kind: type, args: list[str]) -> T:
    """Return default flags with the values of the file after --config, a configuration of type
    `kind`. Raises ValueError."""
    file = next(
        (a.partition("=")[2] or (args[i + 1] if i + 1 < len(args) else "")
         for i, a in enumerate(args) if a == "--config" or a.startswith("--config=")),
        None,
    )  # fmt: skip
    if file is None:
        return flags()
    path = Path(file).expanduser()
    cfg = read_config(path, kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return flags(**{name: getattr(cfg, name) for name in names}, config=path)


def read_config(file: Path, kind: type = TrainConfig) -> Any:
    """Return `get_config()` of a Python file. Raises ValueError with the file and the fault."""
    if not file.is_file():
        raise ValueError(
            f"--config {file} does not exist; see configs/, for example configs/tiny.py"
        )
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {file}: expected a Python file that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config()
    except Exception as error:  # a Python file can raise any error
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"--config {file} cannot be read: {line}") from error
    if not isinstance(cfg, kind):
        raise ValueError(
            f"--config {file}: get_config() returns a {type(cfg).__name__}, expected"
            f" {kind.__module__}.{kind.__name__}"
        )
    return cfg


def _check(cfg: TrainConfig) -> None:
    """Raise ValueError if a flag without a default is missing."""
    missing = {
        "--output": (cfg.output, "the run folder"),
        "--bundle": (cfg.bundle, "the bundle to train, or tiny"),
        "--data.path": (cfg.data.path, "a dataset made by framepack prepare"),
    }
    if absent := [f"{flag} ({what})" for flag, (given, what) in missing.items() if not given]:
        raise ValueError(f"give {', '.join(absent)}, or a --config that does")
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f'--wandb {cfg.wandb} needs Weights & Biases: pip install "framepack-jax[wandb]"'
        )
    looks = cfg.validation.every and cfg.validation.videos and cfg.data.holdout
    roles = ["transformer"] if cfg.init == "bundle" else []
    bundle.check_present(bundle.resolve(cfg.bundle), [*roles, *(["vae"] if looks else [])])


def _explained(error: Exception) -> str:
    line = str(error)
    if isinstance(error, NonFiniteLoss | ValueError | OSError):
        return line
    first = line.partition("\n")[0] or type(error).__name__
    if "RESOURCE_EXHAUSTED" in line or isinstance(error, MemoryError):
        return (
            f"out of memory ({first}); try --grad-accum-steps 2, --remat full or more devices;"
            " --dry-run reports what fits"
        )
    return first
