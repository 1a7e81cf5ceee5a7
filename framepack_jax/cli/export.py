"""What a bundle or LoRA gives back: files for PyTorch, and a comparison with where it came from."""

import re
from pathlib import Path

from framepack_jax import bundle
from framepack_jax.conversion import export, hub, lora, tables, verify
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.utils.progress import Bar


def compare(source: Path, root: str, prefix: str | None = None) -> list[verify.Comparison]:
    """Every network that the checkpoint or pipeline at `source` and a bundle both have, compared;
    `prefix` as for `tables.recognise`. Raises ConversionError, BundleError."""
    manifest = bundle.read_manifest(root)
    if there := hub.split(str(source)):
        source = hub.fetch(*there, pipeline=None)
    plans = {
        role: verify.plan(path, manifest, role, prefix)
        for role, path in verify.sources(source, manifest).items()
    }
    tables.check_prefix(prefix, [plan.source for plan in plans.values()])
    results = []
    for role, plan in plans.items():
        size = bundle.stored_bytes(root, manifest, role)
        with byte_bar(role, size) as bar:
            results.append(verify.compare(plan, root, manifest, role, bar.update))
    return results


def export_role(
    root: str | None, role: str, target: Path, names: str | None, dtype: str | None
) -> str:
    """Write a network of the bundle at `root`, in those names; returns what was written. Raises
    ConversionError, BundleError."""
    if root is None:
        raise ConversionError("--export needs --bundle, the bundle to take the network from")
    if dtype in quantization.QUANTIZED:
        raise ConversionError(
            f"--export --dtype {dtype}: weights are exported in 16 or 32 bits; leave it out"
        )
    manifest, target = bundle.read_manifest(root), _here(target)
    single = target.suffix == ".safetensors"
    if names not in (None, *export.TABLES):
        raise ConversionError(
            f"--names {names}: expected one of {', '.join(export.TABLES)} for a network"
        )
    if not single and names not in (None, "diffusers"):
        raise ConversionError(
            f"--export {target} --names {names}: a folder for from_pretrained has diffusers'"
            " names; for others give a file that ends in .safetensors"
        )
    default = export.default_naming(manifest, role) if single else "diffusers"
    naming = names or default
    network = export.Export(root, manifest, role, naming, dtype)
    with byte_bar(role, network.nbytes) as bar:
        (network.single if single else network.folder)(target, bar.update)
    return (
        f"{target}: {role} of {root} in {naming} names,"
        f" {len(network.tensors):,} tensors, {network.nbytes / 1e6:,.1f} MB"
    )


def export_lora(file: Path, target: Path, names: str | None, root: str | None) -> str:
    """Write a LoRA file again in those names, for the transformer of the bundle at `root` or else
    the released one; returns what was written. Raises ConversionError, BundleError."""
    if names not in lora.NAMINGS:
        raise ConversionError(
            f"--lora {file} --names {names}: expected one of {', '.join(lora.NAMINGS)}"
        )
    target, cfg = _here(target), TransformerConfig()
    if target.exists():
        raise ConversionError(f"{target} is there already; choose another file, or take it away")
    if root:
        _, cfg = bundle.role_config(bundle.read_manifest(root), "transformer")
    found = lora.read(file, cfg)
    lora.write(target, found.lora, cfg, names, lora.about(file))
    said = f"{target}: {file} in {names} names ({found.summary()})"
    return "\n".join(filter(None, [said, (why := found.warning()) and f"warning: {file}: {why}"]))


def _here(path: Path) -> Path:
    """The path of a file on a disk. Raises ConversionError where it is of an object store."""
    if found := re.match(r"([a-z0-9]+):/", str(path)):
        raise ConversionError(
            f"--export {path}: files are not written to {found[1]}://; give a path here, and copy"
            " the result"
        )
    return path


def byte_bar(name: str, size: int) -> Bar:
    """A bar of bytes."""
    return Bar(total=size, desc=name, unit="B", unit_scale=True)
