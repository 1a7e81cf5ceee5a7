"""Attention of frames that read no later frame, against a mask, and the kernels that do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.ops import cudnn
from framepack_jax.ops.causal_frames import TargetFrames, attend_by_frame
from tests.fixtures.torch_reference import relative_error

# Context, three frames of four tokens, and a prompt, of which the second sample has two tokens.
FRAMES = TargetFrames(first=5, count=3, size=4)
LENGTH = 5 + 12 + 6


def reads() -> np.ndarray:
    """(queries, keys): whether a token reads another."""
    place = np.full(LENGTH, -1)
    place[5:17] = np.arange(12) // 4
    return place[None, :] <= place[:, None]


def masked_attention(q, k, v, seen):
    """softmax(q k^T / sqrt(D)) v over the keys that are `seen` (B, L, S)."""
    scores = jnp.einsum("blnd,bsnd->bnls", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnls,bsnd->blnd", weights, v)


@pytest.mark.parametrize("masked", [None, np.array([0, 3])])
def test_frames_read_what_the_mask_shows(masked) -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, LENGTH, 2, 8), np.float32) for _ in range(3))
    valid = np.arange(LENGTH)[None] < np.array([[LENGTH], [LENGTH - 4]])
    seen = reads()[None] & valid[:, None]
    if masked is not None:
        seen &= np.arange(LENGTH)[None, None] >= masked[:, None, None]

    def of(attend):
        """The rows of tokens that are read, and the gradients of a sum over them."""

        def loss(q, k, v):
            out = jnp.where(valid[:, :, None, None], attend(q, k, v), 0)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), True))(q, k, v)
        return out, *gradients

    ours = of(lambda q, k, v: attend_by_frame(q, k, v, valid, masked, FRAMES))
    for found, expected in zip(ours, of(lambda *x: masked_attention(*x, seen)), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_a_target_without_context_has_frames_alone() -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 12, 2, 8), np.float32) for _ in range(3))
    seen = reads()[None, 5:17, 5:17]
    found = jax.jit(lambda *x: attend_by_frame(*x, frames=TargetFrames(0, 3, 4)))(q, k, v)
    assert relative_error(found, masked_attention(q, k, v, seen)) < 1e-5


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_frame_runs_the_fused_kernel(monkeypatch, platform: str) -> None:
    """One call for each frame, and one for all other tokens, over the keys that are read alone."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    cudnn.installed.cache_clear()
    x = jax.ShapeDtypeStruct((1, 2048 + 3 * 1024 + 128, 2, 64), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct(x.shape[:2], bool)

    def run(q, k, v, valid):
        return attend_by_frame(q, k, v, valid, None, TargetFrames(2048, 3, 1024))

    program = jax.jit(run).trace(x, x, x, valid).lower(lowering_platforms=(platform,)).as_text()
    cudnn.installed.cache_clear()
    calls = [
        line for line in program.splitlines()
        if "tpu_custom_call" in line or "__cudnn$fmhaSoftmax" in line
    ]  # fmt: skip
    assert len(calls) == 1 + 3
    shape = "tensor<1x2x1024x128xbf16>" if platform == "tpu" else "tensor<1x1024x2x64xbf16>"
    assert sum(shape in line for line in calls) == 3
