"""Write bundles with the configs of the released models and no weights, for dry runs.

Command:  python scripts/make_size_only_bundles.py framepack_jax/assets
Result:   the folders behind `--bundle framepack_i2v`, `framepack_f1`, `helios_14b`, `wan_14b` and
          `wan_1.3b`, a few kB each. `sample.py --dry-run h200:1` needs no weights.
"""

import dataclasses
import sys
from pathlib import Path

from framepack_jax import packing
from framepack_jax.bundle import Manifest, Role, write_manifest
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.conversion.pipeline_index import settings_of
from framepack_jax.models import registry
from framepack_jax.models.encoders.umt5 import Umt5Config
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.vae_config import RELEASED_MEAN, RELEASED_STD, WanVaeConfig

SCALING_FACTOR = 0.476986
WAN_14B = WanConfig()
WAN = {
    "helios_14b": dataclasses.replace(
        WAN_14B, context_kernels=("k1", "k2", "k4"), clean_context=True, prompt_to_target=True
    ),
    "wan_14b": WAN_14B,
    "wan_1.3b": dataclasses.replace(WAN_14B, heads=12, layers=30, mlp_dim=8960),
}
SCHEDULES = {"framepack_i2v": packing.RELEASED_INVERTED, "framepack_f1": packing.RELEASED_F1}
KINDS = {
    "transformer": "hunyuan_packed_dit",
    "vae": "hunyuan_vae",
    "text_encoder": "llama",
    "text_encoder_2": "clip_text",
    "image_encoder": "siglip_vision",
}


def wan_manifest(cfg: WanConfig) -> Manifest:
    """Return the manifest of a released model of the Wan family."""
    configs = {
        "transformer": ("wan_packed_dit", cfg),
        "vae": ("wan_vae", WanVaeConfig()),
        "text_encoder": ("umt5", Umt5Config()),
    }
    settings = settings_of(None, cfg)
    assert settings.schedule
    return Manifest(
        roles={k: Role(kind, dataclasses.asdict(c), k) for k, (kind, c) in configs.items()},
        latent_mean=RELEASED_MEAN,
        latent_std=RELEASED_STD,
        prompt_template="{}",
        schedule=packing.parse(settings.schedule),
        buckets=settings.buckets,
        text_tokens=512,
        sampling=settings.sampling,
    )


def framepack_manifest(schedule: str) -> Manifest:
    """Return the manifest of a released model; the defaults of the configs are its sizes."""
    roles = {
        role: Role(kind, dataclasses.asdict(registry.NETWORKS[kind].config()), role)
        for role, kind in KINDS.items()
    }
    return Manifest(
        roles=roles,
        latent_mean=(0.0,) * 16,
        latent_std=(1 / SCALING_FACTOR,) * 16,
        prompt_template=PROMPT_TEMPLATE,
        schedule=packing.parse(schedule),
    )


if __name__ == "__main__":
    manifests = {name: framepack_manifest(text) for name, text in SCHEDULES.items()}
    manifests |= {name: wan_manifest(cfg) for name, cfg in WAN.items()}
    for name, manifest in manifests.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
