"""A bundle: one folder with every network, tokenizer and setting that makes a video.

    bundle.json            the manifest below
    transformer/ vae/ ...  parameters, one orbax leaf per layer and tensor
    codebook.safetensors   entries of discretized history, if the schedule has +D
    tokenizer/ tokenizer_2/ image_processor/   files of the transformers library

A role's path may point into another bundle, so that two transformers share their encoders.
`bundle.json` is written last; a folder without it is not a bundle.
"""

from framepack_jax.bundle.builtin import BUILTIN_BUNDLES, SIZE_ONLY, resolve
from framepack_jax.bundle.codebook import (
    CODEBOOK,
    digest,
    entries_for,
    read_codebook,
    write_codebook,
)
from framepack_jax.bundle.hashes import is_as_recorded, stored_hash
from framepack_jax.bundle.loader import (
    DeviceBytes,
    check_present,
    device_bytes,
    load_offloaded,
    load_params,
    read_leaves,
    stored_bytes,
    stored_dtypes,
)
from framepack_jax.bundle.manifest import (
    ENCODERS,
    MANIFEST,
    ROLES,
    UNFINISHED,
    BundleError,
    Manifest,
    Role,
    absolute,
    config_from_json,
    denoiser_config,
    encoder_roles,
    read_manifest,
    reference,
    referenced,
    role_config,
    sampling_roles,
    text_encoder_config,
    vae_config,
    write_manifest,
)
from framepack_jax.bundle.pulled import REPOSITORY, pulled_folder
from framepack_jax.bundle.sampling import Sampling
from framepack_jax.bundle.writer import Written, write_params

__all__ = [
    "BUILTIN_BUNDLES",
    "CODEBOOK",
    "ENCODERS",
    "MANIFEST",
    "REPOSITORY",
    "ROLES",
    "SIZE_ONLY",
    "UNFINISHED",
    "BundleError",
    "DeviceBytes",
    "Manifest",
    "Role",
    "Sampling",
    "Written",
    "absolute",
    "check_present",
    "config_from_json",
    "denoiser_config",
    "device_bytes",
    "digest",
    "encoder_roles",
    "entries_for",
    "is_as_recorded",
    "load_offloaded",
    "load_params",
    "pulled_folder",
    "read_codebook",
    "read_leaves",
    "read_manifest",
    "reference",
    "referenced",
    "resolve",
    "role_config",
    "sampling_roles",
    "stored_bytes",
    "stored_dtypes",
    "stored_hash",
    "text_encoder_config",
    "vae_config",
    "write_codebook",
    "write_manifest",
    "write_params",
]  # fmt: skip
