"""Measure what a device can do: matrix products, copies, attention, convolutions, offloading.

Parts of `benchmarks.gpu`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.bench import ATTENTION_COST, Bench, relative_error
from framepack_jax.bench.timing import BF16, normal
from framepack_jax.models import offload, scan
from framepack_jax.ops import attention, conv


def measure_matmul(bench: Bench) -> None:
    """Measure matrix products in each number format of weights."""
    scale = bench.scale
    n, width = scale.square, scale.dit.width
    shapes = {
        "square": (n, n, n),
        "mlp_in": (scale.tokens, width, 4 * width),
        "mlp_out": (scale.tokens, 4 * width, width),
    }

    def product(x: jax.Array, w: jax.Array, out: Any) -> jax.Array:
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=out)

    def scaled(x: jax.Array, w: jax.Array, w_scale: jax.Array, kind: Any, most: float) -> jax.Array:
        """Quantize the activations to 8 bits with a scale for each row, then multiply."""
        peak = jnp.max(jnp.abs(x), axis=1, keepdims=True).astype(jnp.float32) / most
        x = x.astype(jnp.float32) / peak
        x = (jnp.round(x) if kind == jnp.int8 else x).astype(kind)
        out = product(x, w, jnp.int32 if kind == jnp.int8 else jnp.float32)
        return (out.astype(jnp.float32) * peak * w_scale).astype(BF16)

    def weights_alone(x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
        return product(x, (w.astype(jnp.float32) * w_scale).astype(BF16), BF16)

    for name, (m, k, n) in shapes.items():
        x, w = normal(1, m, k), normal(2, k, n)
        flops = 2.0 * m * k * n
        add = functools.partial(bench.time, flops=flops)
        exact = add(f"{name} bf16", functools.partial(product, out=BF16), x, w)
        for kind, most, title in ((jnp.float8_e4m3fn, 448.0, "fp8"), (jnp.int8, 127.0, "int8")):
            w_scale = jnp.max(jnp.abs(w), axis=0, keepdims=True).astype(jnp.float32) / most
            small = w.astype(jnp.float32) / w_scale
            small = (jnp.round(small) if kind == jnp.int8 else small).astype(kind)
            out = jnp.int32 if kind == jnp.int8 else BF16
            product_of_8 = functools.partial(product, out=out)
            add(f"{name} {title}", product_of_8, (x * 16).astype(kind), small)
            got = add(
                f"{name} {title}, activations scaled by row",
                functools.partial(scaled, kind=kind, most=most), x, small, w_scale,
            )  # fmt: skip
            if got is not None and exact is not None:
                bench.rows[-1]["relative_error"] = relative_error(got, exact)
            add(f"{name} {title} weights alone", weights_alone, x, small, w_scale)


def measure_copy(bench: Bench) -> None:
    """Measure the bytes per second that the device's memory reads and writes."""
    x = normal(1, 16 * bench.scale.square**2)
    bench.time("x + 1", lambda x: x + 1, x, moved=2 * x.nbytes)


