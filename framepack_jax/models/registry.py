"""The kinds of network that a bundle can hold, by name.

A new family adds its folder beside `hunyuan/` and its specs to NETWORKS.
"""

from typing import Any

import jax

from framepack_jax.models import patch_vae
from framepack_jax.models.encoders import clip, llama, siglip, umt5
from framepack_jax.models.hunyuan import spec as hunyuan
from framepack_jax.models.network_spec import DenoiserSpec, NetworkSpec, TextEncoderSpec, VaeSpec
from framepack_jax.models.params import unstack_layers
from framepack_jax.models.wan import spec as wan

__all__ = [
    "NETWORKS",
    "DenoiserSpec",
    "NetworkSpec",
    "TextEncoderSpec",
    "VaeSpec",
    "abstract_leaves",
    "parameter_count",
]

_SPECS = (
    hunyuan.TRANSFORMER,
    hunyuan.VAE,
    wan.TRANSFORMER,
    wan.VAE,
    patch_vae.SPEC,
    llama.SPEC,
    umt5.SPEC,
    clip.SPEC,
    siglip.SPEC,
)
NETWORKS: dict[str, NetworkSpec] = {spec.kind: spec for spec in _SPECS}


def abstract_leaves(kind: str, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return path -> shape of every parameter, layer by layer, without computing any."""
    spec = NETWORKS[kind]
    return unstack_layers(spec.abstract_params(cfg), spec.stacks)


def parameter_count(kind: str, cfg: Any) -> int:
    """Return the number of parameters of a network."""
    return sum(leaf.size for leaf in abstract_leaves(kind, cfg).values())
