"""`framepack export-run`: a training run becomes a bundle, or its adapters a LoRA file."""

import dataclasses
from typing import Annotated, Literal

import tyro

from framepack_jax import bundle
from framepack_jax.cli.common import cli_errors
from framepack_jax.training import checkpoints
from framepack_jax.training.export import export
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class ExportRun:
    """Make a bundle of a training run, or LoRA files of its adapters."""

    run: Annotated[str, tyro.conf.Positional]
    """RUN or RUN@STEP; the newest checkpoint by default."""
    output: str | None = None
    """Folder of the bundle, or of the LoRA files of adapters (lora.safetensors in diffusers' names,
    lora_original.safetensors in those that other programs read), or a .safetensors file for the
    first of these; default: RUN/bundle."""
    bundle: str | None = None
    """The bundle that the run was trained from, where it has moved."""
    weights: Literal["auto", "average", "last"] = "auto"
    """The moving average of the parameters, or the parameters as they are after the step; auto: the
    average where the run keeps one."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """Type of the trained weights; default: bfloat16, of adapters float32."""
    copy: bool = False
    """Copy the other networks; by default the bundle points to them where they are."""
    overwrite: bool = False
    """Replace a bundle, or LoRA files, that are there already."""


def main(args: list[str] | None = None, prog: str = "framepack export-run") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = parse(ExportRun, args, prog)
    with cli_errors(duration=True):
        folder, _ = checkpoints.parse_run(flags.run)
        given = flags.bundle or checkpoints.read_record(folder)["config"]["bundle"]
        print(
            export(
                flags.run, flags.output, bundle.resolve(given),
                weights=flags.weights, dtype=flags.dtype, copy=flags.copy,
                overwrite=flags.overwrite,
            )
        )  # fmt: skip
