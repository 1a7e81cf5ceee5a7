"""Export the VAE of a training run as a bundle."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from framepack_jax import bundle
from framepack_jax.data.vae_clips import find_videos
from framepack_jax.models.network_spec import LatentStatistics, VaeSpec
from framepack_jax.models.params import Params, unstack_layers
from framepack_jax.training import checkpoints
from framepack_jax.training.export import provenance, write_bundle
from framepack_jax.training.vae_config import VaeTrainConfig
from framepack_jax.training.vae_task import network_of, trained_params
from framepack_jax.training.vae_validation import latent_statistics

# Videos that the statistics of latents are taken from.
MAX_VIDEOS = 256


def export(
    run: str,
    bundle_path: epath.PathLike,
    output: str,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    copy: bool = True,
) -> str:
    """Make a bundle with the VAE of a run (RUN or RUN@STEP); transformer and encoders are those of
    the bundle at `bundle_path`. Returns a line that says what was written."""
    folder, step = checkpoints.parse_run(run)
    record = checkpoints.read_record(folder)
    manifest = bundle.read_manifest(bundle_path)
    spec, network = network_of(VaeTrainConfig(network=record["config"]["network"]), manifest)
    params = jax.tree.map(np.asarray, trained_params(spec, network, folder, step))
    mean, std = manifest.latent_mean, manifest.latent_std
    if (record["config"]["trainable"], record["config"]["init"]) != ("decoder", "bundle"):
        mean, std = _statistics(record, spec, network, params)
    leaves = (
        (name, np.asarray(leaf).astype(jnp.dtype(dtype)))
        for name, leaf in unstack_layers(params, spec.stacks).items()
    )
    manifest = dataclasses.replace(manifest, latent_mean=mean, latent_std=std)
    made = spec.kind, dataclasses.asdict(network)
    origin = f"{folder} at step {step}"
    source = {"name": origin, "training": provenance(folder, step)}
    written = write_bundle(
        manifest, bundle_path, epath.Path(output), "vae", made, leaves, source, copy
    )
    return f"{output}: VAE of {origin}, {written.bytes / 1e6:,.1f} MB; its latents' mean and spread"


def _statistics(
    record: dict[str, Any], spec: VaeSpec, network: Any, params: Params
) -> LatentStatistics:
    """Return (mean, standard deviation) of the latents of the videos that a run was trained on."""
    cfg, trained_on = record["config"], set(record["videos"])
    frames, size = cfg["frames"], tuple(cfg["size"])
    videos = [v for v in find_videos(cfg["videos"], frames, size) if v.name in trained_on]
    return latent_statistics(spec, network, params, videos[:MAX_VIDEOS], frames)
