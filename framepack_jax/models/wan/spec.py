"""Specs of Wan's networks."""

from framepack_jax.diffusion.network import StepCacheHooks
from framepack_jax.models import packed_video
from framepack_jax.models.network_spec import DenoiserSpec, VaeSpec
from framepack_jax.models.wan import config, flops, sharding_rules, transformer, vae, vae_config
from framepack_jax.models.wan.offload_programs import offload_programs

TRANSFORMER = DenoiserSpec(
    kind="wan_packed_dit",
    config=config.WanConfig,
    init=transformer.init,
    sharding_rules=sharding_rules.TRANSFORMER,
    stacks=config.STACKS,
    offloadable=config.OFFLOADABLE,
    velocity=transformer.velocity,
    step_cache=StepCacheHooks(
        embed=transformer.embed,
        first_block=transformer.first_block,
        run_blocks=transformer.run_blocks,
        head=transformer.head,
    ),
    encoders=transformer.encoders,
    conditions=transformer.conditions_of_text,
    patch=packed_video.PATCH,
    context_kernels=packed_video.context_kernels,
    check_kernels=packed_video.check_kernels,
    check_mesh=packed_video.check_mesh,
    forward_flops=flops.forward_flops,
    offload_programs=offload_programs,
    lora_targets=r"blocks/(cross_)?(qkv|q|kv|out|mlp_in|mlp_out)",
    reads_padding=True,
)

VAE = VaeSpec(
    kind="wan_vae",
    config=vae_config.WanVaeConfig,
    init=vae.init,
    sharding_rules=sharding_rules.VAE,
    stacks=vae.STACKS,
    encode=vae.encode,
    decode=vae.decode,
    check_tiling=vae.check_tiling,
    latent_statistics=vae.latent_statistics,
    preview=vae_config.PREVIEW,
    exact_chunks=True,
)
