"""The causal 3-D convolution of the video autoencoder, in one place so that it can be exchanged.

A frame sees itself and the frames before it: time is padded on the left only. All padding repeats
the border (HunyuanVideo, arXiv 2412.03603, section 4.1).

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import jax
import jax.numpy as jnp
from einops import rearrange


def causal_conv3d(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    stride: tuple[int, int, int] = (1, 1, 1),
) -> jax.Array:
    """Convolve x (B, T, H, W, C) with kernel (kt, kh, kw, C, C_out); kh and kw are odd.

    Returns (B, ceil(T / stride_t), ceil(H / stride_h), ceil(W / stride_w), C_out) in x's dtype.
    """
    kt, kh, kw = kernel.shape[:3]
    space = [(k // 2, k // 2) for k in (kh, kw)]
    x = jnp.pad(x, [(0, 0), (kt - 1, 0), *space, (0, 0)], mode="edge")
    # XLA's CPU backend runs a 3-D convolution of few channels up to nine times slower than three
    # 2-D ones.
    out = jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: by_frames(x, kernel, stride),
        default=lambda x, kernel: by_volume(x, kernel, stride),
    )
    return out + bias[None, None, None, None, :]


def by_volume(x: jax.Array, kernel: jax.Array, stride: tuple[int, int, int]) -> jax.Array:
    """The convolution of a padded x as one 3-D convolution."""
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, stride, "VALID", dimension_numbers=layout)


def by_frames(x: jax.Array, kernel: jax.Array, stride: tuple[int, int, int]) -> jax.Array:
    """The same as a sum, in float32, of one 2-D convolution for each of the kernel's frames."""
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
