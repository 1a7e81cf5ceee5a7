"""The file of a history codebook, in a bundle or by itself."""

import hashlib
import json

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from framepack_jax.bundle.manifest import BundleError, Manifest
from framepack_jax.packing import Schedule
from framepack_jax.packing.codebook import Codebook
from framepack_jax.utils.files import atomic_write
from framepack_jax.utils.messages import first_line

CODEBOOK = "codebook.safetensors"


def write_codebook(file: epath.PathLike, codebook: Codebook, fitted_to: str) -> None:
    """Write a codebook; `fitted_to` names its pixels."""
    data = safetensors.numpy.save(
        {"entries": codebook.entries, "usage": codebook.usage.astype("float32")},
        {"error": f"{codebook.error:.6f}", "fitted_to": fitted_to},
    )
    with atomic_write(epath.Path(file)) as partial:
        partial.write_bytes(data)


def read_codebook(file: epath.PathLike) -> Codebook:
    """Read a codebook. Raises BundleError if the file is missing or damaged."""
    path = epath.Path(file)
    try:
        data = path.read_bytes()
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        error = float(json.loads(data[8 : 8 + length])["__metadata__"]["error"])
        return Codebook(arrays["entries"], arrays["usage"], error)
    except FileNotFoundError:
        raise BundleError(
            f"{path} is missing; fit a codebook with framepack fit-codebook and train with it"
        ) from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise BundleError(
            f"{path} is no codebook ({first_line(error)}); fit it again with framepack fit-codebook"
        ) from error


def digest(entries: np.ndarray) -> str:
    """Return the SHA-256 of the entries of a codebook."""
    return hashlib.sha256(entries.tobytes()).hexdigest()


def entries_for(
    schedule: Schedule, root: epath.PathLike, manifest: Manifest, file: str | None = None
) -> np.ndarray | None:
    """Return the entries (K, C) of the codebook of a bundle, or of a `file` in its place; None if
    the schedule has no `+D`.

    Raises BundleError if there is none, or if its sizes are not those of the schedule and latents.
    """
    if schedule.codebook is None:
        return None
    path = epath.Path(file) if file else epath.Path(root) / CODEBOOK
    entries = read_codebook(path).entries
    wanted = schedule.codebook, len(manifest.latent_mean)
    if entries.shape != wanted:
        (count, channels), (needed, wide) = entries.shape, wanted
        raise BundleError(
            f"{path} has {count} entries of {channels} channels, but schedule {schedule} and the"
            f" latents need {needed} of {wide}; fit one with framepack fit-codebook --entries"
            f" {needed}"
        )
    return entries
