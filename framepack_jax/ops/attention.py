"""Attention: the one entry point, for all networks.

The platform that a program is lowered for chooses the kernel: cuDNN for CUDA (`ops/cudnn.py`),
splash for TPU (`ops/splash.py`), XLA in chunks elsewhere and for all inputs that those two refuse.
A mesh divides all kernels by the same rule (`layout`). Scores and softmax are float32 for inputs of
any dtype, and the full (queries, keys) matrix never exists, forward or backward.

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from framepack_jax.ops import cudnn, splash
from framepack_jax.parallel.sharding import BATCH, TOKENS, constrain, dividing

QUERY_CHUNK = 256
# With fewer scores than those of so many queries and keys, no fused kernel is tried.
MIN_LENGTH = 1024

# A policy of `jax.checkpoint`: keep the residuals of every kernel, little more than its result, so
# that no kernel runs a second time.
KEEP_RESULTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(splash.RESULT), cudnn.is_kernel
)

# The token axes as dimensions, for einops.
_GRID = " ".join(TOKENS)

Kernel = Literal["auto", "xla", "cudnn", "splash"]


class _Fused(NamedTuple):
    platform: str  # JAX's name of the platform that it is lowered for
    backend: str  # JAX's name of the backend that runs it
    refusal: Callable[[jax.Array, jax.Array], str | None]
    attend: Callable[..., jax.Array]


_FUSED = {
    "cudnn": _Fused("cuda", "gpu", cudnn.refusal, cudnn.attend),
    "splash": _Fused("tpu", "tpu", splash.refusal, splash.attend),
}


class Layout(NamedTuple):
    """The mesh axes that divide each dimension of attention."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    queries: tuple[str, ...]

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Axes that divide heads here, and tokens elsewhere."""
        return tuple(name for name in TOKENS if name in self.heads)

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes that divide queries here, and tokens elsewhere."""
        return tuple(name for name in TOKENS if name in self.queries)


# Part of the key of every jit cache, so that no program traced with another kernel is used.
_wanted = jax.make_user_context("auto")


@contextlib.contextmanager
def use(kernel: Kernel) -> Iterator[None]:
    """Run attention on `kernel` within this context and thread.

    "auto" chooses by platform. "xla" computes in chunks everywhere. "cudnn" and "splash" are that
    kernel for every length that it takes; lowering a program for a platform without it is then an
    error of JAX's. Only "xla" has forward-mode derivatives. Raises ValueError for other names.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"attention kernel {kernel!r}: expected one of {get_args(Kernel)}")
    with _wanted(kernel):
        yield


@jax.named_scope("attention")
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None = None,
    masked: jax.Array | None = None,
    *,
    causal: bool = False,
    local: bool = False,
    query_chunk: int = QUERY_CHUNK,
) -> jax.Array:
    """Compute softmax attention, softmax(q k^T / sqrt(D)) v.

    On a mesh every device holds its part of batch and heads (`layout`) and all tokens, of the
    inputs and of the result. With `local` it holds its part of the queries and all keys, which are
    few: those of a prompt.

    Args:
        q: Queries (B, L, N, D).
        k: Keys (B, S, M, D), where M divides N (grouped queries).
        v: Values (B, S, M, D).
        valid: (B, S), True for keys that may be read: a prefix of at least one.
        masked: (B,), the number of first keys that are not read although they are valid.
        causal: Let query i read keys 0 .. i only; L must be S.
        local: Divide queries as the tokens of a stream, so that none are exchanged.
        query_chunk: Chunk of the XLA path.

    Returns:
        (B, L, N, D) in q's dtype. Rows of padded queries are finite and meaningless.

    Raises ValueError if the heads do not divide or a causal call has L != S. Warns, once a shape,
    if the requested kernel, or the kernel of this machine, refuses the inputs.
    """
    length, heads = q.shape[1:3]
    keys, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(
            f"attention: {heads} query heads are not a multiple of {kv_heads} key heads"
        )
    if causal and length != keys:
        raise ValueError(f"attention: causal needs as many queries as keys, got {length}, {keys}")
    run = functools.partial(_chunked, causal=causal, query_chunk=query_chunk)
    if usable := _usable(q, k, _wanted.value):
        run = functools.partial(
            jax.lax.platform_dependent,
            default=run if _wanted.value == "auto" else None,
            **{fused.platform: functools.partial(fused.attend, causal=causal) for fused in usable},
        )
    if masked is not None:
        if valid is None:
            valid = jnp.ones(k.shape[:2], bool)
        run = functools.partial(_without_first, run)
    return _sharded(run, q, k, v, valid, masked, causal=causal, local=local)


def _without_first(
    run: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    masked: jax.Array,
) -> jax.Array:
    """Attend to all valid keys but the first `masked` (B,): behind the others, they are beyond the
    prefix that kernels read."""
    keys = k.shape[1]
    places = (jnp.arange(keys)[None, :] + masked[:, None]) % keys
    k, v = (jnp.take_along_axis(x, places[:, :, None, None], axis=1) for x in (k, v))
    count = valid.sum(axis=1, keepdims=True) - masked[:, None]
    return run(q, k, v, jnp.arange(keys)[None, :] < count)


def _usable(q: jax.Array, k: jax.Array, wanted: Kernel) -> list[_Fused]:
    """Return the fused kernels that support the inputs; warn if a kernel refuses them."""
    few = q.shape[1] * k.shape[1] < MIN_LENGTH**2
    if wanted == "xla" or (wanted == "auto" and few):
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
    """Return the backend of the mesh in use, or of this process; only warnings depend on it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@functools.cache
