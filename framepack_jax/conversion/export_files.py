"""Write a network of a bundle, or a LoRA, as files for PyTorch programs."""

import re
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax import bundle
from framepack_jax.conversion import export, lora, lora_names
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization
from framepack_jax.models.lora import file_of
from framepack_jax.utils.progress import byte_bar


def export_network(
    target: Path,
    root: epath.PathLike | None,
    role: str,
    dtype: str | None = None,
    key_format: str | None = None,
) -> str:
    """Write a network of a bundle to a .safetensors file or a folder for `from_pretrained`.

    Args:
        target: the file or folder.
        root: the bundle.
        role: the network.
        dtype: type of the written weights; default: the stored type.
        key_format: names of the tensors, one of `export.TABLES`.

    Returns a line that says what was written. Raises ConversionError, BundleError.
    """
    if root is None:
        raise ConversionError("framepack export needs --bundle, the bundle to read")
    if dtype in quantization.QUANTIZED:
        raise ConversionError(
            f"--dtype {dtype}: weights are exported in 16 or 32 bits; remove the flag"
        )
    _check_local(target)
    manifest = bundle.read_manifest(root)
    key_format = _key_format(target, manifest, role, key_format)
    network = export.Export(root, manifest, role, key_format, dtype)
    write = network.single if _is_file(target) else network.folder
    with byte_bar(role, network.nbytes) as bar:
        write(target, bar.update)
    return (
        f"{target}: {role} of {root} in {key_format} names,"
        f" {len(network.tensors):,} tensors, {network.nbytes / 1e6:,.1f} MB"
    )


def _key_format(target: Path, manifest: bundle.Manifest, role: str, given: str | None) -> str:
    """Return the names of the tensors. Raises ConversionError if the target cannot have them."""
    if given not in (None, *export.TABLES):
        raise ConversionError(
            f"--key-format {given}: expected one of {', '.join(export.TABLES)} for a network"
        )
    if _is_file(target):
        return given or export.default_naming(manifest, role)
    if given not in (None, "diffusers"):
        raise ConversionError(
            f"{target} --key-format {given}: a folder for from_pretrained has diffusers'"
            " names; for others give a file that ends in .safetensors"
        )
    return "diffusers"


def export_lora(
    target: Path, source: Path, root: epath.PathLike | None, key_format: str | None
) -> str:
    """Write a LoRA file, or that of a training run, under other names of its tensors.

    Args:
        target: the file to write.
        source: the LoRA file, or the folder of a training run.
        root: the bundle that the LoRA is for; default: the largest released model with its names.
        key_format: names of the tensors, of the family in `lora_names`.

    Returns lines that say what was written. Raises ConversionError, BundleError.
    """
    file = Path(file_of(source))
    cfg = _config_of(file, root)
    namings = lora_names.family_of(cfg).namings
    if key_format not in namings:
        raise ConversionError(
            f"--lora {file} --key-format {key_format}: expected one of {', '.join(namings)}"
        )
    _check_local(target)
    if target.exists():
        raise ConversionError(f"{target} exists already; choose another file, or remove it")
    found = lora.read(file, cfg)
    lora.write(target, found.lora, cfg, key_format, lora.about(file))
    lines = [f"{target}: {file} in {key_format} names ({found.summary()})"]
    if warning := found.warning():
        lines.append(f"warning: {file}: {warning}")
    return "\n".join(lines)


def _config_of(file: Path, root: epath.PathLike | None) -> Any:
    """Return the config of the network that a LoRA is for."""
    if root is not None:
        return bundle.role_config(bundle.read_manifest(root), "transformer")[1]
    return (lora.family_in(file) or lora_names.HUNYUAN).config


def _is_file(target: Path) -> bool:
    return target.suffix == ".safetensors"


def _check_local(target: Path) -> None:
    """Raise ConversionError if a path lies in an object store."""
    if found := re.match(r"([a-z0-9]+):/", str(target)):
        raise ConversionError(
            f"{target}: files are not written to {found[1]}://; give a local path, and copy the"
            " result"
        )
