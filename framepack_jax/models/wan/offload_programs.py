"""The programs that a step with offloaded blocks runs, for planning: nothing is computed."""

import functools
from typing import Any

import jax

from framepack_jax.models import offload
from framepack_jax.models.offload_programs import (
    OffloadProgram,
    divided,
    layer_shapes,
    replicated,
)
from framepack_jax.models.params import Params
from framepack_jax.models.wan.blocks import Block, Streams
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.transformer import Conditions, Tokens, jit_embed, jit_head
from framepack_jax.packing import PackedContext


def offload_programs(
    cfg: WanConfig,
    params: Params,
    x: jax.ShapeDtypeStruct,
    sigma: jax.ShapeDtypeStruct,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any,
) -> list[OffloadProgram]:
    """Return the programs of `velocity` with offloaded blocks, those of the blocks first.

    Arguments are shapes with shardings on the mesh in use (`jax.set_mesh`), layers of `params`
    stacked.
    """
    small = {"embed": params["embed"]}
    embedded = small, x, sigma, context, conditions
    tokens: Tokens = jax.eval_shape(functools.partial(jit_embed, cfg, dtype), *embedded)
    streams = jax.tree.map(divided, Streams(tokens.context, tokens.img))
    inputs = jax.tree.map(
        replicated,
        (tokens.text, tokens.modulation, tokens.rope, tokens.masked, tokens.frames),
    )
    block = layer_shapes(params["blocks"])
    vec = jax.tree.map(replicated, tokens.vec)
    return [
        OffloadProgram(
            "block", cfg.layers, block,
            functools.partial(offload.lower_layer, Block(cfg), block, streams, *inputs),
        ),
        OffloadProgram(
            "embedding", 1, small, functools.partial(jit_embed.lower, cfg, dtype, *embedded)
        ),
        OffloadProgram(
            "head", 1, params["head"],
            functools.partial(jit_head.lower, cfg, x.shape, params["head"], streams.target, vec),
        ),
    ]  # fmt: skip
