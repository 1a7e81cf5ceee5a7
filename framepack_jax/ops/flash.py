"""Attention without a gradient, in Pallas, for TPUs.

The algorithm is that of JAX's kernel "splash" (FlashAttention, arXiv 2205.14135). Three differences
shorten the schedule of the compiler (docs/measurements/attention.md): exponentials have base 2, as
in hardware; only the last tile of readable keys is masked, and tiles behind it are skipped; weights
are rounded to the dtype of the values before their product.

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Keys whose scores are computed at once: longer chunks spill more registers.
CHUNK = 512
# Score of a key that is not read; finite, so that no difference of two is NaN.
UNREAD = -1e30

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_PRODUCT = (((1,), (0,)), ((), ()))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    *,
    scale: float,
    tiles: tuple[int, int],
    interpret: bool = False,
) -> jax.Array:
    """Return softmax(scale q k^T) v.

    Args:
        q: Queries (B, N, L, D), where `tiles[0]` divides L and LANES divides D.
        k: Keys (B, M, S, D), where `tiles[1]`, a multiple of LANES, divides S and M divides N.
        v: Values, as k.
        keys: (B,) int32, how many of the first keys each sample reads: at least one.
        scale: Factor of the scores, multiplied into q.
        tiles: Lengths of the tiles of queries and keys.
        interpret: Run the kernel as plain JAX on any platform, slowly.

    Returns:
        (B, N, L, D) in q's dtype.
    """
    batch, heads, length, width = q.shape
    group = heads // k.shape[1]
    tile_q, tile_k = tiles
    q = (q.astype(jnp.float32) * (scale * math.log2(math.e))).astype(q.dtype)

    def queries(b: int, h: int, i: int, j: int, keys: jax.Array) -> tuple[int, ...]:
        return b, h, i, 0

    def read(b: int, h: int, i: int, j: int, keys: jax.Array) -> tuple[int | jax.Array, ...]:
        # The last tile that is read stays: a tile of the same place is not copied again.
        # `div`, as `//` of numbers that may be negative needs the device to be known.
        last = jax.lax.div(keys[b] - 1, tile_k)
        return b, jax.lax.div(h, group), jnp.minimum(j, last), 0

    of_queries = pl.BlockSpec((None, None, tile_q, width), queries)
    row = pltpu.VMEM((tile_q, LANES), jnp.float32)
    of_keys = pl.BlockSpec((None, None, tile_k, width), read)
    out: jax.Array = pl.pallas_call(
        functools.partial(_kernel, tile_k=tile_k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // tile_q, k.shape[2] // tile_k),
            in_specs=[of_queries, of_keys, of_keys],
            out_specs=of_queries,
            scratch_shapes=[row, row, pltpu.VMEM((tile_q, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        name="flash_forward",
        interpret=interpret,
    )(keys.astype(jnp.int32), q, k, v)
    return out


def _kernel(
    keys: jax.Ref,
    q: jax.Ref,
    k: jax.Ref,
    v: jax.Ref,
    out: jax.Ref,
    highest: jax.Ref,
    total: jax.Ref,
    weighted: jax.Ref,
    *,
    tile_k: int,
) -> None:
    """Add one tile of keys to the running maximum, sum and weighted sum of a tile of queries.

    `highest` and `total` repeat one number in all lanes of a row.
    """
    tile = pl.program_id(3)
    left = keys[pl.program_id(0)] - tile * tile_k

    @pl.when(tile == 0)
    def _() -> None:
        highest[...] = jnp.full_like(highest, UNREAD)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def add(first: int, masked: bool) -> None:
        length = min(CHUNK, tile_k - first)
        part = pl.ds(first, length)
        scores = jax.lax.dot_general(
            q[...], k[part, :], _CONTRACT_LAST, preferred_element_type=jnp.float32
        )
        if masked:
            place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(place < left - first, scores, UNREAD)
        before = highest[...]
        highest[...] = jnp.maximum(before, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp2(scores - jnp.tile(highest[...], (1, length // LANES)))
        rescale = jnp.exp2(before - highest[...])
        total[...] = rescale * total[...] + weights.sum(axis=-1, keepdims=True)
        product = jax.lax.dot_general(
            weights.astype(v.dtype), v[part, :], _PRODUCT, preferred_element_type=jnp.float32
        )
        wide = jnp.tile(rescale, (1, weighted.shape[1] // LANES))
        weighted[...] = wide * weighted[...] + product

    @pl.when(left >= tile_k)
    def _() -> None:
        for first in range(0, tile_k, CHUNK):
            add(first, masked=False)

    @pl.when((left > 0) & (left < tile_k))
    def _() -> None:
        for first in range(0, tile_k, CHUNK):
            add(first, masked=True)

    @pl.when(tile == pl.num_programs(3) - 1)
    def _() -> None:
        wide = jnp.tile(total[...], (1, weighted.shape[1] // LANES))
        out[...] = (weighted[...] / wide).astype(out.dtype)
