"""A program of a step with offloaded blocks, and shapes of its arguments: nothing is computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from framepack_jax.models.params import Params
from framepack_jax.parallel.sharding import BATCH, TOKENS, dividing, fitting


class OffloadProgram(NamedTuple):
    """A program of a step: how often it runs, with which weights, and how to lower it."""

    name: str
    runs: int
    weights: Params
    lower: Callable[[], jax.stages.Lowered]


def layer_shapes(stack: Params) -> Params:
    """Return the shapes of one layer of a stack, with their shardings."""

    def first(p: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*p.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(p.shape[1:], p.dtype, sharding=where)

    return jax.tree.map(first, stack)


def divided(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Place a stream, the result of a program, which is divided only where it goes evenly."""
    mesh = jax.sharding.get_mesh()
    return _placed(x, BATCH, dividing(TOKENS, x.shape[1], mesh.shape), None)


def replicated(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return _placed(x, *(None,) * len(x.shape))


def _placed(x: jax.ShapeDtypeStruct, *axes: Any) -> jax.ShapeDtypeStruct:
    mesh = jax.sharding.get_mesh()
    where = NamedSharding(mesh, fitting(axes, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
