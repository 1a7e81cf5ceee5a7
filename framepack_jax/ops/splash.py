"""Attention for TPUs: by JAX's Pallas kernel "splash", forward and backward, and by `ops/flash.py`
where no gradient is taken.

JAX's kernel takes one sequence, heads first, in whole tiles, and does not scale. This module adds
padding, scaling, masks (as segment ids) and the batch.

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as kernel

from framepack_jax.ops import flash
from framepack_jax.ops.flash import LANES

# Longest tiles (queries, keys) by device kind, for heads of 128, that the compiler fits into vector
# memory, forward and backward. They change speed and memory, not results; not timed yet.
TILES = {"TPU v4": (512, 512), "TPU v6 lite": (2048, 1024), "TPU7x": (2048, 1024)}
TILE = (1024, 1024)
# Wider heads have not been compiled.
MAX_HEAD_WIDTH = 512
# Name of the kernel's residuals (`jax.ad_checkpoint.checkpoint_name`).
RESULT = "attention_result"


def refusal(q: jax.Array, k: jax.Array) -> str | None:
    """Return why splash cannot attend from q (B, L, N, D) to k (B, S, M, D); None if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {q.dtype}"
    if q.dtype != k.dtype:
        return f"queries are {q.dtype}, keys {k.dtype}"
    if q.shape[-1] > MAX_HEAD_WIDTH:
        return f"head width {q.shape[-1]} is more than {MAX_HEAD_WIDTH}"
    return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Attend as `ops.attention.attend`, for inputs without a `refusal`.

    The scale is multiplied into q; in bfloat16 that is one rounding more than scaling the scores.
    `interpret` runs the kernel as plain JAX on any platform, slowly.
    """
    length, keys, width = q.shape[1], k.shape[1], q.shape[3]
    tiles = _tiles(length, keys, width)
    q, k, v = (_pad(x, t) for x, t in ((q, tiles[0]), (k, tiles[1]), (v, tiles[1])))
    readable = jnp.full(q.shape[:1], keys) if valid is None else valid.sum(axis=1)
    all_read = valid is None and k.shape[2] == keys
    call = _Call(width**-0.5, tiles, causal, all_read, interpret)
    out = _attend(call, q, k, v, readable.astype(jnp.int32))
    return rearrange(out, "b n l d -> b l n d")[:, :length, :, :width]


class _Call(NamedTuple):
    """Static arguments of a kernel; `all_read` is true if every sample reads all keys."""

    scale: float
    tiles: tuple[int, int]
    causal: bool
    all_read: bool
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: _Call, q: jax.Array, k: jax.Array, v: jax.Array, readable: jax.Array
) -> jax.Array:
    """Attend from q (B, N, L, D) to the first `readable` (B,) of k and v (B, M, S, D)."""
    if call.causal:
        return _splash(call, readable, q, k, v)
    return flash.forward(
        q, k, v, readable, scale=call.scale, tiles=call.tiles, interpret=call.interpret
    )


def _attend_forward(
    call: _Call, q: jax.Array, k: jax.Array, v: jax.Array, readable: jax.Array
) -> tuple[jax.Array, Any]:
    return jax.vjp(functools.partial(_splash, call, readable), q, k, v)


def _attend_backward(call: _Call, pull: Any, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    return *pull(gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def _splash(
    call: _Call, readable: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    q = (q.astype(jnp.float32) * call.scale).astype(q.dtype)
    run = _kernel(q.shape[1], q.shape[2], k.shape[2], *call.tiles, call.causal, call.interpret)
    segments = None
    if not call.all_read:
        reads = jnp.arange(k.shape[2])[None, :] < readable[:, None]
        # Padded queries read the same keys as all others, so that their rows stay finite.
        queries = jnp.ones((q.shape[0], q.shape[2]), jnp.int32)
        segments = kernel.SegmentIds(q=queries, kv=reads.astype(jnp.int32))
    out: jax.Array = jax.vmap(run)(q, k, v, segments)  # type: ignore[assignment]  # no residuals
    return out


def tile(length: int, most: int) -> int:
    """Return the tile, at most `most` long, that pads `length` least; the longest of equals.

    Both are in tokens; `most` is a multiple of LANES. Only short sequences get tiles shorter than
    half of `most`.
    """
    if length <= most:
        return -(-length // LANES) * LANES
    choices = range(most, most // 2 - 1, -LANES)
    return min(choices, key=lambda size: -(-length // size) * size)


def _tiles(length: int, keys: int, width: int) -> tuple[int, int]:
    """Return tiles of queries and keys for the chip in use; a wider head shortens both."""
    wider = -(-width // LANES)
    most_queries, most_keys = (n // (wider * LANES) * LANES for n in TILES.get(_chip(), TILE))
    return tile(length, most_queries), tile(keys, most_keys)


def _chip() -> str:
    """Return the device kind of the mesh in use, or of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def _pad(x: jax.Array, size: int) -> jax.Array:
    """Arrange x (B, L, N, D) as (B, N, L', D'), the last tile and lanes filled with zeros."""
    after = -x.shape[1] % size, -x.shape[3] % LANES
    return rearrange(
        jnp.pad(x, ((0, 0), (0, after[0]), (0, 0), (0, after[1]))), "b l n d -> b n l d"
    )


def _kernel(
    heads: int, length: int, keys: int, tile_q: int, tile_k: int, causal: bool, interpret: bool
) -> kernel.splash_attention_kernel.SplashAttentionKernel:
    """Return the kernel for `length` queries and `keys` keys, both in whole tiles."""
    mask = kernel.CausalMask if causal else kernel.FullMask
    # dq and dkv in two passes: the fused one writes a dq for every tile of keys to memory.
    sizes = kernel.BlockSizes(
        block_q=tile_q, block_kv=tile_k,
        block_q_dkv=tile_q, block_kv_dkv=tile_k, block_kv_dkv_compute=tile_k,
        block_q_dq=tile_q, block_kv_dq=tile_k,
    )  # fmt: skip
    masks = kernel.MultiHeadMask([mask((length, keys))] * heads)
    return kernel.make_splash_mha_single_device(
        masks, block_sizes=sizes, interpret=interpret, residual_checkpoint_name=RESULT
    )
