"""Specs of HunyuanVideo's networks."""

from framepack_jax.diffusion.network import StepCacheHooks
from framepack_jax.models.hunyuan import flops, transformer, vae
from framepack_jax.models.spec import DenoiserSpec, VaeSpec

TRANSFORMER = DenoiserSpec(
    kind="hunyuan_packed_dit",
    config=transformer.TransformerConfig,
    init=transformer.init,
    sharding_rules=transformer.SHARDINGS,
    stacks=transformer.STACKS,
    offloadable=transformer.OFFLOADABLE,
    velocity=transformer.velocity,
    step_cache=StepCacheHooks(
        embed=transformer.embed,
        block_input=transformer.block_input,
        first_block=transformer.first_block,
        run_blocks=transformer.run_blocks,
        head=transformer.head,
        teacache=transformer.TEACACHE,
    ),
    conditions=transformer.Conditions,
    patch=transformer.PATCH,
    context_kernels=transformer.context_kernels,
    check_kernels=transformer.check_kernels,
    check_mesh=transformer.check_mesh,
    forward_flops=flops.forward_flops,
    offload_programs=transformer.programs,
)

VAE = VaeSpec(
    kind="hunyuan_vae",
    config=vae.VaeConfig,
    init=vae.init,
    sharding_rules=vae.SHARDINGS,
    stacks=vae.STACKS,
    encode=vae.encode,
    decode=vae.decode,
    check_tiling=vae.check_tiling,
)
