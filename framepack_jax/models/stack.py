"""Equal blocks, one after another: the only place that loops over layers.

The parameters of a stack carry a leading layer axis and run through one `lax.scan`, so that a
network of 60 blocks traces and compiles like one of two. On disk, in conversion and in LoRA files
every layer stands by itself, as `double/07/img_qkv/kernel`; `split` and `join` go between the two.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]


def init(block: nn.Module, key: jax.Array, layers: int, *args: Any) -> Params:
    """Parameters of `layers` blocks, each leaf (layers, ...); `args` are the block's inputs."""
    return jax.vmap(lambda k: block.init(k, *args)["params"])(jax.random.split(key, layers))


def run(block: nn.Module, params: Params, x: Any, *args: Any, layers: slice = slice(None)) -> Any:
    """Feed x, an array or a tuple of arrays, through every layer; `args` go to all alike.

    `layers` takes some of the layers only. Parameters are cast to the dtype of x one layer at a
    time, so that float32 masters can serve a bfloat16 computation without a second copy of the
    whole network.
    """
    dtype = jax.tree.leaves(x)[0].dtype

    def layer(x: Any, params: Params) -> tuple[Any, None]:
        return block.apply({"params": cast(params, dtype)}, x, *args), None

    if layers == slice(None):
        return jax.lax.scan(layer, x, params)[0]

    # Slices of the parameters would be a second copy of them. (The gradient of this loop is far
    # dearer than that of the one above, so a whole stack does not go through it.)
    def numbered(x: Any, i: jax.Array) -> tuple[Any, None]:
        return layer(x, at(params, i))

    count = jax.tree.leaves(params)[0].shape[0]
    return jax.lax.scan(numbered, x, jnp.arange(count)[layers])[0]


def at(params: Params, layer: int | jax.Array) -> Params:
    """The parameters of one layer."""
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), params)


def cast(params: Params, dtype: Any) -> Params:
    """Floating-point leaves as `dtype`."""
    return jax.tree.map(
        lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params
    )


def split(params: Params, stacks: Iterable[str]) -> dict[str, Any]:
    """Per-layer leaves by path: `{"double": {"mod": {"bias": (20, D)}}}` -> `double/07/mod/bias`.

    `stacks` names the top-level entries that carry a layer axis. Leaves may be arrays or
    `jax.ShapeDtypeStruct`s.
    """
    stacks = set(stacks)
    leaves = {}
    for path, leaf in flatten_dict(params).items():
        if path[0] not in stacks:
            leaves["/".join(path)] = leaf
            continue
        for i in range(leaf.shape[0]):
            name = "/".join((path[0], f"{i:02d}", *path[1:]))
            abstract = isinstance(leaf, jax.ShapeDtypeStruct)
            leaves[name] = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if abstract else leaf[i]
    return leaves


def join(
    leaves: Mapping[str, Any],
    stacks: Iterable[str],
    stack: Callable[[list[Any]], Any] = jnp.stack,
) -> Params:
    """The inverse of `split`; `stack` puts the layers of one leaf together."""
    stacks = set(stacks)
    params: dict[tuple[str, ...], Any] = {}
    layers: dict[tuple[str, ...], dict[int, Any]] = {}
    for name, leaf in leaves.items():
        path = tuple(name.split("/"))
        if path[0] in stacks:
            layers.setdefault((path[0], *path[2:]), {})[int(path[1])] = leaf
        else:
            params[path] = leaf
    for path, by_layer in layers.items():
        params[path] = stack([by_layer[i] for i in sorted(by_layer)])
    return unflatten_dict(params)
