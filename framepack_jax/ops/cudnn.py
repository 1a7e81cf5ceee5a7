"""Attention by cuDNN's fused kernel, for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Its faults are avoided here. Masks go in as lengths, because a mask without a bias is refused
(jax issue 28974). Lengths are padded to multiples of 128, because the backward kernel returns NaN
for others: cudnn-frontend issue 160, and pytorch issue 196678, where multiples of 64 fail too.

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

LENGTH_MULTIPLE = 128
# Wider heads (to 256) need Hopper or newer, and while tracing nobody knows the GPU.
WIDEST_HEAD = 128
HEAD_MULTIPLE = 8


def refusal(q: jax.Array, k: jax.Array) -> str | None:
    """Why cuDNN cannot attend from q (B, L, N, D) to k (B, S, M, D); None where it can."""
    width = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.dtype != k.dtype:
        return f"queries are {q.dtype}, keys {k.dtype}"
    if width > WIDEST_HEAD or width % HEAD_MULTIPLE:
        return f"head width {width} is not a multiple of {HEAD_MULTIPLE} of at most {WIDEST_HEAD}"
    if not installed():
        return "JAX finds no cuDNN; install the extra cuda12 or cuda13"
    return None


@functools.cache
def installed() -> bool:
    """Whether JAX has a cuDNN. Without one even tracing the kernel fails, for any platform."""
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(fused, x, x, x)
    except RuntimeError:
        return False
    return True


def is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: keep what the forward kernel leaves for the backward one, its
    result and a sum for each row. JAX gives them no names (`jax.ad_checkpoint.checkpoint_name`)."""
    return primitive.name.startswith("dot_product_attention_fwd")


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, *, causal: bool
) -> jax.Array:
    """The contract of `ops.attention.attend`, for what `refusal` lets pass."""
    length, keys = q.shape[1], k.shape[1]
    lengths = None
    if valid is not None:
        lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
        # What the kernel leaves behind the last valid key, in the gradients too, is not read.
        k, v = (jnp.where(valid[:, :, None, None], x, 0) for x in (k, v))
    elif keys % LENGTH_MULTIPLE:
        lengths = jnp.full(q.shape[:1], keys, jnp.int32)
    # No length of queries is given: padded rows then attend as all others do, and stay finite.
    out = jax.nn.dot_product_attention(
        *(_pad(x) for x in (q, k, v)),
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, :length]


def _pad(x: jax.Array) -> jax.Array:
    """Zeros after x (B, L, N, D), to the next multiple of the length."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LENGTH_MULTIPLE), (0, 0), (0, 0)))
