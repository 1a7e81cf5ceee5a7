"""Attention by cuDNN's fused kernel, for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Workarounds: masks are passed as lengths, because a mask without a bias is refused (jax issue
28974). Lengths are padded to multiples of 128, because the backward kernel returns NaN for others
(cudnn-frontend issue 160; in pytorch issue 196678 multiples of 64 fail too).

Shapes: B batch, L query tokens, S key tokens, N heads, M key/value heads, D head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

LENGTH_MULTIPLE = 128
# Wider heads (up to 256) need Hopper or newer, and the GPU is unknown while tracing.
MAX_HEAD_WIDTH = 128
HEAD_MULTIPLE = 8


def refusal(q: jax.Array, k: jax.Array) -> str | None:
    """Return why cuDNN cannot attend from q (B, L, N, D) to k (B, S, M, D); None if it can."""
    width = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.dtype != k.dtype:
        return f"queries are {q.dtype}, keys {k.dtype}"
    if width > MAX_HEAD_WIDTH or width % HEAD_MULTIPLE:
        return (
            f"head width {width} is not a multiple of {HEAD_MULTIPLE} of at most {MAX_HEAD_WIDTH}"
        )
    if not installed():
        return "JAX finds no cuDNN; install the extra cuda12 or cuda13"
    return None


@functools.cache
def installed() -> bool:
    """Return True if JAX has cuDNN; without it tracing the kernel fails for any platform."""
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(fused, x, x, x)
    except RuntimeError:
        return False
    return True


def is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Tell `jax.checkpoint` to keep the residuals of the forward kernel: its result and a sum for
    each row. JAX gives them no names (`jax.ad_checkpoint.checkpoint_name`)."""
    return primitive.name.startswith("dot_product_attention_fwd")


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None, *, causal: bool
) -> jax.Array:
    """Attend as `ops.attention.attend`, for inputs without a `refusal`."""
    length, keys = q.shape[1], k.shape[1]
    lengths = None
    if valid is not None:
        lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
        # Beyond the last valid key the kernel leaves garbage, also in gradients: mask it.
        k, v = (jnp.where(valid[:, :, None, None], x, 0) for x in (k, v))
    elif keys % LENGTH_MULTIPLE:
        lengths = jnp.full(q.shape[:1], keys, jnp.int32)
    # Without a length of queries, padded rows attend like all others and stay finite.
    out = jax.nn.dot_product_attention(
        *(_pad(x) for x in (q, k, v)),
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, :length]


def _pad(x: jax.Array) -> jax.Array:
    """Pad x (B, L, N, D) with zeros to the next multiple of LENGTH_MULTIPLE."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LENGTH_MULTIPLE), (0, 0), (0, 0)))
