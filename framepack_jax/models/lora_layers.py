"""Linear layers with low-rank factors (LoRA, arXiv 2106.09685) beside their kernels.

The factors `lora_a` (in, r) and `lora_b` (r, ...out) are parameters like others, with a layer axis
in a stack. A layer that has them computes x W + (x a) b. `framepack_jax.models.lora` puts them into
the parameters of a network.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from framepack_jax.models import master_weights
from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import QUANTIZED

LORA_A, LORA_B = "lora_a", "lora_b"
# Name of a linear layer's result, for what a gradient keeps (`scan.REMAT`).
LINEAR = "linear_result"


def lora_interceptor(weights: Any = None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which Dense and DenseGeneral add (x a) b to their result.

    A layer without factors computes the same operations as outside of the context. The product
    a b, as large as the kernel, is never formed, so that no gradient of that size is computed.
    The sum is named, so that a gradient keeps one array of a layer's two products. `weights` is the
    dtype that float32 weights are rounded to, with gradients in float32 (`master_weights`).
    """
    return nn.intercept_methods(functools.partial(_linear, weights))


def apply(module: nn.Module, params: Params, *args: Any, weights: Any = None) -> Any:
    """Compute a module whose linear layers may have factors among `params`. `weights` is the dtype
    that float32 weights of linear layers are rounded to."""
    with lora_interceptor(weights):
        return apply_module(module, params, *args)


def _linear(
    weights: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    if not isinstance(module, nn.Dense | nn.DenseGeneral) or context.method_name != "__call__":
        return call(*args, **kwargs)
    kernel: Any = module.get_variable("params", "kernel")
    if master_weights.rounds(kernel, weights):
        y = _rounded(module, args[0], weights)
    else:
        y = call(*args, **kwargs)
    if module.has_variable("params", LORA_A):
        x = args[0]
        for name in (LORA_A, LORA_B):
            x = _product(module, x, module.get_variable("params", name), weights)
        y += x.astype(y.dtype)
    return checkpoint_name(y, LINEAR)


def _rounded(module: nn.Dense | nn.DenseGeneral, x: jax.Array, weights: Any) -> jax.Array:
    """Compute a layer, without its factors, whose weights are rounded."""
    y = _product(module, x, module.get_variable("params", "kernel"), weights)
    if not module.use_bias:
        return y
    return master_weights.add_bias(y, module.get_variable("params", "bias"), weights)


def _product(
    module: nn.Dense | nn.DenseGeneral, x: jax.Array, kernel: jax.Array, weights: Any
) -> jax.Array:
    if master_weights.rounds(kernel, weights):
        return master_weights.project(x, kernel, weights, module.precision)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=module.dtype)
    return jnp.tensordot(x, kernel, axes=1, precision=module.precision)


def merge_kernel(params: Params) -> Params:
    """Merge the factors of one linear layer, if it has any, into its kernel: W + a b, computed in
    float32, as W's dtype. Raises ValueError if the kernel is quantized."""
    if LORA_A not in params:
        return params
    rest = {name: leaf for name, leaf in params.items() if name not in (LORA_A, LORA_B)}
    kernel = params["kernel"]
    check_mergeable(kernel)
    a, b = (params[name].astype(jnp.float32) for name in (LORA_A, LORA_B))
    change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    return rest | {"kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}


def check_mergeable(kernel: jax.Array) -> None:
    """Raise ValueError if factors cannot be added to a kernel."""
    if kernel.dtype.name in QUANTIZED:
        raise ValueError(
            f"a LoRA cannot be merged into a kernel of {kernel.dtype}, whose steps are coarser than"
            f" the change; take a bundle converted without --dtype {kernel.dtype}, or leave"
            " --merge-lora out"
        )


def scale_factors(params: Params, scale: float) -> Params:
    """Multiply every second factor `lora_b` by `scale`."""
    leaves = {
        path: leaf * scale if path[-1] == LORA_B else leaf
        for path, leaf in flatten_dict(params).items()
    }
    return unflatten_dict(leaves)
