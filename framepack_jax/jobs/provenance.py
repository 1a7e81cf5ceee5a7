"""Provenance of a run: its options, hashes of files and weights, versions; and the comparison of
two runs."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from framepack_jax import bundle
from framepack_jax.conversion.lora import files_of as lora_files
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.jobs.record import FORMAT
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.jobs.spec import ComputeOptions, ModelOptions, VideoSpec, source_file
from framepack_jax.models.lora import parse_weight
from framepack_jax.utils import compare
from framepack_jax.utils.messages import shorten
from framepack_jax.utils.versions import version

PACKAGES = ("framepack-jax", "jax", "jaxlib", "flax", "transformers", "av", "numpy")
# Values of flags that the oldest records lack.
EARLIER = {
    "lora": [],
    "merge_lora": False,
    "gif": False,
    "png": False,
    "history_noise": 0.0,
    "flow_shift": None,
}


def absolute(path: str | Path) -> str:
    """Return a path that is valid in every working directory."""
    return str(path) if "://" in str(path) else str(Path(path).absolute())


def new_record(
    spec: VideoSpec, model: ModelOptions, compute: ComputeOptions, pipe: FramePack
) -> dict[str, Any]:
    """Return the record of a new run: options, hashes of files and weights, versions."""
    path = bundle.resolve(model.bundle_name())
    values = dataclasses.asdict(spec) | dataclasses.asdict(model)
    values |= {"vae_tile": compute.vae_tile, "mesh": compute.mesh}
    adapters = [(absolute(file), weight) for file, weight in map(parse_weight, model.lora)]
    values["lora"] = [f"{file}:{weight:g}" for file, weight in adapters]
    hashes = {str(file): _sha256(file) for file in _files(spec)}
    hashes |= {file: _lora_sha256(Path(file)) for file, _ in adapters}
    return {
        "format": FORMAT,
        "status": "beginning",
        "flags": {name: _plain(value) for name, value in values.items()},
        "files_sha256": hashes,
        "bundle": absolute(path),
        "weights": weights(path),
        "schedule": str(pipe.schedule),
        "order": pipe.schedule.order,
        "dtype": pipe.dtype,
        "spans": [],
        "batch": [],
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "timings": {},
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """List how the record of an existing run differs from the requested one; "" if it does not.

    Files that no longer exist are not compared.
    """
    old, new = EARLIER | there["flags"], dict(here["flags"])
    if new["end_image_as"] == "auto":
        # The record of the run has the resolved value.
        new["end_image_as"] = old["end_image_as"]
    found = compare.differences(old, new, words=compare.THERE_HERE)
    hashes = there.get("files_sha256", {})
    for name, value in here["files_sha256"].items():
        if value is not None and hashes.get(name) != value:
            found.append(f"{name} has changed")
    for role, source in here["weights"].items():
        if source.get("sha256") != there["weights"].get(role, {}).get("sha256"):
            found.append(f"the {role} of the bundle has changed")
    return shorten(found)


def weights(path: str | Path) -> dict[str, Any]:
    """Return the sources of a bundle's networks with their hashes, by role, without their training
    records; and the hash of its codebook, if it has one."""
    sources: dict[str, Any] = {
        name: {field: value for field, value in role.source.items() if field != "training"}
        for name, role in bundle.read_manifest(path).roles.items()
    }
    codebook = epath.Path(path) / bundle.CODEBOOK
    if codebook.exists():
        sources["codebook"] = {"sha256": bundle.digest(bundle.read_codebook(codebook).entries)}
    return sources


def check_weights(run: RunDir, roles: Sequence[str] | None = None) -> None:
    """Raise ValueError if a run was started with other weights than its bundle holds now."""
    now = weights(run.record["bundle"])
    for role in sorted(now.keys() | run.record["weights"].keys()) if roles is None else roles:
        source = run.record["weights"].get(role, {})
        if now.get(role, {}).get("sha256") != source.get("sha256"):
            raise ValueError(
                f"run {run.folder} was started with another {role} than bundle"
                f" {run.record['bundle']} holds now; sample it again with --overwrite"
            )


def check_loras(run: RunDir) -> None:
    """Raise ValueError if a run was started with another LoRA than its file holds now."""
    for text in run.record["flags"].get("lora", ()):
        file, _ = parse_weight(text)
        found = _lora_sha256(Path(file))
        if found is None or found != run.record["files_sha256"].get(file):
            raise ValueError(
                f"run {run.folder} was started with another LoRA than {file} holds now, or the file"
                " is missing; restore it, or sample the video again with --overwrite"
            )


def _files(spec: VideoSpec) -> list[Path]:
    """Return the files that the options of a video name."""
    files = [spec.image, spec.end_image, *(Path(k.partition("=")[2]) for k in spec.key_frame)]
    if spec.extend is not None:
        files.append(source_file(spec.extend))
    return [file for file in files if file is not None]


def _plain(value: Any) -> Any:
    """Return an option as JSON stores it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _sha256(path: Path) -> str | None:
    """Hash a file, or the names and contents of a folder's files; None if it cannot be read, which
    is reported when it is needed."""
    if path.is_dir():
        hashes = {file.name: _sha256(file) for file in sorted(path.iterdir()) if file.is_file()}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _lora_sha256(path: Path) -> str | None:
    """Hash the files of a LoRA: one file's own hash, or a hash over the names and hashes of
    several. None if a file cannot be read."""
    try:
        files = lora_files(path)
    except (OSError, ValueError):
        return None
    hashes = {file.name: _sha256(file) for file in files}
    if None in hashes.values():
        return None
    if files == [path]:
        return hashes[path.name]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