def measure_attention(bench: Bench) -> None:
    """Measure `ops.attention` and the kernels below it, forward and backward."""
    dit, length = bench.scale.dit, bench.scale.tokens

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
        return attention.attend(q, k, v, valid)

    def gradient(f: Callable[..., jax.Array]) -> Callable[..., Any]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
            return jnp.sum(f(q, k, v, *rest).astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1, 2))

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        fused = "cudnn" if jax.default_backend() == "gpu" else "xla"
        return jax.nn.dot_product_attention(q, k, v, implementation=fused)

    def by_length(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> jax.Array:
        fused = "cudnn" if jax.default_backend() == "gpu" else "xla"
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=count, implementation=fused
        )

    def inputs(length: int, heads: int) -> list[jax.Array]:
        return [normal(i, 1, length, heads, dit.head_dim) for i in range(3)]

    for tokens in (length - 11, length - 64):
        q, k, v = inputs(tokens, dit.heads)
        valid = (jnp.arange(tokens) < tokens - 100)[None]
        flops = 4.0 * tokens**2 * dit.heads * dit.head_dim
        bench.time(f"attend, {tokens} tokens", attend, q, k, v, valid, flops=flops)
        bench.time(
            f"attend with gradient, {tokens} tokens", gradient(attend), q, k, v, valid,
            flops=ATTENTION_COST * flops,
        )  # fmt: skip
    padded = -(-length // 128) * 128
    q, k, v = inputs(padded, dit.heads)
    flops = 4.0 * padded**2 * dit.heads * dit.head_dim
    count = jnp.full(1, padded - 100, jnp.int32)
    bench.time(f"kernel alone, {padded} tokens", plain, q, k, v, flops=flops)
    bench.time(f"kernel, lengths, {padded} tokens", by_length, q, k, v, count, flops=flops)
    for name, f, args in (("alone", plain, ()), ("lengths", by_length, (count,))):
        bench.time(
            f"kernel {name} with gradient, {padded} tokens", gradient(f), q, k, v, *args,
            flops=ATTENTION_COST * flops,
        )  # fmt: skip
    # Ours against the chunks, and the kernel as it is.
    for tokens, valid_tokens in bench.scale.lengths:
        q, k, v = inputs(tokens, 2)
        valid = (jnp.arange(tokens) < valid_tokens)[None]
        count = jnp.full(1, valid_tokens, jnp.int32)
        with attention.use("xla"):
            wanted = jax.jit(gradient(attend))(*(x.astype(jnp.float32) for x in (q, k, v)), valid)
        for name, f, last in (("attend", attend, valid), ("kernel", by_length, count)):
            title = f"gradient, {name}, {valid_tokens} of {tokens} tokens"
            got = bench.time(title, gradient(f), q, k, v, last)
            if got is not None:
                errors = [relative_error(a, b) for a, b in zip(got, wanted, strict=True)]
                bench.rows[-1]["relative_errors_qkv"] = errors
                print(title, errors, flush=True)


def measure_conv(bench: Bench) -> None:
    """Measure the causal 3-D convolution whole, as a sum of 2-D ones, and of stacked frames."""

    def stacked(x: jax.Array, w: jax.Array) -> jax.Array:
        """One 2-D convolution whose channels are those of all frames of the kernel."""
        kt, kh, kw, channels, out = w.shape
        last = x.shape[1] - kt + 1
        frames = jnp.concatenate([x[:, i : i + last] for i in range(kt)], axis=-1)
        w = jnp.moveaxis(w, 0, 2).reshape(kh, kw, kt * channels, out)
        return jax.lax.conv_general_dilated(
            frames[0], w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[None]

    def frames_in_place(x: jax.Array, w: jax.Array) -> jax.Array:
        """The sum in the inputs' own type."""
        last = x.shape[1] - w.shape[0] + 1
        return sum(
            jax.lax.conv_general_dilated(
                x[0, i : i + last], w[i], (1, 1), "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for i in range(w.shape[0])
        )[None]  # fmt: skip

    forms = {
        "3-D": functools.partial(conv.by_volume, stride=(1, 1, 1)),
        "sum of 2-D, float32": functools.partial(conv.by_frames, stride=(1, 1, 1)),
        "sum of 2-D": frames_in_place,
        "stacked 2-D": stacked,
    }
    for number, (t, h, w, channels, out) in enumerate(bench.scale.convs):
        for dtype in (BF16, jnp.float32)[: 2 if number == 0 else 1]:
            x = normal(1, 1, t + 2, h + 2, w + 2, channels, dtype=dtype)
            kernel = normal(2, 3, 3, 3, channels, out, dtype=dtype) * 0.02
            flops = 2.0 * 27 * channels * out * t * h * w
            for name, form in forms.items():
                title = f"{t}x{h}x{w} {channels}->{out} {jnp.dtype(dtype).name}, {name}"
                bench.time(title, form, x, kernel, flops=flops)


class Products(nn.Module):
    """The products of a single block."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        inner = nn.Dense(6 * width, use_bias=False, name="a")(x)
        return x + nn.Dense(width, use_bias=False, name="b")(inner)


def measure_streaming(bench: Bench) -> None:
    """Measure layers whose weights come from host memory while the layer before computes."""
    dit, tokens, layers = bench.scale.dit, bench.scale.tokens, bench.scale.streamed_layers
    width = dit.width
    device = jax.local_devices()[0]
    here = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    # As many as a single block's products have: 12 w w, of q, k, v 3, output 1, feed-forward 8.
    shapes = {"a": (layers, width, 6 * width), "b": (layers, 6 * width, width)}
    weights = {name: normal(3, *shape) * 0.02 for name, shape in shapes.items()}
    x = normal(4, tokens, width)
    size = sum(w.nbytes for w in weights.values())
    flops = 4.0 * tokens * 6 * width**2 * layers

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        return (x + (x @ w["a"]) @ w["b"]).astype(x.dtype)

    def to_device(w: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), w)

    def resident(x: jax.Array, weights: Any) -> jax.Array:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]

    def in_place(x: jax.Array, weights: Any) -> jax.Array:
        return jax.lax.scan(lambda x, w: (layer(x, to_device(w)), None), x, weights)[0]

    def at(weights: Any, i: jax.Array) -> Any:
        return to_device(
            jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), weights)
        )

    def ahead(x: jax.Array, weights: Any) -> jax.Array:
        """The loop carries the next layer."""

        def body(carry: Any, i: jax.Array) -> Any:
            x, now = carry
            following = at(weights, jnp.minimum(i + 1, layers - 1))
            return (layer(x, now), following), None

        return jax.lax.scan(body, (x, at(weights, 0)), jnp.arange(layers))[0][0]

    def unrolled(x: jax.Array, weights: Any) -> jax.Array:
        for i in range(layers):
            x = layer(x, at(weights, jnp.int32(i)))
        return x

    bench.time("layers on the device", resident, x, weights, flops=flops)
    hosted = jax.tree.map(lambda w: jax.device_put(w, there), weights)
    del weights
    several = [jax.tree.map(lambda w, i=i: jax.device_put(w[i], there), hosted) for i in range(2)]

    def copied() -> Any:
        return [jax.device_put(several[i % 2], here) for i in range(layers)]

    bench.clock("layers copied alone, device_put", copied, moved=size)
    for name, form in (
        ("copied where used", in_place),
        ("one ahead", ahead),
        ("unrolled", unrolled),
    ):
        bench.time(f"layers from the host, {name}", form, x, hosted, flops=flops, moved=size)

    one = jax.jit(layer, donate_argnums=0)

    def from_python(x: jax.Array) -> jax.Array:
        """A program a layer; the next layer's copy is asked for before the layer is."""
        x = x + 0
        now = jax.device_put(several[0], here)
        for i in range(layers):
            following = jax.device_put(several[(i + 1) % 2], here)
            x = one(x, now)
            now = following
        return x

    title = "layers from the host, a program each"
    bench.clock(title, from_python, x, flops=flops, moved=size)
    kernels = [offload.on_host({name: {"kernel": w[name]} for name in w}) for w in several]
    streamed = offload.OffloadedLayers([kernels[i % 2] for i in range(layers)])
    run = functools.partial(scan.run, Products(), streamed)
    bench.clock("layers from the host, stack.run", run, x, flops=flops, moved=size)
