"""Recognise what can be shared: a bundle, a LoRA, or an exported network."""

import dataclasses
from pathlib import Path
from typing import Literal

from framepack_jax import bundle
from framepack_jax.conversion import lora, tables
from framepack_jax.conversion.weight_files import open_checkpoint

EXPECTED = (
    "expected a bundle (a folder with bundle.json), a LoRA (a .safetensors file, or a folder of"
    " such files, as RUN/bundle of a training run), or a folder that framepack export wrote"
)
WEIGHTS, CONFIG = "*.safetensors", "config.json"


class PublishError(ValueError):
    """A path or repository that cannot be shared; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What a path holds. `files` are LoRA files, `role` is the network of an exported folder."""

    kind: Literal["bundle", "LoRA", "network"]
    path: Path
    files: tuple[Path, ...] = ()
    role: str = ""


def recognise(path: Path) -> Artifact:
    """Return what a path holds, by its content. Raises PublishError, ConversionError or BundleError
    for anything else, and for a part that is missing."""
    if not path.exists():
        raise PublishError(f"{path} does not exist; {EXPECTED}")
    if (path / bundle.UNFINISHED).exists():
        raise PublishError(f"{path} is an unfinished bundle; run framepack convert again first")
    if (path / bundle.MANIFEST).exists():
        bundle.check_present(path, bundle.read_manifest(path).roles)
        return Artifact("bundle", path, _weights(path))
    if (path / "checkpoints").exists():
        raise PublishError(
            f"{path} is a training run; give {path / 'bundle'}, which framepack export-run {path}"
            " makes"
        )
    files = _weights(path)
    if files and all(lora.is_lora(open_checkpoint(file)) for file in files):
        return Artifact("LoRA", path, files)
    if files and (path / CONFIG).exists() and (roles := tables.networks(open_checkpoint(path))):
        return Artifact("network", path, role=next(iter(roles)))
    raise PublishError(f"{path} holds nothing that can be shared; {EXPECTED}")


def _weights(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a folder, or the path itself if it is one."""
    found = path.glob(WEIGHTS) if path.is_dir() else [path] if path.match(WEIGHTS) else []
    return tuple(file for file in sorted(found) if file.name != bundle.CODEBOOK)


def command(artifact: Artifact, place: str) -> str:
    """Return the command that uses an artifact at `place`, a folder or the name of a bundle."""
    if artifact.kind == "bundle":
        return f'framepack sample --bundle {place} --image photo.jpg --prompt "..."'
    if artifact.kind == "LoRA":
        file = f"{place}/{artifact.files[0].name}"
        return f'framepack sample --bundle BUNDLE --lora {file} --image photo.jpg --prompt "..."'
    flag = artifact.role.replace("_", "-")
    return f"framepack convert --{flag} {place} --encoders-from BUNDLE --output NEW"
