"""Linear layers with float32 weights in a computation of fewer bits.

A layer rounds its weights to the dtype of the computation, so that devices gather the rounded ones.
The gradient of the weights leaves the matrix product in float32, so that devices sum their parts of
it in float32: rounding each part first would add an error to every sum over devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params

# Low-rank factors of a layer (`lora_layers`).
FACTORS = ("lora_a", "lora_b")


def rounds(weight: Any, dtype: Any) -> bool:
    """Return True if a layer rounds this weight, a float32 one, to the dtype of the computation."""
    return weight is not None and dtype is not None and weight.dtype == jnp.float32 != dtype


def cast_others(params: Params, dtype: Any) -> Params:
    """Return parameters as `cast_params` does, except float32 weights of linear layers."""
    if any(isinstance(leaf, dict) for leaf in params.values()):
        return {
            name: cast_others(leaf, dtype) if isinstance(leaf, dict) else cast_params(leaf, dtype)
            for name, leaf in params.items()
        }
    names = ("kernel", "bias") if rounds(params.get("kernel"), dtype) else ()
    kept = (name for name in (*names, *FACTORS) if rounds(params.get(name), dtype))
    return cast_params(params, dtype) | {name: params[name] for name in kept}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: jax.Array, kernel: jax.Array, dtype: Any, precision: Any = None) -> jax.Array:
    """Return x (..., D) times a kernel (D, ...out) that is rounded to `dtype`, as x's dtype."""
    return jnp.tensordot(x, kernel.astype(dtype).astype(x.dtype), axes=1, precision=precision)


def _forward(
    x: jax.Array, kernel: jax.Array, dtype: Any, precision: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel, dtype, precision), (x, kernel)


def _backward(
    dtype: Any, precision: Any, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rounded = kernel.astype(dtype).astype(x.dtype)
    out = tuple(range(x.ndim - 1, dy.ndim))
    columns = tuple(range(1, kernel.ndim))
    dx = jax.lax.dot_general(dy, rounded, ((out, columns), ((), ())), precision=precision)
    rows = tuple(range(x.ndim - 1))

    def product(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x, dy, ((rows, rows), ((), ())), precision=precision,
            preferred_element_type=kernel.dtype,
        )  # fmt: skip

    def widened(x: jax.Array, dy: jax.Array) -> jax.Array:
        return product(x.astype(kernel.dtype), dy.astype(kernel.dtype))

    # XLA's CPU backend has no such product of bfloat16.
    return dx.astype(x.dtype), jax.lax.platform_dependent(x, dy, cpu=widened, default=product)


project.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    """Return y (..., *out) plus a bias (*out) that is rounded to `dtype`, as y's dtype."""
    return y + bias.astype(dtype).astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _forward_bias(y: jax.Array, bias: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return add_bias(y, bias, dtype), bias


def _backward_bias(dtype: Any, bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = tuple(range(dy.ndim - bias.ndim))
    return dy, jnp.sum(dy.astype(bias.dtype), axis=rows)


add_bias.defvjp(_forward_bias, _backward_bias)
