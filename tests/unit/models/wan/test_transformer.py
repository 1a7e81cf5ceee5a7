"""Programs of Wan's transformer."""

import functools

import jax
import jax.numpy as jnp
import pytest

from framepack_jax.models.wan import transformer
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.packing import PackedContext

CFG = WanConfig(
    heads=2, layers=3, mlp_dim=64, text_dim=32, time_dim=16, context_kernels=("k1", "k2"),
    clean_context=True, prompt_to_target=True,
)  # fmt: skip


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize("text", [512, 64])
def test_attention_without_masks_takes_the_kernel_of_a_tpu(text: int) -> None:
    """Self-attention and, with as many tokens as the release reads, cross-attention."""
    params = jax.eval_shape(lambda: transformer.init(CFG, jax.random.key(0)))
    x = shape(1, 9, 32, 32, 16)
    context = PackedContext(
        (shape(1, 2, 32, 32, 16), shape(1, 1, 32, 32, 16)), (shape(1, 2), shape(1, 1)),
        shape(1, 9), ("k2", "k1"),
    )  # fmt: skip
    velocity = functools.partial(transformer.velocity, CFG, dtype=jnp.bfloat16)
    inputs = params, x, shape(1), context, transformer.Conditions(shape(1, text, 32))
    lowered = jax.jit(velocity).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("tpu_custom_call") == (2 if text == 512 else 1)
    # Modulation is two sets of six vectors, not one for each of the 2,368 tokens.
    assert "tensor<1x6x256xf32>" in lowered
    assert "x6x256x" not in lowered.replace("tensor<1x6x256x", "").replace("tensor<3x6x256x", "")
