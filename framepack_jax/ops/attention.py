"""The only attention entry of the project.

The kernel is chosen where the program is lowered, by the platform it is lowered for: cuDNN for
CUDA (`ops/cudnn.py`), splash for TPU (`ops/splash.py`), XLA in chunks elsewhere and for whatever
those two cannot take. Scores and softmax are float32 whatever the inputs are, and the full
(queries, keys) matrix never exists, forward or backward.

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.sharding import AxisType, PartitionSpec

from framepack_jax.ops import cudnn, splash
from framepack_jax.sharding import BATCH, TOKENS

QUERY_CHUNK = 256
# Below this many queries or keys the chunks are few and small: no kernel is tried, none is missed.
LEAST_LENGTH = 1024

Kernel = Literal["auto", "xla", "cudnn", "splash"]


class _Fused(NamedTuple):
    platform: str  # JAX's name of the platform it is lowered for
    backend: str  # JAX's name of the backend that runs it
    refusal: Callable[[jax.Array, jax.Array], str | None]
    attend: Callable[..., jax.Array]


_FUSED = {
    "cudnn": _Fused("cuda", "gpu", cudnn.refusal, cudnn.attend),
    "splash": _Fused("tpu", "tpu", splash.refusal, splash.attend),
}
# Part of the key of every jit cache, so that no program traced with another kernel is used.
_wanted = jax.make_user_context("auto")


@contextlib.contextmanager
def use(kernel: Kernel) -> Iterator[None]:
    """Within this context, and thread, attention runs on `kernel`.

    "auto" is the choice by platform described above. "xla" is the chunks, everywhere. "cudnn" and
    "splash" are that kernel for every length it can take; a program lowered for a platform that
    has no such kernel is then an error of JAX's. Only "xla" has forward-mode derivatives. Raises
    ValueError for other names.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"attention kernel {kernel!r}: expected one of {get_args(Kernel)}")
    with _wanted(kernel):
        yield


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
    is True where a key may be read, and its True entries are a prefix of at least one; `causal`
    lets query i read keys 0 .. i only (then L == S). Returns (B, L, N, D) in q's dtype. Rows of
    padded queries are finite and meaningless. `query_chunk` is the chunk of the XLA path.

    Raises ValueError where the heads do not divide or a causal call has L != S. Warns, once a
    shape, where the kernel asked for, or the kernel of this machine, cannot take it.
    """
    length, heads = q.shape[1:3]
    keys, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are no multiple of {kv_heads} key heads")
    if causal and length != keys:
        raise ValueError(f"attention: causal needs as many queries as keys, got {length}, {keys}")
    chunked = functools.partial(_chunked, causal=causal, query_chunk=query_chunk)
    kernels = {
        fused.platform: functools.partial(_sharded, functools.partial(fused.attend, causal=causal))
        for fused in _usable(q, k, _wanted.value)
    }
    if not kernels:
        return chunked(q, k, v, valid)
    default = chunked if _wanted.value == "auto" else None
    return jax.lax.platform_dependent(q, k, v, valid, default=default, **kernels)


def _usable(q: jax.Array, k: jax.Array, wanted: Kernel) -> list[_Fused]:
    """The fused kernels to offer to the lowering; warns of one that is missed."""
    if wanted == "xla" or (wanted == "auto" and min(q.shape[1], k.shape[1]) < LEAST_LENGTH):
        return []
    usable = []
    for name, fused in _FUSED.items():
        if wanted not in ("auto", name):
            continue
        reason = fused.refusal(q, k)
        if reason is None:
            usable.append(fused)
        elif wanted == name or _machine() == fused.backend:
            _warn(name, q.shape, k.shape, reason)
    return usable


def _machine() -> str:
    """The backend of the mesh in use, or of this process. It decides who misses a kernel only."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@functools.cache
def _warn(kernel: str, queries: tuple[int, ...], keys: tuple[int, ...], reason: str) -> None:
    warnings.warn(
        f"attention: {kernel} cannot attend from {queries} to {keys}: {reason}. "
        "XLA in chunks, which is slower, does it instead.",
        stacklevel=4,  # who called attend
    )


def _sharded(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
) -> jax.Array:
    """`attend` on every device for its part of the batch and of the heads, with all tokens.

    The compiler cannot divide a fused kernel by itself. Where the mesh (`jax.set_mesh`) divides
    the tokens, it exchanges tokens for heads before and after (DeepSpeed-Ulysses, arXiv
    2309.14509). Mesh axes that divide neither batch nor key heads do the same work each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    sizes = {name: size for name, size, kind in axes if kind != AxisType.Manual}
    if math.prod(sizes.values()) == 1:
        return attend(q, k, v, valid)
    batch = _dividing(BATCH, q.shape[0], sizes)
    heads = _dividing(("tensor", *TOKENS), k.shape[2], {a: sizes[a] for a in sizes.keys() - batch})
    spec = PartitionSpec(batch or None, None, heads or None, None)
    return jax.shard_map(
        attend,
        in_specs=(spec, spec, spec, PartitionSpec(batch or None)),
        out_specs=spec,
        axis_names=set(sizes),
        check_vma=False,  # kernels do not say how their results vary over the mesh
    )(q, k, v, valid)


def _dividing(names: tuple[str, ...], length: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the mesh axes, taken in order, that together divide the length."""
    taken: tuple[str, ...] = ()
    for name in names:
        if name in sizes and length % math.prod(sizes[a] for a in (*taken, name)) == 0:
            taken = (*taken, name)
    return taken


def _chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    *,
    causal: bool,
    query_chunk: int,
) -> jax.Array:
    """`attend` by XLA, a chunk of queries at a time."""
    length, heads = q.shape[1:3]
    keys, kv_heads = k.shape[1:3]
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
    # Without the checkpoint the gradient would keep the weights of every chunk.
    out = jax.lax.map(lambda x: jax.checkpoint(rows)(*x), (padded, first))
    return rearrange(out, "c b l n d -> b (c l) n d")[:, :length]
