"""The kinds of network that a bundle can hold, by name.

A config, of CONFIGS, is a frozen dataclass of everything that decides the parameters' shapes. The
module of a kind offers five names:

- `STACKS`, {top-level parameter name: the config field that holds its number of layers};
- `STREAMED`, those of the stacks that need not be on the device as a whole
  (`scan.OffloadedLayers`): the functions then are called outside of `jax.jit`;
- `SHARDINGS`, the rules of `sharding.resolve` by which its parameters are divided over a mesh;
- `init(cfg, key) -> params`, layers of a stack on a leading axis;
- functions of (cfg, params, ...) that compute.
"""

import functools
from types import ModuleType
from typing import Any

import jax

from framepack_jax.models import scan
from framepack_jax.models.encoders import clip, llama, siglip
from framepack_jax.models.hunyuan import transformer, vae

KINDS: dict[str, ModuleType] = {
    "hunyuan_packed_dit": transformer,
    "hunyuan_vae": vae,
    "llama": llama,
    "clip_text": clip,
    "siglip_vision": siglip,
}
CONFIGS: dict[str, type] = {
    "hunyuan_packed_dit": transformer.TransformerConfig,
    "hunyuan_vae": vae.VaeConfig,
    "llama": llama.LlamaConfig,
    "clip_text": clip.ClipConfig,
    "siglip_vision": siglip.SiglipConfig,
}


def abstract_leaves(kind: str, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter, layer by layer, without computing any."""
    return dict(_leaves(kind, cfg))


# Tracing a network takes up to a second, and a conversion asks several times.
@functools.cache
def _leaves(kind: str, cfg: Any) -> dict[str, jax.ShapeDtypeStruct]:
    model = KINDS[kind]
    # The key is made inside, so that no accelerator is started for the sake of shapes.
    params = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    return scan.unstack_layers(params, model.STACKS)


def parameter_count(kind: str, cfg: Any) -> int:
    """Number of parameters of a network."""
    return sum(leaf.size for leaf in abstract_leaves(kind, cfg).values())