def _warn(kernel: str, queries: tuple[int, ...], keys: tuple[int, ...], reason: str) -> None:
    warnings.warn(
        f"attention: {kernel} cannot attend from {queries} to {keys}: {reason}. "
        "XLA in chunks, which is slower, does it instead.",
        stacklevel=4,  # who called attend
    )


def layout(batch: int, kv_heads: int) -> Layout:
    """Divide attention over the mesh in use (`jax.set_mesh`), for a batch and its key heads.

    The batch goes to the axes `sharding.BATCH` that divide it. Key heads go to `tensor`, then to
    the token axes with the largest product that divides them. The remaining axes divide the
    queries; each part reads all keys of its heads. Only axes of more than one device are named;
    without a mesh there are none.
    """
    sizes = {name: size for name, size in _mesh_sizes().items() if size > 1}
    of_batch = dividing(BATCH, batch, sizes)
    tensor = dividing(("tensor",), kv_heads, sizes)
    tokens = [name for name in TOKENS if name in sizes and name not in of_batch]

    def parts(names: tuple[str, ...]) -> int:
        return math.prod(sizes[name] for name in names)

    choices = (
        (*tensor, *names)
        for count in range(len(tokens) + 1)
        for names in itertools.combinations(tokens, count)
    )
    heads = max((names for names in choices if kv_heads % parts(names) == 0), key=parts)
    left = (name for name in (*tokens, "tensor") if name in sizes and name not in heads)
    return Layout(of_batch, heads, tuple(left))


def to_heads(x: jax.Array) -> jax.Array:
    """Exchange some tokens of all heads for all tokens of some heads, the layout of `attend`.

    x is (B, L, ..., N, D) with tokens, and heads by `tensor`, divided over the mesh in use; the
    result has the same shape and values. Axes that divide heads do an all-to-all
    (DeepSpeed-Ulysses, arXiv 2309.14509); axes that divide queries gather tokens. L may be any
    length. Without a mesh it returns x.
    """
    of = layout(x.shape[0], x.shape[-2])

    def move(x: jax.Array) -> jax.Array:
        if of.exchanged:
            x = jax.lax.all_to_all(x, of.exchanged, x.ndim - 2, 1, tiled=True)
        # Tokens lie in the order of TOKENS, whichever of these axes are exchanged.
        x = rearrange(x, f"b ({_GRID} l) ... -> b {_GRID} l ...", **_grid(of.exchanged))
        for name in of.gathered:
            x = jax.lax.all_gather(x, name, axis=1 + TOKENS.index(name), tiled=True)
        return rearrange(x, f"b {_GRID} l ... -> b ({_GRID} l) ...")

    return _moved(move, x, of, 0)


def to_tokens(x: jax.Array) -> jax.Array:
    """Invert `to_heads`: exchange all tokens of some heads for some tokens of all heads."""
    of = layout(x.shape[0], x.shape[-2])

    def move(x: jax.Array) -> jax.Array:
        x = rearrange(
            x, f"b ({_GRID} l) ... -> b {_GRID} l ...", **_grid(of.exchanged + of.gathered)
        )
        for name in of.gathered:
            part = jax.lax.axis_index(name)
            x = jax.lax.dynamic_index_in_dim(x, part, 1 + TOKENS.index(name))
        x = rearrange(x, f"b {_GRID} l ... -> b ({_GRID} l) ...")
        if of.exchanged:
            x = jax.lax.all_to_all(x, of.exchanged, 1, x.ndim - 2, tiled=True)
        return x

    return _moved(move, x, of, 1)


