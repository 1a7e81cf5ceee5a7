"""Quantized kernels: 8 bits a weight, with a float32 scale for each output channel beside them."""

from typing import Any

import jax
import jax.numpy as jnp

from framepack_jax.models.params import Params

# Types that a kernel may be stored in.
QUANTIZED = ("int8", "float8_e4m3fn")
SCALE = "kernel_scale"


def cast_params(params: Params, dtype: Any) -> Params:
    """Return floating-point leaves, and quantized kernels times their scales, as `dtype`."""
    return jax.tree.map(
        lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p,
        dequantize(params),
    )


def dequantize(params: Any) -> Any:
    """Replace each quantized kernel (in, ...out) and its scale (...out) by their product in
    float32."""
    if not isinstance(params, dict):
        return params
    params = {name: dequantize(leaf) for name, leaf in params.items()}
    if SCALE in params:
        params["kernel"] = params["kernel"].astype(jnp.float32) * params.pop(SCALE)[None]
    return params
