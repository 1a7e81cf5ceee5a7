"""`framepack train`: train a FramePack model on a dataset."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from framepack_jax.cli.common import ALONE, MultihostFlags, cli_errors, parse_size
from framepack_jax.cli.config_file import defaults
from framepack_jax.training.config import TrainConfig
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class Train(TrainConfig):
    """Train a FramePack model.

    Every field of the configuration is a flag, which overrides --config FILE. The run folder,
    --output, holds checkpoints, log.jsonl, tensorboard/, validation/ and at the end bundle/. Run
    the same command again to resume an interrupted run.
    """

    config: Path | None = None
    """Name of a configuration of this package, for example lora_i2v, or a Python file that defines
    get_config()."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the last checkpoint in --output, if any. never: an existing run is an
    error."""
    mesh: str | None = None
    """Mesh axes and their sizes: fsdp=8 or data=4,fsdp=16,tensor=2. The product of the sizes is the
    number of devices. Default: fsdp within a node or TPU slice if parameters and optimizer state
    take at most half of a device, else over several; data across. auto: compile the step for
    several meshes, minutes each, and take the fastest by the model of the dry run."""
    export: bool = True
    """Export the last step as a bundle, or adapters as a LoRA file."""
    dry_run: str | None = None
    """Machine: v5p-64, 2*v5e-256, h100:8, a100-80g:8. Compile the training step for it and report
    whether it fits, without training; exit code 0 if it fits, else 1. Needs neither a dataset nor
    weights: the bundles framepack_i2v and framepack_f1 are the released models without weights."""
    dry_run_size: str = "608x640"
    """Height and width in pixels of the bucket that --dry-run compiles."""
    multihost: tyro.conf.OmitArgPrefixes[MultihostFlags] = ALONE


def main(args: list[str] | None = None, prog: str = "train.py") -> None:
    """Parse flags and train; user errors end with one line and exit code 1."""
    args = sys.argv[1:] if args is None else args
    with cli_errors():
        flags = parse(Train, args, prog, defaults(Train, TrainConfig, args))
    # JAX is imported after the flags are parsed, so that --help is quick.
    from framepack_jax.cli import training

    names = [field.name for field in dataclasses.fields(TrainConfig)]
    with training.training_errors():
        cfg = TrainConfig(**{name: getattr(flags, name) for name in names})
        if flags.dry_run is None:
            resume = flags.resume == "auto"
            training.train(cfg, flags.mesh, flags.multihost, resume=resume, export=flags.export)
        else:
            size = parse_size("--dry-run-size", flags.dry_run_size)
            training.dry_run(cfg, flags.dry_run, flags.mesh, size)
