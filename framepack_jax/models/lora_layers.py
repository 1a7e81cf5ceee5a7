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

from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import QUANTIZED

LORA_A, LORA_B = "lora_a", "lora_b"
# Name of a linear layer's result, for what a gradient keeps (`scan.REMAT`).
LINEAR = "linear_result"


def lora_interceptor() -> contextlib.AbstractContextManager[None]:
    """Return a context in which Dense and DenseGeneral add (x a) b to their result.

    A layer without factors computes the same operations as outside of the context. The product
    a b, as large as the kernel, is never formed, so that no gradient of that size is computed.
    The sum is named, so that a gradient keeps one array of a layer's two products.
    """
    return nn.intercept_methods(_linear)


def apply(module: nn.Module, params: Params, *args: Any) -> Any:
    """Compute a module whose linear layers may have factors among `params`."""
    with lora_interceptor():
        return apply_module(module, params, *args)


def _linear(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    y = call(*args, **kwargs)
    module = context.module
    if not isinstance(module, nn.Dense | nn.DenseGeneral) or context.method_name != "__call__":
        return y
    if module.has_variable("params", LORA_A):
        factors = (module.get_variable("params", name) for name in (LORA_A, LORA_B))
        x, a, b = nn.dtypes.promote_dtype(args[0], *factors, dtype=module.dtype)
        product = functools.partial(jnp.tensordot, axes=1, precision=module.precision)
        y += product(product(x, a), b).astype(y.dtype)
    return checkpoint_name(y, LINEAR)


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
