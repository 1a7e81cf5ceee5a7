"""Fingerprints: which networks made a dataset, and which samples a training run takes from it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from framepack_jax.bundle import BundleError, Manifest, encoder_roles
from framepack_jax.data.records import DatasetError, Index
from framepack_jax.utils.compare import differences, differing_fields
from framepack_jax.utils.messages import shorten

# Fields of the index that tell what arrays and frames a dataset has.
ARRAYS = (
    "mode", "fps", "time_compression", "space_compression", "channels", "chunk", "text_tokens",
)  # fmt: skip
# Settings of `framepack prepare` that choose clips.
MAY_DIFFER = ("format", "max_frames", "cut", "buckets")
MAX_SHOWN = 60


def made_by(manifest: Manifest, mode: str) -> dict[str, Any]:
    """Return the parts of a bundle that determine the numbers of a dataset. Raises BundleError if
    the bundle lacks one of the networks."""
    roles = [*encoder_roles(manifest), *(["vae"] if mode == "latents" else [])]
    if lacking := [role for role in roles if role not in manifest.roles]:
        raise BundleError(
            f"the bundle has no {', '.join(lacking)}, which made the dataset; give the bundle that"
            " it was prepared with"
        )
    return {
        **{role: manifest.roles[role].source.get("sha256") for role in roles},
        "prompt_template": manifest.prompt_template,
        "latent_mean": list(manifest.latent_mean),
        "latent_std": list(manifest.latent_std),
    }


def check_bundle(index: Index, manifest: Manifest) -> None:
    """Raise DatasetError if a dataset was made by other networks than those of a bundle, at another
    frame rate, or in other chunks, and BundleError if the bundle lacks them."""
    recorded, current = index.fingerprint, made_by(manifest, index.mode)
    if differing := differing_fields(recorded, current, [n for n in current if n in recorded]):
        raise DatasetError(
            f"the dataset was made by another bundle: {', '.join(differing)} differ; train with the"
            " bundle that it was prepared with, or prepare it again with this one"
        )
    values = (
        ("frames a second", index.fps, manifest.sampling.fps),
        ("latent frames that are encoded alone (0: all)", index.chunk, manifest.chunk),
        ("tokens of a caption", index.text_tokens, manifest.text_tokens),
    )
    if differing := [f"{n} {there:g}, {here:g}" for n, there, here in values if there != here]:
        raise DatasetError(
            f"the dataset does not fit the bundle: {'; '.join(differing)} in the bundle; prepare it"
            " again with this bundle"
        )


def check_agreement(datasets: Sequence[tuple[epath.Path, Index]]) -> None:
    """Raise DatasetError if datasets (folder, index) cannot be mixed, as networks, frame rates or
    formats differ. How videos were cut, and buckets, may differ."""
    (first, index), *others = datasets
    for folder, other in others:
        facts, found = _facts(index), _facts(other)
        common = [name for name in facts if name in found]
        if differing := differing_fields(facts, found, common):
            values = (
                f"{name} = {facts[name]!s:.{MAX_SHOWN}} in {first}, {found[name]!s:.{MAX_SHOWN}} in"
                f" {folder}"
                for name in differing
            )
            raise DatasetError(
                f"datasets {first} and {folder} cannot be mixed: {shorten(values, separator='; ')};"
                " prepare both with the same bundle and the same --mode"
            )


def _facts(index: Index) -> dict[str, Any]:
    """Return what datasets that are mixed must have in common."""
    made_by = {name: v for name, v in index.fingerprint.items() if name not in MAY_DIFFER}
    return made_by | {name: getattr(index, name) for name in ARRAYS}


def digest(fingerprint: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify the stream of samples of a run."""
    text = json.dumps(fingerprint, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_fingerprint(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise DatasetError if a run was started with another stream of samples."""
    if differing := differences(old, new, old | new):
        listed = shorten(differing, separator="; ")
        raise DatasetError(
            f"the samples are not those that the run was started with ({listed}); restore them, or"
            " start another run from its parameters, in a new order: --init RUN@STEP --output NEW"
        )
