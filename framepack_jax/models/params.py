"""Trees of parameters: layers stacked and unstacked, parts divided and merged.

The parameters of a stack of equal layers carry a leading layer axis. On disk, in conversion and in
LoRA files every layer stands alone, as `double/07/img_qkv/kernel`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]
"""Nested dictionaries of arrays; a whole stack may be an `offload.OffloadedLayers`."""


def unstack_layers(params: Params, stacks: Iterable[str]) -> dict[str, Any]:
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


def stack_layers(
    leaves: Mapping[str, Any],
    stacks: Iterable[str],
    stack: Callable[[list[Any]], Any] = jnp.stack,
) -> Params:
    """Invert `unstack_layers`; `stack` joins the layers of one leaf."""
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


def partition_params(params: Params, pattern: str) -> tuple[Params, Params]:
    """Divide parameters into those whose whole path matches a regular expression, and the rest.

    Raises ValueError if none matches.
    """
    leaves = flatten_dict(params)
    chosen = {path for path in leaves if re.fullmatch(pattern, "/".join(path))}
    if not chosen:
        raise ValueError(f"no parameter of the network matches {pattern!r}; nothing to train")
    return (
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path in chosen}),
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path not in chosen}),
    )


def merge_params(trained: Params, frozen: Params) -> Params:
    """Join two parts of a network's parameters; invert `partition_params`."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def apply_module(module: nn.Module, params: Params, *args: Any) -> Any:
    """Compute a Flax module with these parameters."""
    return module.apply({"params": params}, *args)
