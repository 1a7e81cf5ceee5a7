"""`framepack export`: write a network of a bundle, or a LoRA, for PyTorch."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from framepack_jax.cli.common import cli_errors
from framepack_jax.conversion.request import Dtype, long_dtype
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import IN_STORES


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a network of a bundle, or a LoRA, for PyTorch."""

    target: Annotated[Path, Positional]
    """A .safetensors file; or a folder for from_pretrained of diffusers and transformers."""
    bundle: Annotated[str | None, IN_STORES] = None
    """The bundle: a folder, or a bundle of this package by its name."""
    role: Literal["transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder"] = (
        "transformer"
    )
    """The network to write."""
    dtype: Dtype | None = None
    """Type of the written weights; default: the stored type."""
    key_format: str | None = None
    """Names of the tensors in a file: diffusers, original (HunyuanVideo's or Wan's, also read by
    ComfyUI) or comfyui (ComfyUI's own); default: original, and diffusers for FramePack and Helios.
    Of a LoRA: diffusers; original, which all programs read; kohya (of musubi-tuner) or, for
    HunyuanVideo, kohya-tencent; comfyui."""
    lora: Path | None = None
    """Instead of a network: a LoRA file, or a training run of one, to write again in another
    --key-format, for the transformer of --bundle or else the released one."""


def main(args: list[str] | None = None, prog: str = "framepack export") -> None:
    """Parse flags and export; user errors end with one line and exit code 1."""
    flags = parse(Export, args, prog)
    from framepack_jax import bundle
    from framepack_jax.conversion import export_files
    from framepack_jax.parallel import hardware

    hardware.quiet_libtpu()
    root = None if flags.bundle is None else bundle.resolve(flags.bundle)
    dtype, key_format = long_dtype(flags.dtype), flags.key_format
    with cli_errors(duration=True):
        if flags.lora is None:
            print(export_files.export_network(flags.target, root, flags.role, dtype, key_format))
        else:
            if dtype or flags.role != "transformer":
                raise ValueError(
                    "--lora is of the transformer and keeps its types; remove --dtype and --role"
                )
            print(export_files.export_lora(flags.target, flags.lora, root, key_format))
