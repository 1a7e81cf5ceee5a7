"""The 3-D convolution of the video autoencoders, and HunyuanVideo's causal form of it.

In the causal form a frame sees itself and the frames before it: time is padded on the left only.
All padding repeats the border (HunyuanVideo, arXiv 2412.03603, section 4.1).

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

Stride = tuple[int, int, int]
Size = tuple[int, int, int]
# Up to these channels XLA's convolutions are as fast on a CPU as matrix products.
MAX_CONV_CHANNELS = 16
# Output of one piece on a CPU, which fits into a core's cache.
PIECE_BYTES = 1 << 19


def causal_conv3d(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: Stride = (1, 1, 1)
) -> jax.Array:
    """Convolve x (B, T, H, W, C) with kernel (kt, kh, kw, C, C_out); kh and kw are odd.

    Returns (B, ceil(T / stride_t), ceil(H / stride_h), ceil(W / stride_w), C_out) in x's dtype.
    """
    return conv3d(_padded(x, _size(kernel)), kernel, bias, stride)


@functools.partial(jax.jit, static_argnames="stride")  # each shape is traced once in a network
def conv3d(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: Stride = (1, 1, 1)
) -> jax.Array:
    """Convolve x (B, T, H, W, C) with kernel (kt, kh, kw, C, C_out), without padding.

    Returns (B, (T - kt) // stride_t + 1, (H - kh) // stride_h + 1, (W - kw) // stride_w + 1, C_out)
    in x's dtype.
    """
    out = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: on_cpu(x, kernel, stride),
        default=lambda x, kernel: by_volume(x, kernel, stride),
    )
    return out + bias[None, None, None, None, :]


def by_volume(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """Convolve a padded x by one 3-D convolution."""
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, stride, "VALID", dimension_numbers=layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def on_cpu(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """Convolve a padded x by operations that are fast on a CPU.

    There XLA's convolutions of many channels, and all their gradients, run at a tenth of the speed
    of matrix products.
    """
    return _valid(x, kernel, stride)


def _forward(x: jax.Array, kernel: jax.Array, stride: Stride) -> Any:
    return on_cpu(x, kernel, stride), (x, kernel)


def _backward(stride: Stride, inputs: tuple[jax.Array, jax.Array], dy: jax.Array) -> Any:
    """Differentiate `on_cpu`.

    The gradient of x is the convolution of dy, dilated by the stride, with the flipped kernel; that
    of the kernel is one matrix product for each piece and tap.
    """
    x, kernel = inputs
    size = _size(kernel)
    # Cells at the end that no stride reaches were never read.
    unread = [n - (m - 1) * s - k for n, m, s, k in
              zip(x.shape[1:4], dy.shape[1:4], stride, size, strict=True)]  # fmt: skip
    around = [(k - 1, k - 1 + rest, s - 1) for k, rest, s in zip(size, unread, stride, strict=True)]
    spread = jax.lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    turned = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    dx = _valid(spread, turned, (1, 1, 1))

    batch, frames, height, width, _ = dy.shape
    pieces = _Pieces(batch, frames, height, width, max(kernel.shape[3:]))
    parts = dy.reshape(pieces.count, -1, dy.shape[-1])

    def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        part = parts[number].astype(jnp.float32)
        taps = pieces.taps(x, number, size, stride)
        products = [rearrange(tap, "h w c -> c (h w)") @ part for _, tap in taps]
        return total + jnp.stack(products).reshape(kernel.shape), None

    zeros = jnp.zeros(kernel.shape, jnp.float32)
    dkernel, _ = jax.lax.scan(add, zeros, jnp.arange(pieces.count))
    return dx, dkernel.astype(kernel.dtype)


on_cpu.defvjp(_forward, _backward)


def _size(kernel: jax.Array) -> Size:
    """Return the kernel's (frames, rows, columns)."""
    frames, rows, columns, *_ = kernel.shape
    return frames, rows, columns


def _padded(x: jax.Array, size: Size) -> jax.Array:
    margins = [(size[0] - 1, 0), *((k // 2, k // 2) for k in size[1:])]
    return jnp.pad(x, [(0, 0), *margins, (0, 0)], mode="edge")


def _valid(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """Convolve a padded x on a CPU."""
    # Pieces are cut out of all of x, which a mesh divides.
    divided = jax.sharding.get_abstract_mesh().size > 1
    few = divided or kernel.shape[3] <= MAX_CONV_CHANNELS
    return (by_frames if few else by_pieces)(x, kernel, stride)


def by_frames(x: jax.Array, kernel: jax.Array, stride: Stride) -> jax.Array:
    """Convolve a padded x by a 2-D convolution for each frame of the kernel, summed in float32."""
    layout = ("NHWC", "HWIO", "NHWC")
    step = stride[0]
    last = x.shape[1] - kernel.shape[0]
    frames = [x[:, i : i + last + 1 : step] for i in range(kernel.shape[0])]
    out: Any = sum(
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
    """Convolve a padded x, a band of rows of a frame at a time that fits into the cache.

    Each tap of the kernel is one matrix product; they are summed in float32.
    """
    size, features = _size(kernel), kernel.shape[-1]
    sides = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:4], size, stride, strict=True)]
    frames, height, width = sides
    pieces = _Pieces(x.shape[0], frames, height, width, max(kernel.shape[3:]))
    kernel = kernel.astype(jnp.float32)

    def piece(number: jax.Array) -> jax.Array:
        taps = pieces.taps(x, number, size, stride)
        total: Any = sum(tap @ kernel[place] for place, tap in taps)
        return total.astype(x.dtype)

    out = jax.lax.map(piece, jnp.arange(pieces.count))
    return out.reshape(x.shape[0], *sides, features)


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """An output (B, T, H, W, channels) cut into bands of rows, in the order of memory."""

    batch: int
    frames: int
    height: int
    width: int
    channels: int

    @property
    def rows(self) -> int:
        """Return the rows of a piece: the most that divide the height and fit `PIECE_BYTES`."""
        row = 4 * self.width * self.channels
        fitting = (r for r in range(1, self.height + 1) if self.height % r == 0)
        return max((r for r in fitting if r * row <= PIECE_BYTES), default=1)

    @property
    def count(self) -> int:
        return self.batch * self.frames * self.height // self.rows

    def taps(
        self, x: jax.Array, number: jax.Array, kernel: Size, stride: Stride
    ) -> Iterator[tuple[Size, jax.Array]]:
        """Yield for each place in the kernel the cells of a padded x that it meets in a piece,
        (rows, W, C) float32."""
        clip, band = jnp.divmod(number, self.height // self.rows)
        sample, frame = jnp.divmod(clip, self.frames)
        start = sample, frame * stride[0], band * self.rows * stride[1], 0, 0
        size = 1, kernel[0], (self.rows - 1) * stride[1] + kernel[1], *x.shape[3:]
        part = jax.lax.dynamic_slice(x, start, size)[0].astype(jnp.float32)
        last = [(n - 1) * s + 1 for n, s in zip((self.rows, self.width), stride[1:], strict=True)]
        for t, h, w in itertools.product(*map(range, kernel)):
            # Traced three times as fast as part[t, h:..., w:...].
            stop = t + 1, h + last[0], w + last[1], part.shape[3]
            tap = jax.lax.slice(part, (t, h, w, 0), stop, (1, *stride[1:], 1))
            yield (t, h, w), tap.reshape(tap.shape[1:])
