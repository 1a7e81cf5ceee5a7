"""Equal blocks, one after another: the only place that loops over layers.

The parameters of a stack carry a leading layer axis and run through one `lax.scan`, so that a
network of 60 blocks traces and compiles like one of two. On disk, in conversion and in LoRA files
every layer stands by itself, as `double/07/img_qkv/kernel`; `unstack_layers` and `stack_layers`
convert between the two.

Beside the kernel of a linear layer may lie low-rank factors (LoRA, arXiv 2106.09685), `lora_a`
(in, r) and `lora_b` (r, ...out): the layer then gives x W + (x a) b. They are parameters like
others, with a layer axis in a stack; `framepack_jax.models.lora` puts them there.

Where a device is too small for all layers, they stand in an `OffloadedLayers`: each is brought to
the device while the one before computes, and runs as a program of its own. (Inside one program XLA
overlaps no copies from the host with products on GPUs: docs/measurements/gpu.md.)
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import SingleDeviceSharding

from framepack_jax.ops import attention

Params = dict[str, Any]
LORA_A, LORA_B = "lora_a", "lora_b"
# Types that a kernel may be kept in, with a scale for each output channel beside it.
QUANTIZED = ("int8", "float8_e4m3fn")
SCALE = "kernel_scale"
# What of a block's forward pass is kept for the backward pass: all; its input and the results of
# linear layers and attention; its input and those of attention; its input; its input, in host
# memory.
REMAT = ("none", "dots", "attention", "full", "offload")
INPUT, LINEAR = "block_input", "linear_result"


@dataclasses.dataclass(frozen=True, eq=False)
class Layers(Sequence[Params]):
    """Some layers that are there, and others that `read` gives whenever they are asked for."""

    there: Sequence[Params]
    read: Callable[[int], Params]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Params:
        number = range(self.count)[i]  # or IndexError
        return self.there[number] if number < len(self.there) else self.read(number)


@dataclasses.dataclass(frozen=True, eq=False)
class OffloadedLayers:
    """The layers of a stack, wherever they lie: in host memory, on a disk, some on the device.

    `layers[i]` gives the parameters of one, arrays of numpy or JAX; what those of JAX say of
    devices other than their kind of memory is where they are computed. `on_layer()` is called
    whenever a layer has been computed.
    """

    layers: Sequence[Params]
    on_layer: Callable[[], None] | None = None

    def map(self, change: Callable[[int, Params], Params]) -> "OffloadedLayers":
        """With `change(i, layer)` for each layer, those on a disk whenever they are read."""
        if not isinstance(self.layers, Layers):
            changed = [change(i, layer) for i, layer in enumerate(self.layers)]
            return dataclasses.replace(self, layers=changed)
        there, read, count = self.layers.there, self.layers.read, self.layers.count
        changed = [change(i, layer) for i, layer in enumerate(there)]
        return dataclasses.replace(
            self, layers=Layers(changed, lambda i: change(i, read(i)), count)
        )


def is_offloaded(params: Params) -> bool:
    """Whether a stack is an `OffloadedLayers`: the network is then called outside of `jax.jit`."""
    return any(isinstance(leaf, OffloadedLayers) for leaf in params.values())


def offloaded_layers(params: Params) -> int:
    """Return the number of layers in the streamed stacks of a network."""
    return sum(len(leaf.layers) for leaf in params.values() if isinstance(leaf, OffloadedLayers))


def watched(params: Params, on_layer: Callable[[], None]) -> Params:
    """Return the parameters of a network whose streamed stacks call `on_layer()` after a layer."""
    return {
        name: dataclasses.replace(leaf, on_layer=on_layer)
        if isinstance(leaf, OffloadedLayers)
        else leaf
        for name, leaf in params.items()
    }


def shapes(params: Params) -> Params:
    """Shape and dtype of every parameter, layers stacked also where they are streamed."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, OffloadedLayers):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        count = len(leaf.layers)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), leaf.layers[0]
        )

    return jax.tree.map(of, params)


def init(block: nn.Module, key: jax.Array, layers: int, *args: Any) -> Params:
    """Parameters of `layers` blocks, each leaf (layers, ...); `args` are the block's inputs."""
    return jax.vmap(lambda k: block.init(k, *args)["params"])(jax.random.split(key, layers))


