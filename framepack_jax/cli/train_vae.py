"""`framepack train-vae`: train a VAE on a folder of videos and export it as a bundle."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from framepack_jax.cli.common import cli_errors
from framepack_jax.cli.config_file import defaults
from framepack_jax.training.vae_config import VaeTrainConfig
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class TrainVae(VaeTrainConfig):
    """Train the VAE of a bundle, or a new VAE of another size, on a folder of videos.

    Every field of the configuration is a flag, which overrides --config FILE. The run folder,
    --output, holds checkpoints, log.jsonl, validation/ and at the end bundle/. Run the same command
    again to resume an interrupted run. Training uses all devices of one host.
    """

    config: Path | None = None
    """Name of a configuration of this package, for example tiny_vae, or a Python file that defines
    get_config()."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the last checkpoint in --output, if any. never: an existing run is an
    error."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights in the bundle."""


def main(args: list[str] | None = None, prog: str = "framepack train-vae") -> None:
    """Parse flags and train; user errors end with one line and exit code 1."""
    args = sys.argv[1:] if args is None else args
    with cli_errors():
        flags = parse(TrainVae, args, prog, defaults(TrainVae, VaeTrainConfig, args))
    # JAX is imported after the flags are parsed, so that --help is quick.
    from framepack_jax.cli import training

    names = [field.name for field in dataclasses.fields(VaeTrainConfig)]
    with training.training_errors():
        cfg = VaeTrainConfig(**{name: getattr(flags, name) for name in names})
        training.train_vae(cfg, resume=flags.resume == "auto", dtype=flags.dtype)
