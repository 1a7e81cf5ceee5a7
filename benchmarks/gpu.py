"""What one GPU does at the shapes of the released model.

    python benchmarks/gpu.py [--parts matmul step ...] [--scale toy] [--json FILE]

Random weights of the true shapes: 608 x 640 pixels, window 9, bfloat16. First what the device can
do at all - matrix products, copies, attention, convolutions, weights streamed from the host - then
what is made of it: a denoising step, the VAE, a training step of a LoRA, and what diffusers needs
for the same (`peer-*`). Each part runs in a process of its own, so that peak memory is that part's.
`--scale toy` takes the same way at sizes for a CPU; its figures mean nothing.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from framepack_jax import bundle, packing, sharding
from framepack_jax.commands.dry_run_train import abstract_samples
from framepack_jax.commands.records import path_of
from framepack_jax.conditioning import MAX_PROMPT_TOKENS
from framepack_jax.models import packed_dit, vae
from framepack_jax.models.flops import forward_flops
from framepack_jax.ops import attention, conv
from framepack_jax.training import state
from framepack_jax.training.config import Config as Training
from framepack_jax.training.config import LoRA
from framepack_jax.training.loop import jitted_step, set_up
from framepack_jax.training.metrics import COST

ROOT = Path(__file__).parent.parent
ROUNDS, LEAST_SECONDS = 3, 0.25
IMAGE_TOKENS = 729
SCHEDULE = packing.RELEASED_INVERTED
BF16 = jnp.bfloat16

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of what is measured; `convs` are (frames, height, width, channels in and out)."""

    dit: packed_dit.Config
    vae: vae.Config
    pixels: tuple[int, int]
    square: int
    tokens: int
    convs: tuple[tuple[int, int, int, int, int], ...]
    streamed_layers: int
    batches: tuple[int, ...]
    remats: tuple[str, ...]


FULL = Scale(
    dit=packed_dit.Config(),
    vae=vae.Config(),
    pixels=(608, 640),
    square=8192,
    tokens=18752,
    convs=(
        (17, 608, 640, 128, 128), (17, 304, 320, 256, 256), (17, 608, 640, 256, 128),
        (9, 152, 160, 512, 512), (5, 76, 80, 512, 512), (17, 608, 640, 128, 3),
    ),
    streamed_layers=16,
    batches=(1, 2),
    remats=("full",),
)  # fmt: skip
TOY = Scale(
    dit=packed_dit.Config(
        heads=2, head_dim=32, double_layers=1, single_layers=2, refiner_layers=1,
        rope_axes=(8, 12, 12),
    ),
    vae=vae.Config(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4),
    pixels=(64, 80),
    square=64,
    tokens=128,
    convs=((5, 16, 16, 8, 8),),
    streamed_layers=2,
    batches=(1,),
    remats=("full",),
)  # fmt: skip


