"""The only attention entry of the project.

Scores and softmax are float32 whatever the inputs are. Queries are taken in chunks, so that the
full (queries, keys) matrix never exists.

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

QUERY_CHUNK = 256


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None = None,
    *,
    causal: bool = False,
    query_chunk: int = QUERY_CHUNK,
) -> jax.Array:
    """Softmax attention, softmax(q k^T / sqrt(D)) v.

    q is (B, L, N, D); k and v are (B, S, M, D) where M divides N (grouped queries); `valid` (B, S)
    is True where a key may be read, and its True entries are a prefix; `causal` lets query i read
    keys 0 .. i only (then L == S). Returns (B, L, N, D) in q's dtype. Rows of padded queries
    are finite and meaningless.

    Raises ValueError where the heads do not divide or a causal call has L != S.
    """
    length, heads = q.shape[1:3]
    keys, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are no multiple of {kv_heads} key heads")
    if causal and length != keys:
        raise ValueError(f"attention: causal needs as many queries as keys, got {length}, {keys}")
    k = repeat(k, "b s m d -> b s (m g) d", g=heads // kv_heads)
    v = repeat(v, "b s m d -> b s (m g) d", g=heads // kv_heads)

    def rows(chunk: jax.Array, first: jax.Array) -> jax.Array:
        scores = jnp.einsum("blnd,bsnd->bnls", chunk, k, preferred_element_type=jnp.float32)
        scores *= q.shape[-1] ** -0.5
        if valid is not None:
            scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
        if causal:
            row = first + jnp.arange(chunk.shape[1])[:, None]
            scores = jnp.where(jnp.arange(keys)[None, :] <= row, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bnls,bsnd->blnd", weights, v)

    if length <= query_chunk:
        return rows(q, jnp.int32(0))
    chunks = -(-length // query_chunk)
    padded = jnp.pad(q, ((0, 0), (0, chunks * query_chunk - length), (0, 0), (0, 0)))
    padded = rearrange(padded, "b (c l) n d -> c b l n d", c=chunks)
    first = jnp.arange(chunks) * query_chunk
    out = jax.lax.map(lambda x: jax.checkpoint(rows)(*x), (padded, first))
    return rearrange(out, "c b l n d -> b (c l) n d")[:, :length]