def _moved(
    move: Callable[[jax.Array], jax.Array], x: jax.Array, of: Layout, source: int
) -> jax.Array:
    """Apply `move` to change the layout: from tokens (0) to heads (1), or back."""
    tokens = tuple(name for name in TOKENS if name in of.exchanged + of.gathered)
    if not tokens:
        return x
    between = (None,) * (x.ndim - 4)
    tensor = tuple(name for name in of.heads if name not in tokens)
    specs = (
        _spec(of.batch, tokens, *between, tensor, None),
        _spec(of.batch, None, *between, of.heads, None),
    )
    padded = _padded(x, math.prod(_grid(tokens).values()))
    return _on_parts(move, (specs[source],), specs[1 - source])(padded)[:, : x.shape[1]]


def _grid(names: tuple[str, ...]) -> dict[str, int]:
    """Return into how many parts these token axes divide a dimension, for einops."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return {name: sizes[name] if name in names else 1 for name in TOKENS}


def _sharded(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    masked: jax.Array | None = None,
    *,
    causal: bool,
    local: bool,
) -> jax.Array:
    """Run `attend` on every device for its part of batch, heads and queries (`layout`).

    The compiler cannot divide a fused kernel by itself; one rule for all kernels lets the test of
    one cover the others.
    """
    sizes = _mesh_sizes()
    if math.prod(sizes.values()) == 1:
        return attend(q, k, v, valid, *([] if masked is None else [masked]))
    batch, heads, queries = layout(q.shape[0], k.shape[2])
    if local:
        heads = dividing(("tensor",), k.shape[2], sizes)
        queries = tuple(name for name in TOKENS if name in sizes and name not in batch)
    if causal:
        # Kernels count a causal mask from the first query, so these axes repeat the work. Only
        # text encoders are causal, once a prompt.
        queries = ()
    whole = _spec(batch, None, heads, None)
    parts = math.prod(sizes[name] for name in queries)
    if queries and not local:
        # Otherwise the compiler divides the tokens of the operations before, which join streams.
        q = constrain(q, *whole)

    def run(q: jax.Array, *others: jax.Array) -> jax.Array:
        out = attend(q, *others)
        gathered = queries and not local
        return jax.lax.all_gather(out, queries, axis=1, tiled=True) if gathered else out

    divided = _spec(batch, queries, heads, None)
    specs = [divided, whole, whole, _spec(batch, None)]
    others = [k, v, valid]
    if masked is not None:
        specs, others = [*specs, _spec(batch)], [*others, masked]
    run = _on_parts(run, tuple(specs), divided if local else whole)
    return run(_padded(q, parts), *others)[:, : q.shape[1]]


def _on_parts(f: Callable[..., jax.Array], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Apply `f` to the shards of each device."""
    # Kernels do not declare how their results vary over the mesh: check_vma.
    return jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names=set(_mesh_sizes()), check_vma=False
    )


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Pad the tokens of x (B, L, ...) with zeros to the next multiple."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)))


def _spec(*axes: tuple[str, ...] | None) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in axes))


def _mesh_sizes() -> dict[str, int]:
    """Return the axes of the mesh in use that no outer `shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def _chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    *,
    causal: bool,
    query_chunk: int,
) -> jax.Array:
    """Attend by XLA, a chunk of queries at a time."""
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
        return checkpoint_name(rows(q, jnp.int32(0)), splash.RESULT)
    chunks = -(-length // query_chunk)
    # Equal chunks, so that the last is not mostly padding.
    equal = -(-length // chunks)
    padded = jnp.pad(q, ((0, 0), (0, chunks * equal - length), (0, 0), (0, 0)))
    padded = rearrange(padded, "b (c l) n d -> c b l n d", c=chunks)
    first = jnp.arange(chunks) * equal
    # Without the checkpoint the gradient would keep the weights of every chunk.
    out = jax.lax.map(lambda x: jax.checkpoint(rows)(*x), (padded, first))
    return checkpoint_name(rearrange(out, "c b l n d -> b (c l) n d")[:, :length], splash.RESULT)