class Bench:
    """Rows of figures, printed and kept as they come."""

    def __init__(self, scale: Scale, rows: list[Row], keep: Callable[[], Any]) -> None:
        self.scale, self.rows, self.keep = scale, rows, keep

    def add(self, name: str, *, seconds: float, flops: float = 0, moved: float = 0, **more) -> None:
        """A row: `flops` and `moved` bytes become rates."""
        row: Row = {"name": name, "ms": 1e3 * seconds}
        if flops:
            row["tflop_s"] = flops / seconds / 1e12
        if moved:
            row["gb_s"] = moved / seconds / 1e9
        self.rows.append(row | more)
        self.keep()
        text = ", ".join(f"{key} {_short(value)}" for key, value in self.rows[-1].items())
        print(text, flush=True)

    def fail(self, name: str, error: Exception) -> None:
        """A row that says why there are no figures."""
        print(traceback.format_exc(limit=3), flush=True)
        self.rows.append({"name": name, "error": f"{type(error).__name__}: {error}"[:400]})
        self.keep()

    def time(self, name: str, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Compile and time a function of arrays; what fails is a row too."""
        try:
            began = time.monotonic()
            compiled = jax.jit(function).lower(*args).compile()
            compiling = time.monotonic() - began
            seconds, out = timed(compiled, *args)
        except Exception as error:
            self.fail(name, error)
            return None
        self.add(name, seconds=seconds, **more, compile_s=compiling)
        return out


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """(median seconds of a call, its result), many calls in a row at a time."""
    out = jax.block_until_ready(function(*args))
    began = time.monotonic()
    jax.block_until_ready(function(*args))
    calls = max(1, math.ceil(LEAST_SECONDS / max(1e-6, time.monotonic() - began)))
    seconds = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        seconds.append((time.monotonic() - began) / calls)
    return statistics.median(seconds), out


def normal(seed: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    """Random numbers: zeros would be faster than what people compute with."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, dtype))()


def filled(tree: Any, scale: float = 0.02) -> Any:
    """Arrays for abstract ones: random numbers, one block of them again and again, True and 0."""
    block = normal(0, 2**20 + 3, dtype=jnp.float32) * scale

    def leaf(block: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.full(x.shape, x.dtype == bool, x.dtype)
        return jnp.resize(block.astype(x.dtype), x.shape)

    where = jax.tree.map(lambda x: getattr(x, "sharding", None), tree)
    make = jax.jit(
        lambda block: jax.tree.map(functools.partial(leaf, block), tree), out_shardings=where
    )
    return make(block)


def relative_error(x: Any, reference: Any) -> float:
    """|x - reference| / |reference| in float32; NaN where either has one."""
    x, reference = (np.asarray(jax.device_get(a), np.float32) for a in (x, reference))
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def peak_memory() -> int:
    """Most bytes that the device's allocator has handed out; 0 where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def measure_matmul(bench: Bench) -> None:
    """The rate of matrix products in each of the number formats weights may be kept in."""
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
        """Activations brought to 8 bits, a scale a row, on the way."""
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
            if kind == jnp.int8:
                add(f"{name} {title} weights alone", weights_alone, x, small, w_scale)


def measure_copy(bench: Bench) -> None:
    """Bytes a second of the device's memory, read and written."""
    x = normal(1, 16 * bench.scale.square**2)
    bench.time("x + 1", lambda x: x + 1, x, moved=2 * x.nbytes)


def measure_attention(bench: Bench) -> None:
    """The project's attention and the kernels below it, forward and backward."""
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
            flops=3.5 * flops,
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
            flops=3.5 * flops,
        )  # fmt: skip
    # Lengths that kernels are known to fail at: ours against the chunks, and the kernel as it is.
    for tokens, valid_tokens in ((1101, 2), (1101, 1101), (1216, 1087), (1345, 1200), (2048, 2047)):
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
    """The causal 3-D convolution as one, as a sum of 2-D ones, and as one 2-D of stacked frames."""

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


def measure_streaming(bench: Bench) -> None:
    """Weights of layers in host memory, copied while the layer before computes."""
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

    seconds, _ = timed(copied)
    bench.add("layers copied alone, device_put", seconds=seconds, moved=size)
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

    seconds, _ = timed(from_python, x)
    bench.add("layers from the host, a program each", seconds=seconds, flops=flops, moved=size)


def denoiser_inputs(scale: Scale, batch: int = 1) -> tuple[Any, ...]:
    """(params, x, sigma, context, conditions), bfloat16."""
    dit = scale.dit
    frame = (*(side // 8 for side in scale.pixels), dit.in_channels)
    section = packing.plan(SCHEDULE, packing.default_order(SCHEDULE), 1)[0]
    timeline = packing.Timeline(packing.length([section]), frame)
    timeline.known[:] = True
    context = jax.tree.map(jnp.asarray, packing.read_context(section, timeline))
    context = context.replace(
        latents=tuple(normal(i, batch, *x.shape[1:]) for i, x in enumerate(context.latents))
    )
    params = jax.eval_shape(lambda: packed_dit.init(dit, jax.random.key(0)))
    params = filled(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, BF16), params))
    valid = jnp.broadcast_to(jnp.arange(MAX_PROMPT_TOKENS) < 100, (batch, MAX_PROMPT_TOKENS))
    conditions = packed_dit.Conditions(
        normal(5, batch, MAX_PROMPT_TOKENS, dit.text_dim), valid,
        normal(6, batch, dit.pooled_dim), normal(7, batch, IMAGE_TOKENS, dit.image_dim),
        jnp.full(batch, 10.0),
    )  # fmt: skip
    x = normal(8, batch, len(section.targets), *frame, dtype=jnp.float32)
    return params, x, jnp.full(batch, 0.7), context, conditions


def step_flops(scale: Scale) -> int:
    """FLOPs of a forward pass."""
    rows, columns = (side // 8 for side in scale.pixels)
    return forward_flops(scale.dit, SCHEDULE, rows, columns, MAX_PROMPT_TOKENS, IMAGE_TOKENS)


def measure_step(bench: Bench) -> None:
    """A forward pass of the transformer in bfloat16."""
    args = denoiser_inputs(bench.scale)
    run = functools.partial(packed_dit.velocity, bench.scale.dit, dtype=BF16)
    size = sum(p.nbytes for p in jax.tree.leaves(args[0]))
    bench.time("denoising step", run, *args, flops=step_flops(bench.scale), weights=size)
    bench.rows[-1]["peak_bytes"] = peak_memory()
    print("peak", peak_memory(), flush=True)


def measure_vae(bench: Bench) -> None:
    """A tile of the VAE in time (5 latents, 17 frames), all of the picture."""
    cfg = bench.scale.vae
    params = jax.tree.map(jnp.asarray, vae.init(cfg, jax.random.key(0)))
    height, width = bench.scale.pixels
    for dtype in (BF16, jnp.float32):
        latents = normal(1, 1, 5, height // 8, width // 8, cfg.latent_channels, dtype=dtype)
        frames = normal(2, 1, 17, height, width, 3, dtype=dtype)
        name = jnp.dtype(dtype).name
        bench.time(f"decode 17 frames, {name}", functools.partial(vae.decode, cfg), params, latents)
        bench.rows[-1]["peak_bytes"] = peak_memory()
        bench.time(f"encode 17 frames, {name}", functools.partial(vae.encode, cfg), params, frames)
        bench.rows[-1]["peak_bytes"] = peak_memory()


def measure_train(bench: Bench) -> None:
    """A step of LoRA training at window 9."""
    devices = sharding.make_mesh(devices=jax.local_devices()[:1])
    for remat in bench.scale.remats:
        for batch in bench.scale.batches:
            name = f"LoRA step, batch {batch}, remat {remat}"
            try:
                _time_training(bench, name, *lora_training(bench.scale, batch, remat), devices)
            except Exception as error:
                bench.fail(name, error)


def lora_training(scale: Scale, batch: int, remat: str) -> tuple[Training, Any]:
    """The config of a LoRA training, and the manifest of a bundle with a transformer this large."""
    manifest = bundle.read_manifest(path_of("framepack_i2v"))
    role = manifest.roles["transformer"]
    role = dataclasses.replace(role, config=dataclasses.asdict(scale.dit))
    manifest = dataclasses.replace(manifest, roles=manifest.roles | {"transformer": role})
    cfg = Training(
        bundle="framepack_i2v", trainable="lora", lora=LoRA(rank=32), batch=batch, remat=remat
    )
    return cfg, manifest


def training_program(
    scale: Scale, cfg: Training, manifest: Any, devices: Any
) -> tuple[Any, list[Any], float]:
    """(the compiled step, its arguments, seconds of compiling) of a training, on a mesh in use."""
    setup = set_up(cfg, manifest, devices)
    abstract = abstract_samples(setup, scale.pixels)
    began = time.monotonic()
    step = jitted_step(setup).lower(setup.abstract, setup.frozen, {}, abstract).compile()
    compiling = time.monotonic() - began
    now = state.with_params(cfg, setup.model, setup.tx, devices, filled(setup.abstract.params))
    return step, [now, filled(setup.frozen), {}, filled(abstract, 1.0)], compiling


def _time_training(bench: Bench, name: str, cfg: Training, manifest: Any, devices: Any) -> None:
    with jax.set_mesh(devices):
        step, (now, *rest), compiling = training_program(bench.scale, cfg, manifest, devices)
        print(f"{name}: compiled in {compiling:.1f} s, {step.memory_analysis()}", flush=True)
        seconds = []
        for _ in range(ROUNDS + 1):
            began = time.monotonic()
            now, metrics = step(now, *rest)
            jax.block_until_ready(metrics)
            seconds.append(time.monotonic() - began)
        flops = COST["lora"] * cfg.batch * step_flops(bench.scale)
        bench.add(
            name, seconds=statistics.median(seconds[1:]), flops=flops, compile_s=compiling,
            peak_bytes=peak_memory(), loss=float(metrics.loss),
        )  # fmt: skip


def _torch_timed(bench: Bench, name: str, function: Callable[[], Any], **more: Any) -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        began = time.monotonic()
        function()
        wait()
        compiling = time.monotonic() - began
        function()
        wait()
        seconds = []
        for _ in range(ROUNDS):
            began = time.monotonic()
            function()
            wait()
            seconds.append(time.monotonic() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    bench.add(name, seconds=statistics.median(seconds), first_s=compiling, peak_bytes=peak, **more)


@contextlib.contextmanager
def _torch_makes(dtype: Any, device: str) -> Iterator[None]:
    """Tensors and modules made here are of this type, there."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def measure_peer_step(bench: Bench) -> None:
    """diffusers' transformer on the same shapes, as it is and compiled block by block."""
    import torch
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    dit = bench.scale.dit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _torch_makes(torch.bfloat16, device):
        model = HunyuanVideoFramepackTransformer3DModel(
            num_attention_heads=dit.heads, attention_head_dim=dit.head_dim,
            num_layers=dit.double_layers, num_single_layers=dit.single_layers,
            num_refiner_layers=dit.refiner_layers, text_embed_dim=dit.text_dim,
            pooled_projection_dim=dit.pooled_dim, image_proj_dim=dit.image_dim,
            rope_axes_dim=dit.rope_axes, has_image_proj=True, has_clean_x_embedder=True,
        ).eval()  # fmt: skip
        rows, columns = (side // 8 for side in bench.scale.pixels)

        def latents(frames: int) -> Any:
            return torch.randn(1, 16, frames, rows, columns)

        def indices(first: int, count: int) -> Any:
            return torch.arange(first, first + count)

        window = packing.parse(SCHEDULE).window
        mask = (torch.arange(MAX_PROMPT_TOKENS) < 100)[None].to(torch.bool)
        inputs = {
            "hidden_states": latents(window), "timestep": torch.full([1], 700.0),
            "encoder_hidden_states": torch.randn(1, MAX_PROMPT_TOKENS, dit.text_dim),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(1, dit.pooled_dim),
            "image_embeds": torch.randn(1, IMAGE_TOKENS, dit.image_dim),
            "indices_latents": indices(2, window), "guidance": torch.full([1], 10000.0),
            "latents_clean": latents(2), "indices_latents_clean": indices(0, 2),
            "latents_history_2x": latents(2), "indices_latents_history_2x": indices(11, 2),
            "latents_history_4x": latents(16), "indices_latents_history_4x": indices(13, 16),
        }  # fmt: skip
    flops = step_flops(bench.scale)
    _torch_timed(bench, "diffusers, eager", lambda: model(**inputs), flops=flops)
    if device == "cuda":
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.compile()
        _torch_timed(bench, "diffusers, torch.compile", lambda: model(**inputs), flops=flops)


def measure_peer_vae(bench: Bench) -> None:
    """diffusers' VAE on the same shapes, and its convolution."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    cfg = bench.scale.vae
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    height, width = bench.scale.pixels
    for dtype in (torch.float16, torch.bfloat16):
        with _torch_makes(dtype, device):
            model = AutoencoderKLHunyuanVideo(
                block_out_channels=cfg.channels, layers_per_block=cfg.layers_per_block,
                norm_num_groups=cfg.norm_groups,
            ).eval()  # fmt: skip
            latents = torch.randn(1, 16, 5, height // 8, width // 8)
            frames = torch.randn(1, 3, 17, height, width)
        _torch_timed(
            bench, f"diffusers decode 17 frames, {dtype}", functools.partial(model.decode, latents)
        )
        _torch_timed(
            bench, f"diffusers encode 17 frames, {dtype}", functools.partial(model.encode, frames)
        )
    for t, h, w, channels, out in bench.scale.convs:
        with _torch_makes(torch.bfloat16, device):
            x = torch.randn(1, channels, t + 2, h + 2, w + 2)
            module = torch.nn.Conv3d(channels, out, 3)
        flops = 2.0 * 27 * channels * out * t * h * w
        for name, layout in (("", torch.contiguous_format), (" last", torch.channels_last_3d)):
            module, x = module.to(memory_format=layout), x.to(memory_format=layout)
            kind = f"{x.dtype}, channels{name or ' first'}"
            title = f"torch conv3d {kind}, {t}x{h}x{w} {channels}->{out}"
            _torch_timed(bench, title, functools.partial(module, x), flops=flops)


MEASURES = {
    "matmul": measure_matmul, "copy": measure_copy, "attention": measure_attention,
    "conv": measure_conv, "streaming": measure_streaming, "step": measure_step,
    "vae": measure_vae, "train": measure_train, "peer-step": measure_peer_step,
    "peer-vae": measure_peer_vae,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what one GPU does. Times are medians of wall-clock seconds."""

    parts: tuple[str, ...] = tuple(MEASURES)
    """What is measured, in this order."""
    scale: Literal["full", "toy"] = "full"
    """Shapes of the released model, or small ones for a try on a CPU."""
    json: Path | None = None
    """File for all figures; those that are done stand in it at any time."""
    limit: float = 900.0
    """Seconds that a part may take; then it is stopped, and the next begins."""
    here: bool = False
    """In this process, without a limit."""

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in MEASURES:
                raise ValueError(f"--parts {name!r}: expected some of {', '.join(MEASURES)}")


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print."""
    try:
        config = tyro.cli(Config, prog="benchmarks/gpu.py", args=args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    results = machine() if config.here else {}

    def keep() -> None:
        if config.json is not None:
            config.json.write_text(json.dumps(results, indent=1))

    for part in config.parts:
        print(f"\n{part}: {(MEASURES[part].__doc__ or '').splitlines()[0]}", flush=True)
        if config.here:
            rows = results[part] = []
            MEASURES[part](Bench({"full": FULL, "toy": TOY}[config.scale], rows, keep))
        else:
            results |= in_a_process(config, part)
        keep()
    return results


def in_a_process(config: Config, part: str) -> dict[str, Any]:
    """The figures of a part, and why there are no more."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--parts", part, "--here"]
        command += ["--scale", config.scale, "--json", str(file)]
        # What is not needed stays free: for a large step, and for torch beside JAX.
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
        problem = None
        try:
            subprocess.run(
                command, cwd=ROOT, check=True, timeout=config.limit, env=memory | os.environ
            )
        except (subprocess.SubprocessError, OSError) as error:
            print(error, flush=True)
            problem = {"name": part, "error": str(error)}
        figures = json.loads(file.read_text()) if file.exists() else {part: []}
        figures[part] += [problem] if problem else []
        return figures


def machine() -> dict[str, Any]:
    """The device and the versions."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
