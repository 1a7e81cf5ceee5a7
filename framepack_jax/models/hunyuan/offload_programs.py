"""The programs that a step with offloaded blocks runs, for planning: nothing is computed."""

import functools
from typing import Any

import jax

from framepack_jax.models import offload
from framepack_jax.models.hunyuan.blocks import DoubleBlock, SingleBlock
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.transformer import jit_embed, jit_head, jit_join
from framepack_jax.models.offload_programs import (
    OffloadProgram,
    divided,
    layer_shapes,
    replicated,
)
from framepack_jax.models.params import Params
from framepack_jax.packing import PackedContext


def offload_programs(
    cfg: TransformerConfig,
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
    small = {name: params[name] for name in ("embed", "refiner")}
    embedded = small, x, sigma, context, conditions
    img, txt, *inputs = jax.eval_shape(functools.partial(jit_embed, cfg, dtype), *embedded)
    joined = jax.eval_shape(jit_join, img, txt)
    img, txt, joined = map(divided, (img, txt, joined))
    inputs = jax.tree.map(replicated, inputs)
    double, single = layer_shapes(params["double"]), layer_shapes(params["single"])
    return [
        OffloadProgram(
            "double block", cfg.double_layers, double,
            functools.partial(offload.lower_layer, DoubleBlock(cfg), double, (img, txt), *inputs),
        ),
        OffloadProgram(
            "single block", cfg.single_layers, single,
            functools.partial(offload.lower_layer, SingleBlock(cfg), single, joined, *inputs),
        ),
        OffloadProgram(
            "embedding", 1, small, functools.partial(jit_embed.lower, cfg, dtype, *embedded)
        ),
        OffloadProgram(
            "head", 1, params["head"],
            functools.partial(jit_head.lower, cfg, x.shape, params["head"], img, inputs[0]),
        ),
    ]  # fmt: skip