def run(
    block: nn.Module,
    params: Params | OffloadedLayers,
    x: Any,
    *args: Any,
    layers: slice = slice(None),
    remat: str = "none",
) -> Any:
    """Feed x, an array or a tuple of arrays, through every layer; `args` go to all alike.

    `layers` takes some of the layers only. Parameters are cast to the dtype of x one layer at a
    time, so that float32 masters can serve a bfloat16 computation without a second copy of the
    whole network. `remat`, one of REMAT, says what a gradient keeps; an `OffloadedLayers` has none.
    """
    if isinstance(params, OffloadedLayers):
        return _run_streamed(block, params, [(x, *args)], layers)[0]
    dtype = jax.tree.leaves(x)[0].dtype

    @functools.partial(_rematerialized, remat=remat)
    def layer(x: Any, params: Params) -> tuple[Any, None]:
        x = checkpoint_name(x, INPUT)
        with lora_interceptor():
            return block.apply({"params": cast(params, dtype)}, x, *args), None

    if layers == slice(None):
        return jax.lax.scan(layer, x, params)[0]

    # Slices of the parameters would be a second copy of them. (The gradient of this loop is far
    # dearer than that of the one above, so a whole stack does not go through it.)
    def numbered(x: Any, i: jax.Array) -> tuple[Any, None]:
        return layer(x, at(params, i))

    count = jax.tree.leaves(params)[0].shape[0]
    return jax.lax.scan(numbered, x, jnp.arange(count)[layers])[0]


