"""Wan's diffusion transformer, with or without packed context beside the noisy section.

Source: Wan 2.1 (arXiv 2503.20314) and Helios (arXiv 2603.04379), which reads FramePack's context
(arXiv 2504.12626, section 3.2): [coarse context .. fine context][target].

Shapes: B batch, T latent frames, H W latent rows and columns, C channels, L tokens, D width.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from framepack_jax.models import lora_layers, scan
from framepack_jax.models.packed_video import (
    EmbedVideo,
    cast_embedders,
    causal_frames,
    check_kernels,
    check_size,
    rope_tables,
    target_length,
)
from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.transformer_parts import divide_stream, sinusoid
from framepack_jax.models.wan.blocks import Block, Head, Streams
from framepack_jax.models.wan.config import STACKS, WanConfig
from framepack_jax.ops.causal_frames import TargetFrames
from framepack_jax.ops.rope import Table, rope_table
from framepack_jax.packing import PackedContext


@struct.dataclass
class Conditions:
    """Conditions of a video: prompt states `text` (B, L, text_dim), all of which are read."""

    text: jax.Array


def conditions_of_text(
    text: jax.Array,
    valid: jax.Array | None = None,
    pooled: jax.Array | None = None,
    image: jax.Array | None = None,
    guidance: jax.Array | None = None,
) -> Conditions:
    """Return the conditions of encoded prompts; this network reads no other state."""
    return Conditions(text)


class Tokens(NamedTuple):
    """Input of the blocks: target tokens `img` (B, L, D), context tokens (B, L_context, D) or None,
    prompt (B, L_text, D), time vector `vec` (B, D), modulation (B, 6, D) of each stream, and RoPE
    tables of all tokens. The first `masked` (B,) tokens of context, if any, are not read.
    `frames` is the place of the target, if no token reads a later frame of it."""

    img: jax.Array
    context: jax.Array | None
    text: jax.Array
    vec: jax.Array
    modulation: Streams
    rope: Table
    masked: jax.Array | np.ndarray | None = None
    frames: TargetFrames | None = None


class EmbedText(nn.Module):
    """Embed the prompt (B, L, text_dim): (B, L, D)."""

    cfg: WanConfig

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        hidden = nn.Dense(self.cfg.width, name="text_in")(text)
        return nn.Dense(self.cfg.width, name="text_out")(nn.gelu(hidden, approximate=True))


class EmbedTime(nn.Module):
    """Embed noise levels (B,): the time vector (B, D) and the modulation (B, 6, D), float32."""

    cfg: WanConfig

    @nn.compact
    def __call__(self, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        width = self.cfg.width
        hidden = nn.Dense(width, name="time_in")(sinusoid(1000 * sigma, self.cfg.time_dim))
        vec = nn.Dense(width, name="time_out")(nn.silu(hidden))
        modulation = nn.Dense(6 * width, name="time_mod")(nn.silu(vec))
        return vec, rearrange(modulation, "b (six d) -> b six d", six=6)


def velocity(
    cfg: WanConfig,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """Predict the velocity, float32, of a noisy section x (B, T, H, W, C) at noise levels (B,).

    Blocks compute in `dtype`; `remat`, one of `scan.REMAT`, says what their gradient keeps. If
    blocks are offloaded, call it outside of `jax.jit`. Raises ValueError if H or W is odd, or if
    the network has no embedding for a kernel of the context.
    """
    tokens = embed(cfg, params, x, sigma, context, conditions, dtype)
    img = run_blocks(cfg, params, tokens, remat=remat)
    return head(cfg, params, img, tokens.vec, x.shape)


def embed(
    cfg: WanConfig,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any = jnp.float32,
) -> Tokens:
    """Patchify target and context, embed prompt and time."""
    check_size(x.shape)
    check_kernels(cfg, context.kernels)
    return jit_embed(cfg, dtype, {"embed": params["embed"]}, x, sigma, context, conditions)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def jit_embed(
    cfg: WanConfig,
    dtype: Any,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
) -> Tokens:
    """Compute `embed` from the parameters "embed" as one program."""
    inputs = cast_params({"x": x, "context": context, "text": conditions.text}, dtype)
    embedders = cast_embedders(params["embed"], dtype)
    embed = functools.partial(lora_layers.apply, weights=dtype)
    tokens = embed(EmbedVideo(cfg), embedders, inputs["x"], inputs["context"])
    text = embed(EmbedText(cfg), embedders, inputs["text"])
    vec, of_target = lora_layers.apply(EmbedTime(cfg), params["embed"], sigma)
    of_context = of_target
    if cfg.clean_context:
        _, of_context = lora_layers.apply(EmbedTime(cfg), params["embed"], jnp.zeros_like(sigma))
    length = tokens.shape[1] - target_length(x.shape)
    return Tokens(
        img=divide_stream(tokens[:, length:]),
        context=divide_stream(tokens[:, :length]) if length else None,
        text=text,
        vec=vec,
        modulation=Streams(of_context if length else None, of_target),
        rope=rope_tables(cfg, x.shape, context),
        masked=context.masked,
        frames=causal_frames(cfg, x.shape, tokens.shape[1]),
    )


def run_blocks(
    cfg: WanConfig, params: Params, tokens: Tokens, first: int = 0, remat: str = "none"
) -> jax.Array:
    """Return the target's tokens (B, L, D) after the blocks from `first` on."""
    layers = slice(first, None) if first else slice(None)
    return _run(cfg, params, tokens, layers, remat).target


