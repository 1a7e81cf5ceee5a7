"""Specs of HunyuanVideo's networks."""

from framepack_jax import video
from framepack_jax.models import packed_video
from framepack_jax.models.hunyuan import (
    config,
    flops,
    sharding_rules,
    step_cache_hooks,
    transformer,
    vae,
)
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.offload_programs import offload_programs
from framepack_jax.models.network_spec import DenoiserSpec, VaeSpec

TRANSFORMER = DenoiserSpec(
    kind="hunyuan_packed_dit",
    config=config.TransformerConfig,
    init=transformer.init,
    sharding_rules=sharding_rules.TRANSFORMER,
    stacks=config.STACKS,
    offloadable=config.OFFLOADABLE,
    velocity=transformer.velocity,
    step_cache=step_cache_hooks.HOOKS,
    encoders=transformer.encoders,
    conditions=Conditions,
    patch=packed_video.PATCH,
    context_kernels=packed_video.context_kernels,
    check_kernels=packed_video.check_kernels,
    check_mesh=packed_video.check_mesh,
    forward_flops=flops.forward_flops,
    offload_programs=offload_programs,
    lora_targets=r"(double|single)/(\w+_)?(qkv|out|mlp_in|mlp_out)",
)

VAE = VaeSpec(
    kind="hunyuan_vae",
    config=vae.VaeConfig,
    init=vae.init,
    sharding_rules=sharding_rules.VAE,
    stacks=vae.STACKS,
    encode=vae.encode,
    decode=vae.decode,
    check_tiling=vae.check_tiling,
    latent_statistics=vae.latent_statistics,
    preview=(video.PREVIEW_WEIGHT, video.PREVIEW_BIAS),
)
