"""Facts that must be the same on all hosts of a training run.

Hosts that disagree would train on without an error: with two learning rates, half of the parameters
get each; with two datasets, a batch has samples of both.
"""

import dataclasses
import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from framepack_jax import bundle
from framepack_jax.data import records
from framepack_jax.training.config import TrainConfig
from framepack_jax.utils.paths import is_remote
from framepack_jax.utils.versions import code_hash, version

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Variables that change what is compiled.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def command_facts(cfg: Any, **flags: Any) -> dict[str, Any]:
    """Return the configuration by dotted names, other flags, and the code that runs."""
    return {
        **dict(_dotted("", cfg)),
        **flags,
        "code of framepack_jax": code_hash(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **{name: os.environ.get(name) for name in VARIABLES},
    }


def data_facts(
    cfg: TrainConfig, bundle_path: epath.PathLike, fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fingerprint of the samples, and what tells copies of datasets and a bundle apart:
    hashes of their tables, which have the digests of the files, and the sizes of files on a disk.
    """
    facts = {
        **{f"samples: {name}": value for name, value in fingerprint.items()},
        f"{bundle_path}/{bundle.MANIFEST}": _digest(epath.Path(bundle_path) / bundle.MANIFEST),
    }
    if cfg.codebook:
        facts[cfg.codebook] = _digest(epath.Path(cfg.codebook))
    for folder in map(epath.Path, cfg.data.paths):
        facts[f"{folder}/{records.INDEX}"] = _digest(folder / records.INDEX)
        if not is_remote(folder):
            shards = sorted((folder / records.SHARDS).iterdir())
            sizes = [(file.name, file.stat().length) for file in shards]
            facts[f"sizes in {folder}/{records.SHARDS}"] = sizes
    return facts


def _digest(file: epath.Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else None


def _dotted(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of the fields of a dataclass."""
    for field in dataclasses.fields(value):
        name, found = f"{prefix}{field.name}", getattr(value, field.name)
        if dataclasses.is_dataclass(found):
            yield from _dotted(f"{name}.", found)
        else:
            yield name, found
