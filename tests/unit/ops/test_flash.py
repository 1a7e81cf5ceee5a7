"""The TPU's kernel without a gradient, interpreted, against float64 and against JAX's kernel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.ops import attention, flash, splash

attend = functools.partial(splash.attend, causal=False, interpret=True)


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch) -> None:
    """Several tiles and chunks, also at the lengths of a test."""
    monkeypatch.setattr(splash, "TILE", (128, 256))
    monkeypatch.setattr(flash, "CHUNK", 128)


def draw(queries: int, keys: int, kv_heads: int) -> list[np.ndarray]:
    random = np.random.default_rng(keys)
    shapes = (2, queries, 4, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


def reference(q, k, v, readable) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v over the first `readable` keys of each sample, in float64."""
    out = np.empty(q.shape)
    for sample, head in np.ndindex(q.shape[0], q.shape[2]):
        of = head // (q.shape[2] // k.shape[2])
        keys, values = (np.float64(x[sample, : readable[sample], of]) for x in (k, v))
        scores = np.float64(q[sample, :, head]) @ keys.T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[sample, :, head] = weights @ values / weights.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize(
    "queries,keys,kv_heads,readable",
    [(130, 257, 2, (257, 100)), (257, 130, 4, None), (7, 700, 1, (513, 1))],
)
def test_results(queries, keys, kv_heads, readable) -> None:
    arrays = draw(queries, keys, kv_heads)
    valid = None if readable is None else np.arange(keys) < np.array(readable)[:, None]
    exact = reference(*arrays, readable or (keys, keys))
    ours = jax.jit(attend)(*arrays, valid)
    assert np.max(np.abs(ours - exact)) < 2e-6 * np.max(np.abs(exact))


def test_large_scores_stay_finite() -> None:
    q, k, v = draw(9, 300, 4)
    ours = jax.jit(attend)(100 * q, 100 * k, v, None)
    assert np.max(np.abs(ours - reference(100 * q, 100 * k, v, (300, 300)))) < 1e-3


def test_tiles_that_no_sample_reads_are_skipped() -> None:
    q, k, v = draw(9, 700, 4)
    exact = reference(q, k, v, (256, 512))
    for sample, first in enumerate((256, 512)):
        k[sample, first:], v[sample, first:] = np.nan, np.nan
    valid = np.arange(700) < np.array([[256], [512]])
    ours = jax.jit(attend)(q, k, v, valid)
    assert np.max(np.abs(ours - exact)) < 2e-6 * np.max(np.abs(exact))


def test_bfloat16_is_as_exact_as_the_kernel_of_jax() -> None:
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(64, 512, 4)]
    exact = reference(*(np.asarray(x, np.float32) for x in arrays), (512, 512))

    def error(run) -> float:
        return np.sqrt(np.mean((np.asarray(jax.jit(run)(*arrays), np.float64) - exact) ** 2))

    # The forward pass of a gradient is JAX's kernel.
    theirs = error(lambda *x: jax.vjp(lambda *y: attend(*y, None), *x)[0])
    assert error(lambda *x: attend(*x, None)) < 1.3 * theirs


def test_only_calls_without_a_gradient_take_it() -> None:
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)

    def kernels(run) -> list[str]:
        text = jax.jit(run).trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
        return re.findall(r'kernel_name = "(\w+)"', text)

    assert kernels(attention.attend) == ["flash_forward"]
    for run in (
        functools.partial(attention.attend, causal=True),
        jax.grad(lambda *y: jnp.sum(attention.attend(*y).astype(jnp.float32))),
    ):
        names = kernels(run)
        assert names and all(name.startswith("splash") for name in names)
