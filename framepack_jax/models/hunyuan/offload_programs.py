"""The programs that a step with offloaded blocks runs, for planning: nothing is computed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from framepack_jax.models import offload
from framepack_jax.models.hunyuan.blocks import DoubleBlock, SingleBlock
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.transformer import jit_embed, jit_head, jit_join
from framepack_jax.models.params import Params
from framepack_jax.packing import PackedContext
from framepack_jax.parallel.sharding import BATCH, TOKENS, dividing, fitting


class OffloadProgram(NamedTuple):
    """A program of a step: how often it runs, with which weights, and how to lower it."""

    name: str
    runs: int
    weights: Params
    lower: Callable[[], jax.stages.Lowered]


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
    img, txt, joined = map(_divided, (img, txt, joined))
    inputs = jax.tree.map(_replicated, inputs)
    double, single = _layer(params["double"]), _layer(params["single"])
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


def _layer(stack: Params) -> Params:
    """Return the shapes of one layer of a stack, with their shardings."""

    def first(p: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*p.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(p.shape[1:], p.dtype, sharding=where)

    return jax.tree.map(first, stack)


def _divided(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Place a stream, the result of a program, which is divided only where it goes evenly."""
    mesh = jax.sharding.get_mesh()
    return _placed(x, BATCH, dividing(TOKENS, x.shape[1], mesh.shape), None)


def _replicated(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return _placed(x, *(None,) * len(x.shape))


def _placed(x: jax.ShapeDtypeStruct, *axes: Any) -> jax.ShapeDtypeStruct:
    mesh = jax.sharding.get_mesh()
    where = NamedSharding(mesh, fitting(axes, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
