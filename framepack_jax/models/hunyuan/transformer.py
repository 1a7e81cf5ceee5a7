"""The packed-context diffusion transformer: HunyuanVideo's double- and single-stream DiT that reads
compressed history beside the noisy section.

Source: HunyuanVideo (arXiv 2412.03603) and FramePack (arXiv 2504.12626, section 3.2). A forward
pass is embed -> double blocks -> single blocks -> head. The functions `embed`, `run_blocks` and
`head` are separate so that a step cache can skip the blocks; `block_input` and `first_block` are
the signals that it decides by.

Sequence: [coarse context .. fine context][target][SigLIP tokens][text tokens], what is masked at
the end. RoPE turns image tokens only.

Shapes: B batch, T latent frames, H W latent rows and columns, C channels, L tokens, N heads,
D width = N heads x head width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from framepack_jax.models import lora_layers, offload, scan
from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.sizes import Layers, Positive, Size
from framepack_jax.ops.attention import attend, to_heads, to_tokens
from framepack_jax.ops.rope import Table, apply_rope, rope_table
from framepack_jax.packing import PackedContext, Schedule, kernel_shape
from framepack_jax.parallel.sharding import BATCH, TOKENS, constrain, dividing, fitting

STACKS = {"refiner": "refiner_layers", "double": "double_layers", "single": "single_layers"}
OFFLOADABLE = ("double", "single")
# Megatron's pairs (columns over `tensor`, then rows), and `fsdp` on the dimension that is left. A
# modulation is taken by rows: what it gives is a few vectors a sample, needed whole. Embeddings of
# patches and text have no second half to pair with; the layers of the embedding's MLPs have inputs
# too narrow for a large `fsdp`.
SHARDINGS = (
    (r"(refiner|double|single)/(\w+_)?qkv/kernel", (None, "fsdp", None, "tensor", None)),
    (r"(refiner|double|single)/(\w+_)?qkv/bias", (None, None, "tensor", None)),
    (r"(refiner|double|single)/(\w+_)?mlp_in/kernel", (None, "fsdp", "tensor")),
    (r"(refiner|double|single)/(\w+_)?mlp_in/bias", (None, "tensor")),
    (r"(refiner|double|single)/(\w+_)?(out|mlp_out|mod|gate)/kernel", (None, "tensor", "fsdp")),
    (r"(refiner|double|single)/(\w+_)?(out|mlp_out|mod|gate)/bias", ()),
    (r"(refiner|double|single)/(\w+_)?norm\d?/(scale|bias)", ()),
    (r"embed/(patch|text_proj|context_\w+)/kernel", (None, "fsdp")),
    (r"embed/(patch|text_proj|context_\w+)/bias", ()),
    (r"embed/\w+_(in|up)/kernel", (None, ("tensor", "fsdp"))),
    (r"embed/\w+_(in|up)/bias", (("tensor", "fsdp"),)),
    (r"embed/\w+_(out|down)/kernel", ("tensor", "fsdp")),
    (r"embed/\w+_(out|down)/bias", ()),
    (r"head/mod/kernel", ("tensor", "fsdp")),
    (r"head/out/kernel", ("fsdp", None)),
    (r"head/(mod|out)/bias", ()),
)
PATCH = "k1"
# k16 has no weights of its own: its latents are pooled to half size and embedded by k8.
POOLED_KERNELS = {"k16": "k8"}
# How much the blocks' output changes with their input's relative change, highest power first:
# TeaCache's fit to HunyuanVideo, as the FramePack release has it.
TEACACHE = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network. `context_kernels` names the context patch embeddings there are; a base
    HunyuanVideo model has none, and no image projection (`image_dim` None)."""

    in_channels: Size = 16
    out_channels: Size = 16
    heads: Size = 24
    head_dim: Size = 128
    double_layers: Layers = 20
    single_layers: Layers = 40
    refiner_layers: Layers = 2
    mlp_ratio: Positive = 4.0
    text_dim: Size = 4096
    pooled_dim: Size = 768
    image_dim: Size | None = 1152
    guidance: bool = True
    rope_axes: tuple[Size, Size, Size] = (16, 56, 56)
    rope_theta: Positive = 256.0
    context_kernels: tuple[str, ...] = ("k1", "k2", "k4")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@struct.dataclass
