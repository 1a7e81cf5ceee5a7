"""Layers that are kept off the device and copied there one by one.

If a device is too small for all layers of a stack, they stand in an `OffloadedLayers`: each is
copied to the device while the one before computes, and runs as a program of its own. (Inside one
program XLA overlaps no copies from the host with products on GPUs: docs/performance.md.)
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Sharding, SingleDeviceSharding

from framepack_jax.models import lora_layers
from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params


@dataclasses.dataclass(frozen=True, eq=False)
class LazyLayers(Sequence[Params]):
    """Layers whose first are in memory; `read` returns each other layer when it is needed."""

    loaded: Sequence[Params]
    read: Callable[[int], Params]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Params:  # type: ignore[override]  # no slices
        number = range(self.length)[i]  # or IndexError
        return self.loaded[number] if number < len(self.loaded) else self.read(number)


@dataclasses.dataclass(frozen=True, eq=False)
class OffloadedLayers:
    """The layers of a stack, in host memory, on disk, or some of them on the device.

    `layers[i]` are the parameters of one layer, arrays of numpy or JAX. A JAX array is computed
    with on the devices of its sharding, whatever its kind of memory. `on_layer()` is called after
    each layer has been computed.
    """

    layers: Sequence[Params]
    on_layer: Callable[[], None] | None = None

    def map(self, change: Callable[[int, Params], Params]) -> "OffloadedLayers":
        """Replace each layer by `change(i, layer)`; layers on disk are changed when read."""
        if not isinstance(self.layers, LazyLayers):
            changed = [change(i, layer) for i, layer in enumerate(self.layers)]
            return dataclasses.replace(self, layers=changed)
        read = self.layers.read
        lazy = dataclasses.replace(
            self.layers,
            loaded=[change(i, layer) for i, layer in enumerate(self.layers.loaded)],
            read=lambda i: change(i, read(i)),
        )
        return dataclasses.replace(self, layers=lazy)


def is_offloaded(params: Params) -> bool:
    """Return True if a stack is an `OffloadedLayers`: call the network outside of `jax.jit`."""
    return any(isinstance(leaf, OffloadedLayers) for leaf in params.values())


def offloaded_layers(params: Params) -> int:
    """Return the number of layers in the offloaded stacks of a network."""
    return sum(len(leaf.layers) for leaf in params.values() if isinstance(leaf, OffloadedLayers))


def with_on_layer(params: Params, on_layer: Callable[[], None]) -> Params:
    """Return the parameters with `on_layer()` called after each layer of an offloaded stack."""
    return {
        name: dataclasses.replace(leaf, on_layer=on_layer)
        if isinstance(leaf, OffloadedLayers)
        else leaf
        for name, leaf in params.items()
    }


def stacked_shapes(params: Params) -> Params:
    """Return shape and dtype of every parameter, the layers of offloaded stacks on an axis too."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, OffloadedLayers):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        count = len(leaf.layers)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), leaf.layers[0]
        )

    return jax.tree.map(shape, params)


def run_offloaded(
    block: nn.Module,
    params: OffloadedLayers,
    inputs: Sequence[tuple[Any, ...]],
    layers: slice = slice(None),
) -> list[Any]:
    """Feed each input (x, *args) through the layers, a program for each layer and input.

    When a layer is done, the copy of the layer after the next is requested and then the next layer
    is started, in this order: GPUs begin a copy to fresh memory when all work started before it
    has ended. So the device holds two layers at most.
    """
    xs, others = [x for x, *_ in inputs], [args for _, *args in inputs]
    numbers = range(len(params.layers))[layers]
    if not numbers:
        return xs
    # Committed to its device, as the results of layers are; otherwise the first layer would be
    # another program.
    xs = jax.device_put(xs, jax.tree.map(lambda x: x.sharding, xs))
    layer = layer_on_device(params, numbers[0])
    for following in itertools.chain(numbers[1:], [None]):
        jax.block_until_ready(xs)
        coming = {} if following is None else layer_on_device(params, following)
        xs = [_run_layer(block, layer, x, *args) for x, args in zip(xs, others, strict=True)]
        layer = coming
        if params.on_layer is not None:
            jax.block_until_ready(xs)
            params.on_layer()
    return xs


@functools.partial(jax.jit, static_argnames="block")
def _run_layer(block: nn.Module, params: Params, x: Any, *args: Any) -> Any:
    dtype = jax.tree.leaves(x)[0].dtype
    return lora_layers.apply(block, cast_params(params, dtype), x, *args)


def lower_layer(block: nn.Module, params: Params, x: Any, *args: Any) -> jax.stages.Lowered:
    """Lower the program of one layer of an `OffloadedLayers`, for arrays or their shapes."""
    return _run_layer.lower(block, params, x, *args)


def layer_on_device(
    params: OffloadedLayers, number: int, parts: Sequence[str] | None = None
) -> Params:
    """Begin to copy a layer, or these parts of it, to the device."""
    layer = params.layers[number]
    return on_device(layer if parts is None else {name: layer[name] for name in parts})


def on_device(params: Params) -> Params:
    """Begin to copy arrays of numpy or JAX to the device's own memory, without waiting."""
    return put(params, "device")


def on_host(params: Params) -> Params:
    """Copy arrays of numpy or JAX to host memory that a device can copy from."""
    return jax.block_until_ready(put(params, "pinned_host"))


def put(params: Params, memory_kind: str) -> Params:
    """Move arrays of numpy or JAX to a kind of memory, by one call for all.

    Each process moves its own shards of an array that several processes share.
    """
    leaves, tree = jax.tree.flatten(params)
    parts = [
        [shard.data for shard in leaf.addressable_shards] if _is_shared(leaf) else [leaf]
        for leaf in leaves
    ]
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # made at run time
    if not isinstance(default, jax.Device):
        default = jax.local_devices()[0]
    alone = SingleDeviceSharding(default)

    def target(part: Any) -> Sharding:
        sharding = part.sharding if isinstance(part, jax.Array) else alone
        return sharding.with_memory_kind(memory_kind)

    def joined(leaf: Any, parts: list[jax.Array]) -> jax.Array:
        if not _is_shared(leaf):
            return parts[0]
        sharding = leaf.sharding.with_memory_kind(memory_kind)
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    moved = jax.device_put(parts, jax.tree.map(target, parts))
    return jax.tree.unflatten(tree, map(joined, leaves, moved))


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
