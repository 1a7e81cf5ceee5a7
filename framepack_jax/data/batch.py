"""Input of a training step: sections of clips with their packed context and conditions.

Shapes: B batch, w latent window, h w latent rows and columns, C latent channels, L text tokens.
"""

from typing import Any

from flax import struct

from framepack_jax.packing import PackedContext

LOST = -(1 << 31)
"""`Meta.clip` of a sample that stands for a batch that cannot be read."""
Array = Any
"""A NumPy array on the host, a `jax.Array` on the devices."""


@struct.dataclass
class Conditions:
    """Encoded prompts and start images: `text` (B, L, D), zero where `text_valid` (B, L) is False,
    `pooled` (B, D) and `image` (B, tokens, D), which are None if the bundle has no encoder for
    them."""

    text: Array
    text_valid: Array
    pooled: Array | None
    image: Array | None


@struct.dataclass
class Meta:
    """Origin of the samples, all (B,) int32.

    `element` is the number of a sample in the endless stream of samples, the same for any number of
    hosts. `section` is the number of the section in its plan, 0 being generated first, of
    `sections`. `clip` is the number of the record among those of all datasets; -1 - n for a sample
    that replaces the unreadable record n; LOST if no record can be read.
    """

    element: Array
    section: Array
    sections: Array
    clip: Array


@struct.dataclass
class Batch:
    """`target` (B, w, h, w, C) and `context` in bfloat16, with conditions and meta. `given` (B, F)
    bool of each context group tells which of its frames are the start image."""

    target: Array
    context: PackedContext
    given: tuple[Array, ...]
    conditions: Conditions
    meta: Meta
