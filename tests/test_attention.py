"""The attention entry against a float64 softmax: chunks, masks, grouped queries, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat
from torch_reference import relative_error

from framepack_jax.ops.attention import attend


def reference(q, k, v, valid=None, causal=False) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (repeat(x, "b s m d -> b s (m g) d", g=q.shape[2] // x.shape[2]) for x in (k, v))
    scores = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(q.shape[-1])
    if valid is not None:
        scores = np.where(valid[:, None, None, :], scores, -np.inf)
    if causal:
        rows, columns = np.indices(scores.shape[-2:])
        scores = np.where((columns <= rows)[None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnls,bsnd->blnd", weights, v)


def draw(queries: int, keys: int, heads: int = 4, kv_heads: int = 4) -> list[np.ndarray]:
    random = np.random.default_rng(queries)
    shapes = (2, queries, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


@pytest.mark.parametrize("query_chunk", [256, 16, 7, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_do_not_show(query_chunk: int, causal: bool) -> None:
    q, k, v = draw(33, 33)
    valid = np.arange(33)[None, :] < np.array([[33], [5]])
    ours = attend(q, k, v, valid, causal=causal, query_chunk=query_chunk)
    assert relative_error(ours, reference(q, k, v, valid, causal)) < 1e-5


def test_grouped_queries_and_other_lengths() -> None:
    q, k, v = draw(9, 21, heads=6, kv_heads=2)
    assert relative_error(attend(q, k, v, query_chunk=4), reference(q, k, v)) < 1e-5


def test_gradients() -> None:
    q, k, v = draw(10, 10)
    valid = np.arange(10)[None, :] < np.array([[10], [4]])

    def loss(q, k, v, query_chunk: int) -> jax.Array:
        rows = attend(q, k, v, valid, query_chunk=query_chunk)
        return jnp.sum(jnp.where(valid[:, :, None, None], rows, 0) ** 2)

    whole = jax.grad(loss, (0, 1, 2))(q, k, v, 256)
    for ours, theirs in zip(jax.grad(loss, (0, 1, 2))(q, k, v, 4), whole, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert not np.asarray(whole[2])[1, 4:].any()
    step, direction = 1e-3, np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    ends = [
        np.sum(np.where(valid[:, :, None, None], reference(x, k, v, valid), 0) ** 2)
        for x in (q.astype(np.float64) + step * direction, q.astype(np.float64) - step * direction)
    ]
    slope = np.sum(np.asarray(whole[0]) * direction)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)


def test_bfloat16_stays_bfloat16() -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(12, 12))
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)))
    assert relative_error(out, exact) < 2e-2


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = draw(4, 4, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        attend(q, k, v)
    q, k, v = draw(4, 5)
    with pytest.raises(ValueError, match="got 4, 5"):
        attend(q, k, v, causal=True)
