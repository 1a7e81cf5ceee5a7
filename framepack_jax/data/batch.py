"""What a training step takes: sections of clips with their packed context and conditions.

Shapes: B batch, w latent window, h w latent rows and columns, C latent channels, L rows of text.
"""

from typing import Any

from flax import struct

from framepack_jax.packing import PackedContext

LOST = -(1 << 31)


@struct.dataclass
class Batch:
    """`target` (B, w, h, w, C) and `context`, bfloat16; `text` (B, L, D), zero where `text_valid`
    (B, L) is False; `pooled` (B, D); `image` (B, tokens, D).

    `element` (B,) is the number of a sample in the endless stream of samples, whatever the number
    of hosts; `section` (B,) which section of its plan it is, 0 being made first, of `sections`
    (B,); `clip` (B,) the number of its record in the dataset; -1 - n of a sample that takes the
    place of record n, which cannot be read, and LOST where none can be read. All int32.
    """

    target: Any
    context: PackedContext
    text: Any
    text_valid: Any
    pooled: Any
    image: Any
    element: Any
    section: Any
    sections: Any
    clip: Any
