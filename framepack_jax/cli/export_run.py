"""`framepack export-run`: export a training run as a bundle, or its adapters as a LoRA file."""

import dataclasses
from typing import Annotated, Literal

import tyro

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import IN_STORES


@dataclasses.dataclass(frozen=True)
class ExportRun:
    """Export a training run as a bundle, or its adapters as LoRA files."""

    run: Annotated[str, IN_STORES, tyro.conf.Positional]
    """RUN or RUN@STEP; default: the newest checkpoint."""
    output: Annotated[str | None, IN_STORES] = None
    """Folder of the bundle, or of the LoRA files: lora.safetensors with the tensor names of
    diffusers, and lora_original.safetensors with those of other programs. A .safetensors file gets
    the names of diffusers. Default: RUN/bundle."""
    bundle: Annotated[str | None, IN_STORES] = None
    """The bundle that the run was trained from, if it has moved."""
    weights: Literal["auto", "average", "last"] = "auto"
    """Export the moving average of the parameters, or the parameters of the step; auto: the average
    if the run has one."""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """Type of the trained weights; default: bfloat16, for adapters float32."""
    copy: bool = False
    """Copy the other networks into the bundle instead of linking to them."""
    overwrite: bool = False
    """Replace an existing bundle or LoRA files."""


def main(args: list[str] | None = None, prog: str = "framepack export-run") -> None:
    """Parse flags and export; user errors end with one line and exit code 1."""
    flags = parse(ExportRun, args, prog)
    # JAX is imported after the flags are parsed, so that --help is quick.
    from framepack_jax import bundle
    from framepack_jax.training import checkpoints
    from framepack_jax.training.export import export

    with cli_errors(duration=True):
        path = bundle.resolve(flags.bundle or checkpoints.record_of(flags.run)["config"]["bundle"])
        print(
            export(
                flags.run, flags.output, path,
                weights=flags.weights, dtype=flags.dtype, copy=flags.copy,
                overwrite=flags.overwrite,
            )
        )  # fmt: skip
