"""Write bundles with the configs of the released models and no weights, for dry runs.

Command:  python scripts/make_size_only_bundles.py framepack_jax/assets
Result:   the folders behind `--bundle framepack_i2v` and `--bundle framepack_f1`, a few kB each.
          `sample.py --dry-run h200:1` needs no weights.
"""

import dataclasses
import sys
from pathlib import Path

from framepack_jax import packing
from framepack_jax.bundle import Manifest, Role, write_manifest
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.models import registry

SCALING_FACTOR = 0.476986
SCHEDULES = {"framepack_i2v": packing.RELEASED_INVERTED, "framepack_f1": packing.RELEASED_F1}
KINDS = {
    "transformer": "hunyuan_packed_dit",
    "vae": "hunyuan_vae",
    "text_encoder": "llama",
    "text_encoder_2": "clip_text",
    "image_encoder": "siglip_vision",
}


def get_config(schedule: str) -> Manifest:
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
    for name, schedule in SCHEDULES.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, get_config(schedule))
