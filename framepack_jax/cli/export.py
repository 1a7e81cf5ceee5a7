"""`framepack export`: write a network of a bundle, or a LoRA, for PyTorch."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from framepack_jax import bundle
from framepack_jax.cli.common import cli_errors
from framepack_jax.conversion import export, lora
from framepack_jax.conversion.request import Dtype, long_dtype
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.lora import file_of
from framepack_jax.parallel import hardware
from framepack_jax.utils.flags import parse
from framepack_jax.utils.progress import byte_bar


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a network of a bundle, or a LoRA, for PyTorch."""

    target: Annotated[Path, Positional]
    """A .safetensors file; or a folder for from_pretrained of diffusers and transformers."""
    bundle: str | None = None
    """The bundle: a folder, or a bundle of this package by its name."""
    role: Literal["transformer", "vae", "text_encoder_2", "image_encoder"] = "transformer"
    """The network to write."""
    dtype: Dtype | None = None
    """Type of the written weights; default: the stored type."""
    key_format: str | None = None
    """Names of the tensors in a file: diffusers, original (HunyuanVideo's, also read by ComfyUI) or
    comfyui (ComfyUI's own); default: original, and diffusers for FramePack models, which have no
    other names. Of a LoRA: diffusers; original, which all programs read; kohya (of musubi-tuner) or
    kohya-tencent; comfyui."""
    lora: Path | None = None
    """Instead of a network: a LoRA file, or a training run of one, to write again in another
    --key-format, for the transformer of --bundle or else the released one."""


def main(args: list[str] | None = None, prog: str = "framepack export") -> None:
    """Parse flags and export; user errors end with one line and exit code 1."""
    flags = parse(Export, args, prog)
    hardware.quiet_libtpu()
    with cli_errors(duration=True):
        print(_export_network(flags) if flags.lora is None else _export_lora(flags, flags.lora))


def _export_network(flags: Export) -> str:
    """Write a network; return what was written. Raises ConversionError, BundleError."""
    if flags.bundle is None:
        raise ConversionError("framepack export needs --bundle, the bundle to read")
    dtype, root = long_dtype(flags.dtype), bundle.resolve(flags.bundle)
    if dtype in quantization.QUANTIZED:
        raise ConversionError(
            f"--dtype {dtype}: weights are exported in 16 or 32 bits; remove the flag"
        )
    _check_local(flags.target)
    manifest = bundle.read_manifest(root)
    key_format = _key_format(flags, manifest)
    network = export.Export(root, manifest, flags.role, key_format, dtype)
    write = network.single if _is_file(flags.target) else network.folder
    with byte_bar(flags.role, network.nbytes) as bar:
        write(flags.target, bar.update)
    return (
        f"{flags.target}: {flags.role} of {root} in {key_format} names,"
        f" {len(network.tensors):,} tensors, {network.nbytes / 1e6:,.1f} MB"
    )


def _key_format(flags: Export, manifest: bundle.Manifest) -> str:
    """Return the names of the tensors. Raises ConversionError if the target cannot have them."""
    given = flags.key_format
    if given not in (None, *export.TABLES):
        raise ConversionError(
            f"--key-format {given}: expected one of {', '.join(export.TABLES)} for a network"
        )
    if _is_file(flags.target):
        return given or export.default_naming(manifest, flags.role)
    if given not in (None, "diffusers"):
        raise ConversionError(
            f"{flags.target} --key-format {given}: a folder for from_pretrained has diffusers'"
            " names; for others give a file that ends in .safetensors"
        )
    return "diffusers"


def _export_lora(flags: Export, source: Path) -> str:
    """Write a LoRA in other names; return what was written. Raises ConversionError, BundleError."""
    if flags.dtype or flags.role != "transformer":
        raise ConversionError(
            "--lora is of the transformer and keeps its types; remove --dtype and --role"
        )
    file, key_format = Path(file_of(source)), flags.key_format
    if key_format not in lora.NAMINGS:
        raise ConversionError(
            f"--lora {file} --key-format {key_format}: expected one of {', '.join(lora.NAMINGS)}"
        )
    _check_local(flags.target)
    if flags.target.exists():
        raise ConversionError(f"{flags.target} exists already; choose another file, or remove it")
    cfg = TransformerConfig()
    if flags.bundle:
        manifest = bundle.read_manifest(bundle.resolve(flags.bundle))
        _, cfg = bundle.role_config(manifest, "transformer")
    found = lora.read(file, cfg)
    lora.write(flags.target, found.lora, cfg, key_format, lora.about(file))
    lines = [f"{flags.target}: {file} in {key_format} names ({found.summary()})"]
    if warning := found.warning():
        lines.append(f"warning: {file}: {warning}")
    return "\n".join(lines)


def _is_file(target: Path) -> bool:
    return target.suffix == ".safetensors"


def _check_local(target: Path) -> None:
    """Raise ConversionError if a path lies in an object store."""
    if found := re.match(r"([a-z0-9]+):/", str(target)):
        raise ConversionError(
            f"{target}: files are not written to {found[1]}://; give a local path, and copy the"
            " result"
        )