def first_block(cfg: WanConfig, params: Params, tokens: Tokens) -> Tokens:
    """Return the tokens after the first block."""
    streams = _run(cfg, params, tokens, slice(0, 1))
    return tokens._replace(img=streams.target, context=streams.context)


def _run(
    cfg: WanConfig, params: Params, tokens: Tokens, layers: slice, remat: str = "none"
) -> Streams:
    streams = Streams(tokens.context, tokens.img)
    inputs = tokens.text, tokens.modulation, tokens.rope, tokens.masked, tokens.frames
    return scan.run(Block(cfg), params["blocks"], streams, *inputs, layers=layers, remat=remat)


def head(
    cfg: WanConfig, params: Params, img: jax.Array, vec: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Return the velocity (B, T, H, W, C), float32, of the target from its tokens."""
    return jit_head(cfg, shape, params["head"], img, vec)


@functools.partial(jax.jit, static_argnames=("cfg", "shape"))
def jit_head(
    cfg: WanConfig, shape: tuple[int, ...], params: Params, img: jax.Array, vec: jax.Array
) -> jax.Array:
    """Compute `head` from the parameters "head" as one program."""
    _, t, h, w, _ = shape
    out = lora_layers.apply(Head(cfg), params, img, vec)
    return rearrange(
        out, "b (t h w) (ph pw c) -> b t (h ph) (w pw) c", t=t, h=h // 2, w=w // 2, ph=2, pw=2
    )


def encoders(cfg: WanConfig) -> tuple[str, ...]:
    """Return the roles of the encoders that the network reads."""
    return ("text_encoder",)


def init(cfg: WanConfig, key: jax.Array) -> Params:
    """Draw random parameters, layers stacked."""
    embed_key, block_key, head_key = jax.random.split(key, 3)
    kernels = cfg.context_kernels
    x = jnp.zeros((1, 1, 2, 2, cfg.in_channels))
    index = jnp.zeros((1, 1), jnp.int32)
    context = PackedContext((x,) * len(kernels), (index,) * len(kernels), index, kernels)
    text, sigma = jnp.zeros((1, 1, cfg.text_dim)), jnp.zeros(1)
    tokens, vec = jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, cfg.width))
    modulation = jnp.zeros((1, 6, cfg.width))
    rope = rope_table(index, 1, 1, cfg.rope_axes, cfg.rope_theta)
    streams = Streams(None, tokens)
    modules: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (EmbedVideo(cfg), (x, context)),
        (EmbedText(cfg), (text,)),
        (EmbedTime(cfg), (sigma,)),
    ]
    embed: Params = {}
    for module, inputs in modules:
        embed |= module.init(embed_key, *inputs)["params"]
    return {
        "embed": embed,
        "blocks": scan.init(
            Block(cfg), block_key, getattr(cfg, STACKS["blocks"]),
            streams, tokens, Streams(None, modulation), rope,
        ),
        "head": Head(cfg).init(head_key, tokens, vec)["params"],
    }  # fmt: skip
