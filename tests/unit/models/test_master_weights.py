"""Gradients of float32 weights in a bfloat16 computation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.models import lora_layers, master_weights, scan


class Block(nn.Module):
    """A norm and two linear layers, of which one has several output dimensions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.DenseGeneral((2, 3), name="heads")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="out")(hidden.reshape(*x.shape[:-1], 6))


@pytest.fixture(scope="module")
def params() -> dict:
    return scan.init(Block(), jax.random.key(0), 2, jnp.zeros((1, 8)))


def inputs(rows: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, 8)).astype(dtype)


def mean_square(params: dict, x: jax.Array) -> jax.Array:
    return jnp.mean(scan.run(Block(), params, x).astype(jnp.float32) ** 2)


def test_the_result_is_that_of_rounded_weights(params) -> None:
    x = inputs(16, "bfloat16")
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    np.testing.assert_array_equal(scan.run(Block(), params, x), scan.run(Block(), rounded, x))


def test_gradients_of_parts_of_a_batch_are_not_rounded() -> None:
    """4096 rows that each add 1 + 1/256, which bfloat16 rounds to 1."""
    x, kernel = jnp.ones((4096, 1), jnp.bfloat16), jnp.ones((1, 1))

    def total(kernel: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.sum(master_weights.project(rows, kernel, jnp.bfloat16).astype(jnp.float32))

    odd = jax.grad(total)(kernel, x[:257])
    assert odd.dtype == jnp.float32 and float(odd[0, 0]) == 257
    # bfloat16 has no 257.
    assert float(jax.grad(total)(kernel.astype(jnp.bfloat16), x[:257])[0, 0]) != 257


def test_gradients_agree_with_those_of_float32(params) -> None:
    wanted = jax.grad(mean_square)(params, inputs(64, "float32"))
    got = jax.grad(mean_square)(params, inputs(64, "bfloat16"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.03 * float(jnp.abs(b).max()))


def test_factors_of_a_frozen_layer_have_float32_gradients(params) -> None:
    frozen = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    factors = {"lora_a": jnp.ones((2, 8, 1)), "lora_b": jnp.ones((2, 1, 2, 3))}

    def loss(factors: dict) -> jax.Array:
        merged = frozen | {"heads": frozen["heads"] | factors}
        return mean_square(merged, inputs(64, "bfloat16"))

    text = jax.jit(jax.grad(loss)).lower(factors).as_text()
    # The products that make gradients of factors give float32.
    assert "tensor<8x1xf32>" in text and "tensor<1x2x3xf32>" in text
    with lora_layers.lora_interceptor():
        assert jax.tree.leaves(jax.grad(loss)(factors))[0].dtype == jnp.float32
