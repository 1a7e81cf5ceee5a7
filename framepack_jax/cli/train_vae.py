"""`framepack train-vae`: train a VAE on a folder of videos and export it as a bundle."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import jax

from framepack_jax import bundle
from framepack_jax.cli.common import configure_jax
from framepack_jax.cli.train import defaults, training_errors
from framepack_jax.parallel import sharding
from framepack_jax.training.trainer import Trainer
from framepack_jax.training.vae_config import VaeTrainConfig
from framepack_jax.training.vae_export import export
from framepack_jax.training.vae_task import open_task
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class TrainVae(VaeTrainConfig):
    """Train the VAE of a bundle, or a new VAE of another size, on a folder of videos.

    Every field of the configuration is a flag, which overrides --config FILE. The run folder,
    --output, holds checkpoints, log.jsonl, validation/ and at the end bundle/. Run the same command
    again to resume an interrupted run. Training uses all devices of one host.
    """

    config: Path | None = None
    """Python file that defines get_config(), for example configs/tiny_vae.py."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the last checkpoint in --output, if any. never: an existing run is an
    error."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights in the bundle."""


def main(args: list[str] | None = None, prog: str = "framepack train-vae") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    args = sys.argv[1:] if args is None else args
    with training_errors():
        _run(parse(TrainVae, args, prog, defaults(TrainVae, VaeTrainConfig, args)))


def _run(flags: TrainVae) -> None:
    names = [field.name for field in dataclasses.fields(VaeTrainConfig)]
    cfg = VaeTrainConfig(**{name: getattr(flags, name) for name in names})
    required = {"--videos": cfg.videos, "--bundle": cfg.bundle, "--output": cfg.output}
    if absent := [flag for flag, given in required.items() if not given]:
        raise ValueError(f"give {', '.join(absent)}, or a --config that does")
    configure_jax()
    path = bundle.resolve(cfg.bundle)
    mesh = sharding.make_mesh(data=jax.device_count())
    step = Trainer(open_task(cfg, path, mesh)).fit(resume=flags.resume == "auto")
    if step < cfg.steps:
        print(f"{cfg.output}: stopped after step {step} of {cfg.steps}, which is saved; run the"
              " same command again to resume")  # fmt: skip
        return
    print(export(f"{cfg.output}@{step}", path, f"{cfg.output}/bundle", dtype=flags.dtype))
