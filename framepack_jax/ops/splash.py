"""Attention by JAX's Pallas kernel "splash", for TPUs, forward and backward.

The kernel takes one sequence, heads first, in whole tiles, and does not scale; padding, scaling,
masks (as segment ids) and the batch are seen to here.

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as kernel

# The kernel's tiles are counted in vector lanes.
LANES = 128
# Longest tiles (queries, keys) by device kind, for heads of 128: what the compiler fits into vector
# memory, forward and backward. They change speed and memory, not results; none has been timed.
TILES = {"TPU v4": (512, 512), "TPU v6 lite": (2048, 1024), "TPU7x": (2048, 1024)}
TILE = (1024, 1024)
# Wider heads have not been compiled.
WIDEST_HEAD = 512
# The name of what the kernel leaves for its backward pass (`jax.ad_checkpoint.checkpoint_name`).
RESULT = "attention_result"


def refusal(q: jax.Array, k: jax.Array) -> str | None:
    """Why splash cannot attend from q (B, L, N, D) to k (B, S, M, D); None where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {q.dtype}"
    if q.dtype != k.dtype:
        return f"queries are {q.dtype}, keys {k.dtype}"
    if q.shape[-1] > WIDEST_HEAD:
        return f"head width {q.shape[-1]} is more than {WIDEST_HEAD}"
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
    """The contract of `ops.attention.attend`, for what `refusal` lets pass.

    The scale goes into q, which in bfloat16 costs one rounding more than scaling the scores would.
    `interpret` runs the kernel as plain JAX on any platform, slowly.
    """
    length, keys, width = q.shape[1], k.shape[1], q.shape[3]
    tiles = _tiles(length, keys, width)
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    q, k, v = (_pad(x, t) for x, t in ((q, tiles[0]), (k, tiles[1]), (v, tiles[1])))
    run = _kernel(q.shape[1:3], k.shape[2], *tiles, causal, interpret)
    segments = None
    if valid is not None or k.shape[2] > keys:
        reads = jnp.ones((q.shape[0], keys), bool) if valid is None else valid
        reads = jnp.pad(reads, ((0, 0), (0, k.shape[2] - keys))).astype(jnp.int32)
        # Padded queries read the same keys as all others, so that their rows stay finite.
        segments = kernel.SegmentIds(q=jnp.ones(q.shape[::2], jnp.int32), kv=reads)
    out = jax.vmap(run)(q, k, v, segments)
    return rearrange(out, "b n l d -> b l n d")[:, :length, :, :width]


def tile(length: int, most: int) -> int:
    """The tile, at most `most` long, that pads `length` least; the longest of equals.

    Both are in tokens; `most` is a multiple of the lanes. Tiles shorter than half of `most` are
    chosen for short sequences only.
    """
    if length <= most:
        return -(-length // LANES) * LANES
    choices = range(most, most // 2 - 1, -LANES)
    return min(choices, key=lambda size: -(-length // size) * size)


def _tiles(length: int, keys: int, width: int) -> tuple[int, int]:
    """Tiles of queries and of keys for the chip in use; a wider head shortens them alike."""
    wider = -(-width // LANES)
    most_queries, most_keys = (n // (wider * LANES) * LANES for n in TILES.get(_chip(), TILE))
    return tile(length, most_queries), tile(keys, most_keys)


def _chip() -> str:
    """The device kind of the mesh in use, or of this process's devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def _pad(x: jax.Array, size: int) -> jax.Array:
    """x (B, L, N, D) as (B, N, L', D'), zeros filling the last tile and the last lanes."""
    after = -x.shape[1] % size, -x.shape[3] % LANES
    return rearrange(
        jnp.pad(x, ((0, 0), (0, after[0]), (0, 0), (0, after[1]))), "b l n d -> b n l d"
    )


def _kernel(
    queries: tuple[int, int], keys: int, tile_q: int, tile_k: int, causal: bool, interpret: bool
) -> kernel.splash_attention_kernel.SplashAttentionKernel:
    """The kernel for `queries` (heads, length), both lengths in whole tiles."""
    heads, length = queries
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
