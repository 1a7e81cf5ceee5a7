"""Aspect buckets: canvas sizes of a model, and the choice of one for an image.

The buckets are those of the released FramePack sampler. All sides are multiples of 32 (8 of the
VAE times 4 of the 2x context kernel) and the areas differ by few percent, so one batch size and
one noise schedule serve all of them.
"""

from collections.abc import Sequence

BUCKETS_480P: tuple[tuple[int, int], ...] = (
    (416, 960),
    (448, 864),
    (480, 832),
    (512, 768),
    (544, 704),
    (576, 672),
    (608, 640),
    (640, 608),
    (672, 576),
    (704, 544),
    (768, 512),
    (832, 480),
    (864, 448),
    (960, 416),
)
"""(height, width) in pixels, by growing height."""


def find_bucket(
    height: int, width: int, buckets: Sequence[tuple[int, int]] = BUCKETS_480P
) -> tuple[int, int]:
    """Return the bucket (height, width) of nearest aspect: smallest |height bw - width bh|.

    A tie goes to the later bucket, so a square image becomes (640, 608). Raises ValueError if the
    image has no area.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image is {height}x{width} pixels; both sides must be at least 1")
    return min(reversed(buckets), key=lambda b: abs(height * b[1] - width * b[0]))