def run_each(
    block: nn.Module, params: Params | OffloadedLayers, inputs: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """`run` for several inputs (x, *args), one by one, each as if it were alone; every layer of a
    `OffloadedLayers` is brought once for all."""
    if isinstance(params, OffloadedLayers):
        return _run_streamed(block, params, inputs)
    return [run(block, params, *each) for each in inputs]


def _run_streamed(
    block: nn.Module,
    params: OffloadedLayers,
    inputs: Sequence[tuple[Any, ...]],
    layers: slice = slice(None),
) -> list[Any]:
    """A program a layer and input. When the layer before is done, the next copy is asked for and
    then this layer is started, in this order: GPUs begin a copy to fresh memory when what was
    started before has ended. So the device has two layers at most."""
    xs, others = [x for x, *_ in inputs], [args for _, *args in inputs]
    numbers = range(len(params.layers))[layers]
    if not numbers:
        return xs
    # Bound to its device, as what layers give is: else the first would be another program.
    xs = jax.device_put(xs, jax.tree.map(lambda stream: stream.sharding, xs))
    here = at(params, numbers[0])
    for following in itertools.chain(numbers[1:], [None]):
        jax.block_until_ready(xs)
        coming = None if following is None else at(params, following)
        xs = [_layer(block, here, x, *args) for x, args in zip(xs, others, strict=True)]
        here = coming
        if params.on_layer is not None:
            jax.block_until_ready(xs)
            params.on_layer()
    return xs


@functools.partial(jax.jit, static_argnames="block")
def _layer(block: nn.Module, params: Params, x: Any, *args: Any) -> Any:
    with lora_interceptor():
        return block.apply({"params": cast(params, jax.tree.leaves(x)[0].dtype)}, x, *args)


def lower(block: nn.Module, params: Params, x: Any, *args: Any) -> jax.stages.Lowered:
    """The program of one layer of an `OffloadedLayers`, for arrays or their shapes."""
    return _layer.lower(block, params, x, *args)


def _rematerialized(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """A layer whose gradient computes again what `remat` does not keep."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "dots":
            linear = policies.save_only_these_names(LINEAR)
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


def at(
    params: Params | OffloadedLayers, layer: int | jax.Array, parts: Sequence[str] | None = None
) -> Params:
    """The parameters of one layer, on the device; of its `parts` only, where they are named."""

    def wanted(params: Params) -> Params:
        return params if parts is None else {name: params[name] for name in parts}

    if isinstance(params, OffloadedLayers):
        return on_device(wanted(params.layers[layer]))
    params = wanted(params)
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, layer, keepdims=False), params)


def on_device(params: Params) -> Params:
    """Arrays of numpy or JAX in the device's own memory; copies are begun, and not waited for."""
    return put(params, "device")


def on_host(params: Params) -> Params:
    """The same in the host's memory, where a device can fetch them from."""
    return jax.block_until_ready(put(params, "pinned_host"))


def put(params: Params, kind: str) -> Params:
    """Arrays of numpy or JAX in this kind of memory, by one call for all. Of an array that several
    processes share, each moves its own shards."""
    leaves, tree = jax.tree.flatten(params)
    parts = [
        [shard.data for shard in leaf.addressable_shards] if _is_shared(leaf) else [leaf]
        for leaf in leaves
    ]
    default = jax.config.jax_default_device
    if not isinstance(default, jax.Device):
        default = jax.local_devices()[0]
    alone = SingleDeviceSharding(default)

    def there(part: Any) -> jax.sharding.Sharding:
        where = part.sharding if isinstance(part, jax.Array) else alone
        return where.with_memory_kind(kind)

    def whole(leaf: Any, parts: list[jax.Array]) -> jax.Array:
        if not _is_shared(leaf):
            return parts[0]
        where = leaf.sharding.with_memory_kind(kind)
        return jax.make_array_from_single_device_arrays(leaf.shape, where, parts)

    moved = jax.device_put(parts, jax.tree.map(there, parts))
    return tree.unflatten(map(whole, leaves, moved))


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def cast(params: Params, dtype: Any) -> Params:
    """Floating-point leaves, and quantized kernels times their scales, as `dtype`."""
    return jax.tree.map(
        lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p,
        _dequantized(params),
    )


def _dequantized(params: Any) -> Any:
    """Without scales: a quantized kernel (in, ...out) times its own (...out), in float32."""
    if not isinstance(params, dict):
        return params
    params = {name: _dequantized(leaf) for name, leaf in params.items()}
    if SCALE in params:
        params["kernel"] = params["kernel"].astype(jnp.float32) * params.pop(SCALE)[None]
    return params


def lora_interceptor() -> contextlib.AbstractContextManager[None]:
    """Where modules are applied in it, Dense and DenseGeneral add (x a) b to what they give.

    A layer without factors computes what it computes outside, operation by operation. The product
    a b, as large as the kernel, is never formed, so that nothing of that size is differentiated.
    The sum has a name, so that of a layer's two products a gradient keeps one array.
    """
    return nn.intercept_methods(_linear)


def _linear(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    y = call(*args, **kwargs)
    module = context.module
    if not isinstance(module, nn.Dense | nn.DenseGeneral) or context.method_name != "__call__":
        return y
    if module.has_variable("params", LORA_A):
        factors = (module.get_variable("params", name) for name in (LORA_A, LORA_B))
        x, a, b = nn.dtypes.promote_dtype(args[0], *factors, dtype=module.dtype)
        product = functools.partial(jnp.tensordot, axes=1, precision=module.precision)
        y += product(product(x, a), b).astype(y.dtype)
    return checkpoint_name(y, LINEAR)


def merged_kernels(params: Params) -> Params:
    """Parameters of one linear layer with its factors, where it has any, in its kernel: W + a b,
    computed in float32, as W's dtype. Raises ValueError where the kernel is quantized."""
    if LORA_A not in params:
        return params
    rest = {name: leaf for name, leaf in params.items() if name not in (LORA_A, LORA_B)}
    kernel = params["kernel"]
    check_foldable(kernel)
    a, b = (params[name].astype(jnp.float32) for name in (LORA_A, LORA_B))
    change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    return rest | {"kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}


def check_foldable(kernel: jax.Array) -> None:
    """Raise ValueError where factors cannot be added to a kernel."""
    if kernel.dtype.name in QUANTIZED:
        raise ValueError(
            f"a LoRA cannot be merged into a kernel of {kernel.dtype}, whose steps are coarser than"
            f" the change; take a bundle converted without --dtype {kernel.dtype}, or leave"
            " --merge-lora out"
        )


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
    """The inverse of `unstack_layers`; `stack` puts the layers of one leaf together."""
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
