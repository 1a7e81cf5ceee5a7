"""Stacks of equal layers, run one after another: the only module that loops over layers.

The parameters of a stack carry a leading layer axis and run through one `lax.scan`, so that a
network of 60 layers traces and compiles like one of two. A stack that is an
`offload.OffloadedLayers` runs layer by layer from Python.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from framepack_jax.models import lora_layers
from framepack_jax.models.master_weights import cast_others
from framepack_jax.models.offload import OffloadedLayers, layer_on_device, run_offloaded
from framepack_jax.models.params import Params
from framepack_jax.ops import attention

# Values of a block's forward pass that are kept for the backward pass: all; its input and the
# results of linear layers and attention; its input and the results of attention; its input; its
# input, in host memory.
REMAT = ("none", "dots", "attention", "full", "offload")
INPUT = "block_input"


def init(block: nn.Module, key: jax.Array, layers: int, *args: Any) -> Params:
    """Draw parameters of `layers` blocks, each leaf (layers, ...); `args` are a block's inputs."""
    return jax.vmap(lambda k: block.init(k, *args)["params"])(jax.random.split(key, layers))


def run(
    block: nn.Module,
    params: Params | OffloadedLayers,
    x: Any,
    *args: Any,
    layers: slice = slice(None),
    remat: str = "none",
) -> Any:
    """Feed x, an array or a tuple of arrays, through every layer; all layers take the same `args`.

    `layers` selects some of the layers. Parameters are cast to the dtype of x one layer at a time,
    so that float32 masters can serve a bfloat16 computation without a second copy of the whole
    network; their gradient leaves each linear layer in float32 (`master_weights`). `remat`, one of
    REMAT, says what a gradient keeps; an `OffloadedLayers` has no gradient.
    """
    if isinstance(params, OffloadedLayers):
        return run_offloaded(block, params, [(x, *args)], layers)[0]
    dtype = jax.tree.leaves(x)[0].dtype

    @functools.partial(_rematerialized, remat=remat)
    def layer(x: Any, params: Params) -> tuple[Any, None]:
        x = checkpoint_name(x, INPUT)
        params = cast_others(params, dtype)
        return lora_layers.apply(block, params, x, *args, weights=dtype), None

    if layers == slice(None):
        return jax.lax.scan(layer, x, params)[0]

    # Slices of the parameters would be a second copy of them. (The gradient of this loop costs far
    # more than that of the one above, so a whole stack does not go through it.)
    def numbered(x: Any, i: jax.Array) -> tuple[Any, None]:
        return layer(x, _select_layer(params, i))

    count = jax.tree.leaves(params)[0].shape[0]
    return jax.lax.scan(numbered, x, jnp.arange(count)[layers])[0]


def run_each(
    block: nn.Module, params: Params | OffloadedLayers, inputs: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Run each input (x, *args) as if it were alone; copy each layer of an `OffloadedLayers` once
    for all."""
    if isinstance(params, OffloadedLayers):
        return run_offloaded(block, params, inputs)
    return [run(block, params, *each) for each in inputs]


def get_layer(
    params: Params | OffloadedLayers, number: int, parts: Sequence[str] | None = None
) -> Params:
    """Return the parameters of one layer on the device, or these parts of them."""
    if isinstance(params, OffloadedLayers):
        return layer_on_device(params, number, parts)
    wanted = params if parts is None else {name: params[name] for name in parts}
    return _select_layer(wanted, number)


def _select_layer(params: Params, number: int | jax.Array) -> Params:
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, number, keepdims=False), params)


def _rematerialized(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Wrap a layer so that its gradient recomputes what `remat` does not keep."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "dots":
            linear = policies.save_only_these_names(lora_layers.LINEAR)
            policy = policies.save_from_both_policies(linear, attention.KEEP_RESULTS)
        case "attention":
            policy = attention.KEEP_RESULTS
        case "full":
            policy = policies.nothing_saveable
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT],
                offload_src="device", offload_dst="pinned_host",
            )  # fmt: skip
        case _:
            raise ValueError(f"remat {remat!r}: expected one of {', '.join(REMAT)}")
    # Inside a loop nothing can be merged across the boundary, so no barrier is needed.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