class Conditions:
    """What a video is made from: `text` (B, L, text_dim), `text_valid` (B, L) True where a token
    counts (a prefix), `pooled` (B, pooled_dim), `image` (B, tokens, image_dim) or None, and
    `guidance` (B,), the distilled guidance scale, or None."""

    text: jax.Array
    text_valid: jax.Array
    pooled: jax.Array
    image: jax.Array | None = None
    guidance: jax.Array | None = None


class Tokens(NamedTuple):
    """Everything the blocks need: the streams `img` (B, L_img, D) and `txt` (B, L_txt, D), the
    modulation vector `vec` (B, D), RoPE tables of the image tokens, and `valid` (B, L)."""

    img: jax.Array
    txt: jax.Array
    vec: jax.Array
    rope: Table
    valid: jax.Array


def velocity(
    cfg: TransformerConfig,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """The denoiser: noisy section x (B, T, H, W, C) at noise level sigma (B,) -> velocity, float32.

    H and W are even. Blocks compute in `dtype`; `remat` is what their gradient keeps
    (`scan.REMAT`). Where blocks are streamed, it is called outside of `jax.jit`. Raises ValueError
    where the context uses a kernel that the network has no embedding for, or sizes are odd.
    """
    tokens = embed(cfg, params, x, sigma, context, conditions, dtype)
    return head(cfg, params, run_blocks(cfg, params, tokens, remat=remat), tokens.vec, x.shape)


def embed(
    cfg: TransformerConfig,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any = jnp.float32,
) -> Tokens:
    """Patchify target and context, embed conditions, refine the text."""
    _check(cfg, x, context, conditions)
    needed = {name: params[name] for name in ("embed", "refiner")}
    return _embed(cfg, dtype, needed, x, sigma, context, conditions)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _embed(
    cfg: TransformerConfig,
    dtype: Any,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
) -> Tokens:
    cast = cast_params({"x": x, "context": context, "conditions": conditions}, dtype)
    # The embedding of context is no Dense layer, so low-rank factors go into its kernel.
    embedders = {
        name: lora_layers.merge_kernel(leaves) if name.startswith("context_") else leaves
        for name, leaves in params["embed"].items()
    }
    with lora_layers.lora_interceptor():
        img, image, text, vec, text_vec = Embed(cfg).apply(
            {"params": cast_params(embedders, dtype)},
            cast["x"], sigma, cast["context"], cast["conditions"], conditions.guidance,
        )  # fmt: skip
    valid = conditions.text_valid
    # A prompt without any token must still have one to attend to.
    readable = jnp.asarray(valid).at[:, 0].set(True)
    text = scan.run(RefinerBlock(cfg), params["refiner"], text, text_vec, readable)
    txt = jnp.concatenate([image, text], axis=1)
    unmasked = jnp.ones((x.shape[0], img.shape[1] + image.shape[1]), bool)
    valid = jnp.concatenate([unmasked, valid], axis=1)
    return Tokens(_divided(img), _divided(txt), vec, _rope(cfg, x.shape, context), valid)


def block_input(cfg: TransformerConfig, params: Params, tokens: Tokens) -> jax.Array:
    """What the first double block projects of the image: its modulated norm (B, L_img, D)."""
    modulation = scan.get_layer(params["double"], 0, parts=["img_mod"])
    return _block_input(cfg, modulation, tokens.img, tokens.vec)


@functools.partial(jax.jit, static_argnames="cfg")
def _block_input(
    cfg: TransformerConfig, modulation: Params, img: jax.Array, vec: jax.Array
) -> jax.Array:
    modulation = cast_params(modulation, img.dtype)
    with lora_layers.lora_interceptor():
        return BlockInput(cfg).apply({"params": modulation}, img, vec)


def first_block(cfg: TransformerConfig, params: Params, tokens: Tokens) -> Tokens:
    """The tokens after the first double block."""
    img, txt, *inputs = tokens
    img, txt = scan.run(DoubleBlock(cfg), params["double"], (img, txt), *inputs, layers=slice(0, 1))
    return tokens._replace(img=img, txt=txt)


def run_blocks(
    cfg: TransformerConfig, params: Params, tokens: Tokens, first: int = 0, remat: str = "none"
) -> jax.Array:
    """Image tokens (B, L_img, D) after all double and single blocks.

    `first` double blocks are left out: the tokens have been through them.
    """
    img, txt, *inputs = tokens
    layers = slice(first, None) if first else slice(None)
    run = functools.partial(scan.run, remat=remat)
    img, txt = run(DoubleBlock(cfg), params["double"], (img, txt), *inputs, layers=layers)
    both = run(SingleBlock(cfg), params["single"], _joined(img, txt), *inputs)
    return both[:, : img.shape[1]]


@jax.jit
def _joined(img: jax.Array, txt: jax.Array) -> jax.Array:
    return _divided(jnp.concatenate([img, txt], axis=1))


def head(
    cfg: TransformerConfig,
    params: Params,
    img: jax.Array,
    vec: jax.Array,
    shape: tuple[int, ...],
) -> jax.Array:
    """Velocity (B, T, H, W, C) of the target, whose tokens are the last of `img`; float32."""
    return _head(cfg, shape, params["head"], img, vec)


@functools.partial(jax.jit, static_argnames=("cfg", "shape"))
def _head(
    cfg: TransformerConfig,
    shape: tuple[int, ...],
    params: Params,
    img: jax.Array,
    vec: jax.Array,
) -> jax.Array:
    _, t, h, w, _ = shape
    tokens = img[:, -t * (h // 2) * (w // 2) :]
    with lora_layers.lora_interceptor():
        out = Head(cfg).apply({"params": params}, tokens, vec)
    return rearrange(
        out, "b (t h w) (c ph pw) -> b t (h ph) (w pw) c", t=t, h=h // 2, w=w // 2, ph=2, pw=2
    )


class Program(NamedTuple):
    """What a step runs as a whole where blocks are streamed: how often, with which weights, and how
    it is lowered."""

    name: str
    runs: int
    weights: Params
    lower: Callable[[], jax.stages.Lowered]


def programs(
    cfg: TransformerConfig,
    params: Params,
    x: jax.ShapeDtypeStruct,
    sigma: jax.ShapeDtypeStruct,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any,
) -> list[Program]:
    """The programs of `velocity` where blocks are streamed, those of the blocks first, for shapes
    that say where they lie on the mesh in use (`jax.set_mesh`); layers of `params` are stacked."""
    mesh = jax.sharding.get_mesh()

    def placed(x: jax.ShapeDtypeStruct, *axes: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, fitting(axes or (None,) * len(x.shape), x.shape, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def layer(part: str) -> Params:
        def first(p: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            where = NamedSharding(mesh, PartitionSpec(*p.sharding.spec[1:]))
            return jax.ShapeDtypeStruct(p.shape[1:], p.dtype, sharding=where)

        return jax.tree.map(first, params[part])

    small = {name: params[name] for name in ("embed", "refiner")}
    embedded = small, x, sigma, context, conditions
    img, txt, *inputs = jax.eval_shape(functools.partial(_embed, cfg, dtype), *embedded)
    both = jax.eval_shape(_joined, img, txt)

    # What a program gives is divided as far as that goes evenly.
    def divided(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return placed(x, BATCH, dividing(TOKENS, x.shape[1], mesh.shape), None)

    img, txt, both = map(divided, (img, txt, both))
    inputs = jax.tree.map(placed, inputs)
    double, single = layer("double"), layer("single")
    return [
        Program(
            "double block", cfg.double_layers, double,
            functools.partial(offload.lower_layer, DoubleBlock(cfg), double, (img, txt), *inputs),
        ),
        Program(
            "single block", cfg.single_layers, single,
            functools.partial(offload.lower_layer, SingleBlock(cfg), single, both, *inputs),
        ),
        Program("embedding", 1, small, functools.partial(_embed.lower, cfg, dtype, *embedded)),
        Program(
            "head", 1, params["head"],
            functools.partial(_head.lower, cfg, x.shape, params["head"], img, inputs[0]),
        ),
    ]  # fmt: skip


def context_kernels(schedule: Schedule) -> tuple[str, ...]:
    """Kernels of a schedule that need patch embeddings of their own, smallest first."""
    kernels = {POOLED_KERNELS.get(s.kernel, s.kernel) for s in schedule.segments}
    return tuple(sorted(kernels, key=lambda kernel: math.prod(kernel_shape(kernel))))


def check_kernels(cfg: TransformerConfig, kernels: Iterable[str]) -> None:
    """Raise ValueError where the network has no embedding for a context kernel."""
    for kernel in kernels:
        if POOLED_KERNELS.get(kernel, kernel) not in cfg.context_kernels:
            there = ", ".join(cfg.context_kernels) or "no kernel"
            raise ValueError(
                f"the schedule uses patch kernel {kernel}, but the network embeds context with"
                f" {there}; choose another schedule or convert a base model with --from-base"
            )


def check_mesh(cfg: TransformerConfig, mesh: Mesh | AbstractMesh | Mapping[str, int]) -> None:
    """Raise ValueError where the mesh, or sizes of its axes, does not divide the attention heads:
    `tensor` must divide them, and `context` what then is left."""
    sizes = mesh if isinstance(mesh, Mapping) else mesh.shape
    wanted = {name: sizes.get(name, 1) for name in ("tensor", "context")}
    heads = cfg.heads
    for name, size in wanted.items():
        if heads % size:
            fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"a mesh with tensor={wanted['tensor']} and context={wanted['context']} does not"
                f" divide the {cfg.heads} attention heads; {name} must be one of {fits}: put the"
                " other devices on fsdp or data"
            )
        heads //= size


def _check(
    cfg: TransformerConfig, x: jax.Array, context: PackedContext, conditions: Conditions
) -> None:
    for name, needed in (("guidance", cfg.guidance), ("image", cfg.image_dim is not None)):
        if needed and getattr(conditions, name) is None:
            raise ValueError(f"conditions have no {name}, which this network was made to read")
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"latents of {x.shape[2]} x {x.shape[3]} cells: both must be even")
    check_kernels(cfg, context.kernels)


def _rope(cfg: TransformerConfig, shape: tuple[int, ...], context: PackedContext) -> Table:
    rows, columns = shape[2] // 2, shape[3] // 2
    tables = []
    for indices, kernel in zip(context.indices, context.kernels, strict=True):
        kt, kh, kw = kernel_shape(kernel)
        pool = (kt, kh // 2, kw // 2)
        tables.append(rope_table(indices, rows, columns, cfg.rope_axes, cfg.rope_theta, pool))
    target = context.target_indices
    tables.append(rope_table(target, rows, columns, cfg.rope_axes, cfg.rope_theta))
    cos, sin = (jnp.concatenate(parts, axis=1) for parts in zip(*tables, strict=True))
    return cos, sin


def init(cfg: TransformerConfig, key: jax.Array) -> Params:
    """Random parameters, layers stacked."""
    keys = dict(zip(("embed", "head", *STACKS), jax.random.split(key, 5), strict=True))
    kernels = cfg.context_kernels
    x = jnp.zeros((1, 1, 2, 2, cfg.in_channels))
    index = jnp.zeros((1, 1), jnp.int32)
    context = PackedContext((x,) * len(kernels), (index,) * len(kernels), index, kernels)
    image = None if cfg.image_dim is None else jnp.zeros((1, 1, cfg.image_dim))
    text, pooled = jnp.zeros((1, 2, cfg.text_dim)), jnp.zeros((1, cfg.pooled_dim))
    one, valid = jnp.ones(1), jnp.ones((1, 2), bool)
    conditions = Conditions(text, valid, pooled, image, one)
    tokens, vec = jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, cfg.width))
    rope = rope_table(index, 1, 1, cfg.rope_axes, cfg.rope_theta)

    def layers(name: str, block: nn.Module, *args: Any) -> Params:
        return scan.init(block, keys[name], getattr(cfg, STACKS[name]), *args)

    return {
        "embed": Embed(cfg).init(keys["embed"], x, one, context, conditions, one)["params"],
        "refiner": layers("refiner", RefinerBlock(cfg), tokens, vec, valid[:, :1]),
        "double": layers("double", DoubleBlock(cfg), (tokens, tokens), vec, rope, valid),
        "single": layers("single", SingleBlock(cfg), tokens, vec, rope, valid[:, :1]),
        "head": Head(cfg).init(keys["head"], tokens, vec)["params"],
    }


class Embed(nn.Module):
    """Everything before the refiner and the blocks."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x, sigma, context, conditions, guidance):
        cfg = self.cfg
        embedders = {k: ContextEmbed(cfg, name=f"context_{k}") for k in cfg.context_kernels}
        groups = [
            embedders[POOLED_KERNELS.get(kernel, kernel)](latents, kernel)
            for latents, kernel in zip(context.latents, context.kernels, strict=True)
        ]
        target = nn.Dense(cfg.width, name="patch")(_patches(x, PATCH))
        img = jnp.concatenate([*groups, target], axis=1)

        time = sinusoid(1000 * sigma).astype(x.dtype)
        vec = self.mlp("time", time, cfg.width)
        if cfg.guidance:
            scale = sinusoid(1000 * guidance).astype(x.dtype)
            vec += self.mlp("guidance", scale, cfg.width)
        vec += self.mlp("pooled", conditions.pooled, cfg.width)

        mean = _masked_mean(conditions.text, conditions.text_valid)
        text_vec = self.mlp("text_time", time, cfg.width)
        text_vec += self.mlp("text_pooled", mean, cfg.width)
        text = nn.Dense(cfg.width, name="text_proj")(conditions.text)

        image = jnp.zeros((x.shape[0], 0, cfg.width), x.dtype)
        if cfg.image_dim is not None:
            image = nn.silu(nn.Dense(3 * cfg.width, name="image_up")(conditions.image))
            image = nn.Dense(cfg.width, name="image_down")(image)
        return img, image, text, vec, text_vec

    def mlp(self, name: str, x: jax.Array, width: int) -> jax.Array:
        hidden = nn.silu(nn.Dense(width, name=f"{name}_in")(x))
        return nn.Dense(width, name=f"{name}_out")(hidden)


class ContextEmbed(nn.Module):
    """Patch embedding of context latents (B, F, H, W, C) under one kernel, ragged edges padded."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, latents: jax.Array, kernel: str) -> jax.Array:
        if kernel in POOLED_KERNELS:
            latents = reduce(
                _pad(latents, (2, 2, 2)),
                "b (t pt) (h ph) (w pw) c -> b t h w c", "mean", pt=2, ph=2, pw=2,
            )  # fmt: skip
            kernel = POOLED_KERNELS[kernel]
        width, size = self.cfg.width, math.prod(kernel_shape(kernel)) * self.cfg.in_channels
        weights = self.param("kernel", nn.initializers.lecun_normal(), (size, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        return _patches(latents, kernel) @ weights + bias[None, None, :]


class RefinerBlock(nn.Module):
    """Text-only transformer block whose branches are gated by time and mean text."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, vec: jax.Array, valid: jax.Array) -> jax.Array:
        cfg = self.cfg
        gate_attention, gate_mlp = _modulation(cfg, vec, 2, "gate")
        normed = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm1")(x)
        q, k, v = _qkv(cfg, normed, "qkv")
        attention = _merge_heads(attend(q, k, v, valid))
        x = _gated(x, gate_attention, nn.Dense(cfg.width, name="out")(attention))
        normed = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm2")(x)
        hidden = nn.silu(nn.Dense(4 * cfg.width, name="mlp_in")(normed))
        return _gated(x, gate_mlp, nn.Dense(cfg.width, name="mlp_out")(_columns(hidden)))


class DoubleBlock(nn.Module):
    """Image and text with weights of their own, joined in one attention."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, streams, vec: jax.Array, rope: Table, valid: jax.Array):
        cfg = self.cfg
        img, txt = streams
        parts = {name: _modulation(cfg, vec, 6, f"{name}_mod") for name in ("img", "txt")}

        def project(name: str, x: jax.Array) -> list[jax.Array]:
            shift, scale = parts[name][:2]
            q, k, v = _qkv(cfg, _modulate(x, shift, scale), f"{name}_qkv")
            return [_head_norm(q, f"{name}_q_norm"), _head_norm(k, f"{name}_k_norm"), v]

        def finish(name: str, x: jax.Array, attention: jax.Array) -> jax.Array:
            _, _, gate_attention, shift, scale, gate_mlp = parts[name]
            attention = _merge_heads(attention)
            x = _gated(x, gate_attention, nn.Dense(cfg.width, name=f"{name}_out")(attention))
            hidden = _mlp_in(cfg, _modulate(x, shift, scale), f"{name}_mlp_in")
            return _gated(x, gate_mlp, nn.Dense(cfg.width, name=f"{name}_mlp_out")(hidden))

        both = zip(project("img", img), project("txt", txt), strict=True)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in both)
        attention = attend(apply_rope(q, rope), apply_rope(k, rope), v, valid)
        length = img.shape[1]
        return finish("img", img, attention[:, :length]), finish("txt", txt, attention[:, length:])


class BlockInput(nn.Module):
    """The image half of how a double block begins, with the parameters of that block."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, img: jax.Array, vec: jax.Array) -> jax.Array:
        shift, scale = _modulation(self.cfg, vec, 6, "img_mod")[:2]
        return _modulate(img, shift, scale)


class SingleBlock(nn.Module):
    """One stream; attention and feed-forward side by side from one norm."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, vec: jax.Array, rope: Table, valid: jax.Array) -> jax.Array:
        cfg = self.cfg
        shift, scale, gate = _modulation(cfg, vec, 3, "mod")
        normed = _modulate(x, shift, scale)
        q, k, v = _qkv(cfg, normed, "qkv")
        q, k = _head_norm(q, "q_norm"), _head_norm(k, "k_norm")
        attention = _merge_heads(attend(apply_rope(q, rope), apply_rope(k, rope), v, valid))
        hidden = _mlp_in(cfg, normed, "mlp_in")
        out = nn.Dense(cfg.width, use_bias=False, name="attn_out")(attention)
        return _gated(x, gate, out + nn.Dense(cfg.width, name="mlp_out")(hidden))


class Head(nn.Module):
    """Final modulated norm and projection to patches, in float32 at full matmul precision."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        vec = nn.silu(vec.astype(jnp.float32))
        mod = nn.Dense(2 * self.cfg.width, precision=highest, name="mod")(vec)
        scale, shift = jnp.split(constrain(mod, BATCH, None)[:, None, :], 2, axis=-1)
        x = _modulate(x.astype(jnp.float32), shift, scale)
        return nn.Dense(4 * self.cfg.out_channels, precision=highest, name="out")(x)


def sinusoid(t: jax.Array, width: int = 256) -> jax.Array:
    """(B,) -> (B, width) float32: cosines then sines, periods from 2 pi to 2 pi * 10^4."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(width // 2) / (width // 2))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _patches(x: jax.Array, kernel: str) -> jax.Array:
    """(B, T, H, W, C) -> (B, tokens, kt * kh * kw * C), padded to the kernel by replication."""
    kt, kh, kw = kernel_shape(kernel)
    return rearrange(
        _pad(x, (kt, kh, kw)),
        "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=kt, ph=kh, pw=kw,
    )  # fmt: skip


def _pad(x: jax.Array, multiple: tuple[int, int, int]) -> jax.Array:
    ragged = [(0, -n % k) for n, k in zip(x.shape[1:4], multiple, strict=True)]
    return jnp.pad(x, [(0, 0), *ragged, (0, 0)], mode="edge")


def _masked_mean(text: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens, summed in float32: (B, L, D), (B, L) -> (B, D)."""
    weights = valid.astype(jnp.float32)[:, :, None]
    total = jnp.sum(text.astype(jnp.float32) * weights, axis=1)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1)).astype(text.dtype)


def _qkv(cfg: TransformerConfig, x: jax.Array, name: str) -> list[jax.Array]:
    """Fused projection -> q, k, v, each (B, L, N, head_dim)."""
    fused = nn.DenseGeneral((3, cfg.heads, cfg.head_dim), name=name)(x)
    # Projected where the tokens lie, then exchanged, all three at once: a device has all tokens of
    # its heads, so that streams are joined without any other exchange.
    fused = to_heads(constrain(fused, BATCH, TOKENS, None, "tensor", None))
    return [fused[:, :, i] for i in range(3)]


def _merge_heads(attention: jax.Array) -> jax.Array:
    """(B, L, N, head_dim) -> (B, L, D); the exchange of `_qkv` back."""
    attention = to_tokens(attention)
    return _columns(rearrange(attention, "b l n d -> b l (n d)"))


def _mlp_in(cfg: TransformerConfig, x: jax.Array, name: str) -> jax.Array:
    hidden = nn.Dense(int(cfg.mlp_ratio * cfg.width), name=name)(x)
    return _columns(nn.gelu(hidden, approximate=True))


def _divided(x: jax.Array) -> jax.Array:
    """A stream (B, L, D), batch and tokens divided over the mesh."""
    return constrain(x, BATCH, TOKENS, None)


def _columns(x: jax.Array) -> jax.Array:
    """What lies between the two halves of a pair of projections (B, L, columns), divided like a
    stream and by columns."""
    return constrain(x, BATCH, TOKENS, "tensor")


def _head_norm(x: jax.Array, name: str) -> jax.Array:
    """RMS norm of each head's vector."""
    return nn.RMSNorm(1e-6, name=name)(x)


def _modulation(cfg: TransformerConfig, vec: jax.Array, parts: int, name: str) -> list[jax.Array]:
    """`parts` vectors (B, 1, D) in float32: shift, scale, gate, ..."""
    # Whole before it is split: the parts do not end where those of the devices do.
    out = constrain(nn.Dense(parts * cfg.width, name=name)(nn.silu(vec)), BATCH, None)
    return jnp.split(out.astype(jnp.float32)[:, None, :], parts, axis=-1)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """norm(x) (1 + scale) + shift, in float32, as x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6) * (1 + scale) + shift).astype(x.dtype)


def _gated(x: jax.Array, gate: jax.Array, branch: jax.Array) -> jax.Array:
    """x + gate * branch, in float32, as x's dtype."""
    return _divided((x.astype(jnp.float32) + gate * branch.astype(jnp.float32)).astype(x.dtype))
