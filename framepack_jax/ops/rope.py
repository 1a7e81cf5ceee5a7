"""3-axis rotary position embedding of packed video tokens, from frame indices.

Source: HunyuanVideo's 3-D RoPE (axes over time, height, width; interleaved pairs) as FramePack
uses it: the tables of compressed context are those of full resolution, average-pooled to the grid
of the larger patch kernel (arXiv 2504.12626, section 3.2).

Shapes: B batch, F latent frames, H W rows and columns of (1,2,2) patches, L tokens, N heads,
D head width. Tables are float32 (B, L, D/2), tokens ordered (frame, row, column).
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

Table = tuple[jax.Array, jax.Array]


def rope_table(
    frame_indices: jax.Array | np.ndarray,
    height: int,
    width: int,
    axes: tuple[int, int, int],
    theta: float,
    pool: tuple[float, float, float] = (1, 1, 1),
    *,
    counts: jax.Array | np.ndarray | None = None,
    cell: int = 1,
) -> Table:
    """Return (cos, sin) for frames (B, F) of height x width patches, pooled by `pool` (t, h, w).

    Rows and columns of half a patch are latent cells, which lie a quarter before and after the
    middle of their patch (ours): pooled by 0.5 they stay apart, by 1.5 three make one token.

    With `counts` (B, F), a frame stands for so many indices from its own on: its table is the mean
    of theirs. With `cell`, rows and columns are pooled by `cell` patches first, then by `pool`.

    A frequency belongs to one axis, so pooling in 3-D is pooling of each axis' own table. Ragged
    edges are padded by replication before pooling, as the latents are.
    """
    time = _axis_table(frame_indices, axes[0], theta, counts)
    high, wide = (
        _pooled(_axis_table(_positions(side, size, cell), dim, theta), cell)
        for side, dim, size in zip((height, width), axes[1:], pool[1:], strict=True)
    )
    sizes = (size if size == int(size) or cell > 1 else 2 * size for size in pool)
    time, high, wide = (
        _pooled(table, int(size)) for table, size in zip((time, high, wide), sizes, strict=True)
    )
    batch, shape = frame_indices.shape[0], (time.shape[2], high.shape[2], wide.shape[2])
    tables = (
        jnp.broadcast_to(time[:, :, :, None, None], (2, batch, *shape, time.shape[-1])),
        jnp.broadcast_to(high[:, :, None, :, None], (2, batch, *shape, high.shape[-1])),
        jnp.broadcast_to(wide[:, :, None, None, :], (2, batch, *shape, wide.shape[-1])),
    )
    cos, sin = rearrange(jnp.concatenate(tables, axis=-1), "cs b t h w d -> cs b (t h w) d")
    return cos, sin


def _positions(patches: int, pool: float, cell: int) -> jax.Array:
    """Return the positions (1, P) of patches; of their cells if `pool` is no whole number."""
    if pool == int(pool) or cell > 1:
        return jnp.arange(patches)[None, :]
    return jnp.arange(2 * patches)[None, :] / 2 - 0.25


def _axis_table(
    positions: jax.Array | np.ndarray,
    dim: int,
    theta: float,
    counts: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Return stacked (cos, sin) of positions (B, P), of shape (2, B, P, dim / 2); with `counts`
    (B, P), their means over as many positions."""
    frequencies = jnp.asarray(theta ** -(np.arange(0, dim, 2) / dim), jnp.float32)[None, None, :]
    places = positions.astype(jnp.float32)[:, :, None]
    if counts is None:
        angles = places * frequencies
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    # The sum of n phases at equal distances is one phase, in their middle (Dirichlet's kernel).
    n = jnp.asarray(counts, jnp.float32)[:, :, None]
    angles = (places + (n - 1) / 2) * frequencies
    size = jnp.sin(n * frequencies / 2) / (n * jnp.sin(frequencies / 2))
    return size[None] * jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def _pooled(table: jax.Array, pool: int) -> jax.Array:
    """Average a table (2, B, P, D) over each `pool` positions: (2, B, ceil(P / pool), D)."""
    ragged = -table.shape[2] % pool
    table = jnp.pad(table, ((0, 0), (0, 0), (0, ragged), (0, 0)), mode="edge")
    return reduce(table, "cs b (p pool) d -> cs b p d", "mean", pool=pool)


@jax.named_scope("rope")
def apply_rope(x: jax.Array, table: Table) -> jax.Array:
    """Rotate the leading tokens of x (B, L', N, D) by a table of L <= L' tokens; the rest stays.

    Pairs are interleaved: (x[2i], x[2i + 1]). Computed in float32, returned in x's dtype.
    """
    cos, sin = (t[:, :, None, :] for t in table)
    length = cos.shape[1]
    pairs = rearrange(x[:, :length].astype(jnp.float32), "b l n (d two) -> b l n d two", two=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    rotated = rearrange(rotated, "b l n d two -> b l n (d two)").astype(x.dtype)
    return jnp.concatenate([rotated, x[:, length:]], axis=1)
