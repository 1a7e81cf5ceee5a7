"""The causal 3-D convolution of the video autoencoder, in one place so that it can be exchanged.

A frame sees itself and the frames before it: time is padded on the left only. All padding repeats
the border (HunyuanVideo, arXiv 2412.03603, section 4.1).

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

Stride = Size = tuple[int, int, int]
# Channels up to which XLA's convolutions are as fast on a CPU as matrix products.
FEW_CHANNELS = 16
# Of the output of one piece on a CPU; what a core keeps near.
PIECE_BYTES = 1 << 19


def causal_conv3d(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: Stride = (1, 1, 1)
) -> jax.Array:
    """Convolve x (B, T, H, W, C) with kernel (kt, kh, kw, C, C_out); kh and kw are odd.

    Returns (B, ceil(T / stride_t), ceil(H / stride_h), ceil(W / stride_w), C_out) in x's dtype.
    """
    out = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: on_cpu(x, kernel, stride),
        default=lambda x, kernel: by_volume(_padded(x, kernel.shape[:3]), kernel, stride),
    )
    return out + bias[None, None, None, None, :]


def by_volume(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """The convolution of a padded x as one 3-D convolution."""
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, stride, "VALID", dimension_numbers=layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def on_cpu(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """The convolution of x, not padded yet, in what is fast on a CPU, where XLA's convolutions of
    many channels, and the gradients of all, run at a tenth of the speed of matrix products."""
    return _valid(_padded(x, kernel.shape[:3]), kernel, stride)


def _forward(x: jax.Array, kernel: jax.Array, stride: Stride) -> Any:
    return on_cpu(x, kernel, stride), (x, kernel)


def _backward(stride: Stride, inputs: tuple[jax.Array, jax.Array], dy: jax.Array) -> Any:
    """Towards x the convolution of dy, spread by the stride, with the kernel turned around; towards
    the kernel one matrix product a piece and tap."""
    x, kernel = inputs
    size = kernel.shape[:3]
    padded = _padded(x, size)
    # What a stride leaves over at the end was never read.
    unread = [n - (m - 1) * s - k for n, m, s, k in
              zip(padded.shape[1:4], dy.shape[1:4], stride, size, strict=True)]  # fmt: skip
    around = [(k - 1, k - 1 + rest, s - 1) for k, rest, s in zip(size, unread, stride, strict=True)]
    spread = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    turned = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    dx = _folded(_valid(spread, turned, (1, 1, 1)), size)

    pieces = _Pieces(*dy.shape[:4], max(kernel.shape[3:]))
    parts = dy.reshape(pieces.count, -1, dy.shape[-1])

    def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        part = parts[number].astype(jnp.float32)
        taps = pieces.taps(padded, number, size, stride)
        products = [rearrange(tap, "h w c -> c (h w)") @ part for _, tap in taps]
        return total + jnp.stack(products).reshape(kernel.shape), None

    zeros = jnp.zeros(kernel.shape, jnp.float32)
    dkernel, _ = jax.lax.scan(add, zeros, jnp.arange(pieces.count))
    return dx, dkernel.astype(kernel.dtype)


on_cpu.defvjp(_forward, _backward)


def _margins(size: Size) -> list[tuple[int, int]]:
    """What is padded (before, after) in time, height and width."""
    return [(size[0] - 1, 0), *((k // 2, k // 2) for k in size[1:])]


def _padded(x: jax.Array, size: Size) -> jax.Array:
    return jnp.pad(x, [(0, 0), *_margins(size), (0, 0)], mode="edge")


def _folded(dx: jax.Array, size: Size) -> jax.Array:
    """The transpose of `_padded`: what flows to the copies of a border is added to it."""
    for axis, (before, after) in enumerate(_margins(size), start=1):
        end = dx.shape[axis] - after
        inner = jax.lax.slice_in_dim(dx, before, end, axis=axis)
        first = jax.lax.slice_in_dim(dx, 0, before, axis=axis).sum(axis)
        last = jax.lax.slice_in_dim(dx, end, end + after, axis=axis).sum(axis)
        at = (slice(None),) * axis
        dx = inner.at[(*at, 0)].add(first).at[(*at, -1)].add(last)
    return dx


def _valid(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """The convolution of a padded x on a CPU. Pieces are cut out of the whole of x, which a mesh
    divides."""
    divided = jax.sharding.get_abstract_mesh().size > 1
    few = divided or kernel.shape[3] <= FEW_CHANNELS
    return (by_frames if few else by_pieces)(x, kernel, stride)


def by_frames(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """The convolution of a padded x as a sum, in float32, of one 2-D convolution for each of the
    kernel's frames."""
    layout = ("NHWC", "HWIO", "NHWC")
    step = stride[0]
    last = x.shape[1] - kernel.shape[0]
    frames = [x[:, i : i + last + 1 : step] for i in range(kernel.shape[0])]
    out = sum(
        jax.lax.conv_general_dilated(
            rearrange(frame, "b t h w c -> (b t) h w c"),
            plane,
            stride[1:],
            "VALID",
            dimension_numbers=layout,
            preferred_element_type=jnp.float32,
        )
        for frame, plane in zip(frames, kernel, strict=True)
    )
    return rearrange(out, "(b t) h w c -> b t h w c", b=x.shape[0]).astype(x.dtype)


def by_pieces(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """The convolution of a padded x, some rows of a frame at a time, so few that they stay in the
    cache: one matrix product a tap of the kernel, summed in float32."""
    size, features = kernel.shape[:3], kernel.shape[-1]
    sides = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:4], size, stride, strict=True)]
    pieces = _Pieces(x.shape[0], *sides, max(kernel.shape[3:]))
    kernel = kernel.astype(jnp.float32)

    def piece(number: jax.Array) -> jax.Array:
        taps = pieces.taps(x, number, size, stride)
        return sum(tap @ kernel[place] for place, tap in taps).astype(x.dtype)

    out = jax.lax.map(piece, jnp.arange(pieces.count))
    return out.reshape(x.shape[0], *sides, features)


class _Pieces(NamedTuple):
    """An output (B, T, H, W, channels) cut into bands of rows, in the order of memory."""

    batch: int
    frames: int
    height: int
    width: int
    channels: int

    @property
    def rows(self) -> int:
        """Of a piece: the most that divide the height and fit into `PIECE_BYTES`."""
        row = 4 * self.width * self.channels
        fitting = (r for r in range(1, self.height + 1) if self.height % r == 0)
        return max((r for r in fitting if r * row <= PIECE_BYTES), default=1)

    @property
    def count(self) -> int:
        return self.batch * self.frames * self.height // self.rows

    def taps(
        self, x: jax.Array, number: jax.Array, kernel: Size, stride: Stride
    ) -> Iterator[tuple[Size, jax.Array]]:
        """For each place in the kernel, what of a padded x it meets in a piece, (rows, W, C)
        float32."""
        clip, band = jnp.divmod(number, self.height // self.rows)
        sample, frame = jnp.divmod(clip, self.frames)
        start = sample, frame * stride[0], band * self.rows * stride[1], 0, 0
        size = 1, kernel[0], (self.rows - 1) * stride[1] + kernel[1], *x.shape[3:]
        part = jax.lax.dynamic_slice(x, start, size)[0].astype(jnp.float32)
        for t, h, w in itertools.product(*map(range, kernel)):
            height = slice(h, h + (self.rows - 1) * stride[1] + 1, stride[1])
            width = slice(w, w + (self.width - 1) * stride[2] + 1, stride[2])
            yield (t, h, w), part[t, height, width]
