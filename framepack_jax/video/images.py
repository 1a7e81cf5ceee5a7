"""Still images in and out: any photograph as RGB, resize and crop, PNG.

Shapes: H W rows and columns. Images are (H, W, 3) uint8 RGB.
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from framepack_jax.video.files import whole

MIN_SIDE = 16
"""Fewest pixels of an image's shorter side: two latent pixels."""
MAX_ASPECT = 32
"""Longer over shorter side, at most: of more, cropping to a video's shape leaves next to nothing.
"""
# Pillow's decoders of damaged files raise all of these (TypeError TIFF, RuntimeError AVIF).
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    RuntimeError,
    Image.DecompressionBombError,
)


def load_image(path: str | os.PathLike) -> np.ndarray:
    """The image file at `path` as (H, W, 3) uint8 RGB, turned upright as its EXIF data say.

    Transparent images are laid on white: the colours stored under transparent pixels are arbitrary
    and often black. 16 bits keep their upper byte. Of an animation, the first frame is taken.
    Raises ValueError for what is no image, and for images with a side below MIN_SIDE pixels, of an
    aspect above MAX_ASPECT, or of more pixels than Pillow opens; their pixels are not read.
    """
    with contextlib.ExitStack() as stack:
        with _named(path):
            image = stack.enter_context(Image.open(path))
        _check_size(path, *image.size)
        with _named(path):
            return _upright_rgb(image)


def resize_center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (H, W, 3) uint8 to cover height x width, and cut the middle out of it.

    The rounding is the released sampler's; an image of that size already comes back untouched.
    """
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    scale = max(width / columns, height / rows)
    size = round(columns * scale), round(rows * scale)
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 to `path`. Raises OSError with its name where that cannot be."""
    try:
        with whole(path) as partial:
            Image.fromarray(image).save(partial, format="PNG")
    except OSError as error:
        raise OSError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """What Pillow raises for files that it cannot read, as ValueError with the file's name."""
    try:
        yield
    except PILLOW_ERRORS as error:
        raise ValueError(
            f"image {os.fspath(path)} cannot be read ({error}); give a PNG, JPEG or WebP file"
        ) from error


def _check_size(path: str | os.PathLike, width: int, height: int) -> None:
    shorter, longer = sorted((width, height))
    if shorter < MIN_SIDE:
        problem = f"each side must have at least {MIN_SIDE} pixels; give a larger image"
    elif longer > MAX_ASPECT * shorter:
        problem = (
            f"the longer side may be at most {MAX_ASPECT} times the shorter, since a video shows"
            " only the middle; crop it to the part that matters"
        )
    else:
        return
    raise ValueError(
        f"image {os.fspath(path)} is {width} x {height} pixels (width x height); {problem}"
    )


def _upright_rgb(image: Image.Image) -> np.ndarray:
    # In place, and no conversion without need: large photographs are copied often enough.
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its floating-point pixels have no known range")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
