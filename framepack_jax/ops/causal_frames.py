"""Attention in which no token reads a later frame of the target.

Source: CausVid (arXiv 2412.07772), as FramePack compares with it (arXiv 2504.12626, table 2): frame
i of the target reads the history and the frames up to i. Ours: tokens of context, image and prompt
read each other and no frame of the target; what one of them read of a late frame, an early frame
would read of it in the next block.

The queries of each frame attend on their own, to the keys that they read. So every kernel of
`ops.attention` does it without a mask, and no score is computed that is not used.

Shapes: B batch, L tokens, N heads, D head width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from framepack_jax.ops.attention import attend


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TargetFrames:
    """Place of the target in a sequence: `count` frames of `size` tokens from token `first` on."""

    first: int
    count: int
    size: int

    @property
    def stop(self) -> int:
        """Number of the first token after the target."""
        return self.first + self.count * self.size


def attend_by_frame(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None = None,
    masked: jax.Array | None = None,
    frames: TargetFrames | None = None,
) -> jax.Array:
    """Attend as `ops.attention.attend` from q to k and v (B, L, N, D); with `frames`, read no later
    frame of the target."""
    if frames is None:
        return attend(q, k, v, valid, masked)
    first, stop, size = frames.first, frames.stop, frames.size

    def rows(queries: jax.Array, end: int) -> jax.Array:
        """Attend to all tokens but those of the target from token `end` on."""
        readable = None if valid is None else _without(valid, end, stop)
        return attend(queries, _without(k, end, stop), _without(v, end, stop), readable, masked)

    parts = [rows(q[:, i : i + size], i + size) for i in range(first, stop, size)]
    if others := first + q.shape[1] - stop:
        out = rows(_without(q, first, stop), first)
        parts = [out[:, :first], *parts, out[:, first:others]]
    return jnp.concatenate(parts, axis=1)


def _without(x: jax.Array, first: int, stop: int) -> jax.Array:
    """Leave out the tokens `first` .. `stop - 1` of x (B, L, ...)."""
    return jnp.concatenate([x[:, :first], x[:, stop:]], axis=1)
