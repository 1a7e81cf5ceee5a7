"""Read images as sRGB, resize and crop them, write PNG.

Shapes: H W rows and columns. Images are (H, W, 3) uint8 sRGB.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from framepack_jax.utils.files import atomic_write
from framepack_jax.video import colour

MIN_SIDE = 16
"""Minimum length of the shorter side of an image in pixels: two latent pixels."""
MAX_ASPECT = 32
"""Maximum ratio of the longer to the shorter side: the crop to a video's shape keeps too little of
longer images."""
MAX_PIXELS = 2**28
"""Maximum number of pixels of an image, 268 million (0.8 GB). Phones make 200 million."""
# Pillow raises all of these for damaged files (TypeError for TIFF, RuntimeError for AVIF).
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    RuntimeError,
    Image.DecompressionBombError,
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
BITS_PER_SAMPLE = 258  # TIFF's tag
# Values of PNG's gAMA and cHRM (white, red, green, blue) for sRGB.
SRGB_GAMMA = 0.45455
SRGB_CHROMATICITIES = 0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06


def load_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 sRGB, rotated by its EXIF orientation.

    Colours are converted by the file's ICC profile, or by PNG's cICP, gAMA and cHRM. A damaged
    profile, or one for another colour space, is ignored with a warning. Transparent pixels are
    blended with white, because their stored colours are arbitrary and often black. Images with more
    than 8 bits keep the upper eight. An animation gives its first frame.

    Raises ValueError if the file is not an image. Also raises ValueError, before decoding, if a
    side is below MIN_SIDE pixels, the aspect above MAX_ASPECT, or the area above MAX_PIXELS.
    """
    _register_heif()
    with contextlib.ExitStack() as stack:
        with _named(path), _unlimited():
            image = stack.enter_context(Image.open(path))
        _check_size(path, *image.size)
        with _named(path):
            return _upright_rgb(path, image)


def resize_center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (H, W, 3) uint8 to cover height x width, and crop its centre.

    Rounding follows the released sampler. An image of that size is returned unchanged.
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
    """Write (H, W, 3) uint8 to `path`. Raises OSError with the path if writing fails."""
    try:
        with atomic_write(path) as partial:
            # Five times as fast as Pillow's default level, for at most a fifth more bytes.
            Image.fromarray(image).save(partial, format="PNG", compress_level=1)
    except OSError as error:
        raise OSError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """Convert Pillow's errors for unreadable files to ValueError with the file's name."""
    try:
        yield
    except PILLOW_ERRORS as error:
        remedy = "give a PNG, JPEG or WebP file"
        if Path(path).suffix.lower() in HEIF_SUFFIXES and not _register_heif():
            remedy = "HEIC needs the extra heif: pip install pillow-heif"
        raise ValueError(f"image {os.fspath(path)} cannot be read ({error}); {remedy}") from error


@contextlib.contextmanager
def _unlimited() -> Iterator[None]:
    """Disable Pillow's limit on the image size; `_check_size` has its own limit."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _register_heif() -> bool:
    """Register HEIC, the format of iPhones, with Pillow if pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _check_size(path: str | os.PathLike, width: int, height: int) -> None:
    shorter, longer = sorted((width, height))
    if shorter < MIN_SIDE:
        problem = f"each side must have at least {MIN_SIDE} pixels; give a larger image"
    elif longer > MAX_ASPECT * shorter:
        problem = (
            f"the longer side may be at most {MAX_ASPECT} times the shorter, because a video shows"
            " only the centre; crop the image"
        )
    elif width * height > MAX_PIXELS:
        problem = f"the maximum is {MAX_PIXELS // 10**6} million pixels; scale it down"
    else:
        return
    raise ValueError(
        f"image {os.fspath(path)} is {width} x {height} pixels (width x height); {problem}"
    )


def _upright_rgb(path: str | os.PathLike, image: Image.Image) -> np.ndarray:
    # In place and without needless conversions, to avoid copies of large photographs.
    encoding = None if "icc_profile" in image.info else _encoding(path, image)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("the range of its floating-point pixels is unknown")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    image = _by_profile(path, image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return pixels if encoding is None else _by_encoding(pixels, encoding)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert grey of 12, 16 or 32 bits to 8 bits. TIFF stores the depth; others are 16 bits."""
    tags = getattr(image, "tag_v2", {})
    (bits, *_) = tags.get(BITS_PER_SAMPLE, (16,))
    levels = np.asarray(image)
    levels = levels.view(np.uint32) if bits > 16 else levels.clip(0, 2**bits - 1)
    grey = Image.fromarray((levels >> (bits - 8)).astype(np.uint8))
    grey.info = image.info
    return grey


def _by_profile(path: str | os.PathLike, image: Image.Image) -> Image.Image:
    """Convert an image to sRGB by its ICC profile; keep its alpha channel."""
    data = image.info.get("icc_profile")
    if not data or image.mode == "1":
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        return _to_srgb(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        _warn_of_profile(path, error)
        return image


def _warn_of_profile(path: str | os.PathLike, error: Exception) -> None:
    warnings.warn(
        f"image {os.fspath(path)}: its colour profile is ignored ({error}); its colours may be"
        " wrong; save the image as sRGB",
        stacklevel=2,
    )


def _to_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    space = profile.profile.xcolor_space.strip()
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if space == "RGB" and image.mode != "CMYK":
        image = image.convert("RGB")
    elif space == "GRAY" and image.mode in ("L", "LA"):
        image = image.convert("L")
    elif space != image.mode:
        raise ValueError(f"the profile is for {space} colours, the image has {image.mode}")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    assert converted is not None  # None only if converted in place
    image = converted
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _encoding(path: str | os.PathLike, image: Image.Image) -> colour.Encoding | None:
    """Return the colour encoding of an image without a profile; None for sRGB.

    HEIC has nclx. PNG has cICP, else sRGB, else gAMA and cHRM.
    """
    if nclx := image.info.get("nclx_profile"):
        return colour.Encoding.of_codes(nclx["color_primaries"], nclx["transfer_characteristics"])
    if image.format != "PNG":
        return None
    if (codes := _cicp(path)) is not None:
        return colour.Encoding.of_codes(*codes)
    gamma = image.info.get("gamma")
    if "srgb" in image.info or gamma is None or not 0.1 < gamma < 10:
        return None
    white, *corners = _pairs(image.info.get("chromaticity", SRGB_CHROMATICITIES))
    try:
        colour.to_bt709((*corners, white))
    except ValueError as error:
        _warn_of_profile(path, error)
        return None
    if abs(gamma - SRGB_GAMMA) > 0.001:
        return colour.Encoding((*corners, white), gamma=1 / gamma)
    if np.allclose([white, *corners], _pairs(SRGB_CHROMATICITIES), rtol=0, atol=0.002):
        return None
    return colour.Encoding((*corners, white), colour.SRGB)


def _pairs(numbers: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _cicp(path: str | os.PathLike) -> tuple[int, int] | None:
    """Read (primaries, transfer function) from a PNG's cICP chunk, which Pillow ignores."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"cICP" and len(codes := file.read(2)) == 2:
                return codes[0], codes[1]
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _by_encoding(pixels: np.ndarray, encoding: colour.Encoding) -> np.ndarray:
    """Convert uint8 pixels to sRGB in blocks of rows, to limit the memory of float32 light."""
    result = np.empty_like(pixels)
    rows = max(1, 2**20 // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        band = colour.to_srgb(pixels[top : top + rows] / np.float32(255), encoding)
        result[top : top + rows] = np.round(band * 255)
    return result
