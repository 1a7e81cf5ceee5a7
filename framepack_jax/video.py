"""Images and videos in and out: photographs, PNG, mp4, contact sheets, previews, cross-fades.

Files appear whole or not at all: they are written under another name in the same folder and
renamed at the end. Frames on the host are uint8 RGB.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image, ImageDraw, ImageFont, ImageOps

DEFAULT_CRF = 16
PREVIEW_BIAS = np.array([0.0259, -0.0192, -0.0761], np.float32)
PREVIEW_WEIGHT = np.array(
    [
        [-0.0395, -0.0331, 0.0445],
        [0.0696, 0.0795, 0.0518],
        [0.0135, -0.0945, -0.0282],
        [0.0108, -0.0250, -0.0765],
        [-0.0209, 0.0032, 0.0224],
        [-0.0804, -0.0254, -0.0639],
        [-0.0991, 0.0271, -0.0669],
        [-0.0646, -0.0422, -0.0400],
        [-0.0696, -0.0595, -0.0894],
        [-0.0799, -0.0208, -0.0375],
        [0.1166, 0.1627, 0.0962],
        [0.1165, 0.0432, 0.0407],
        [-0.2315, -0.1920, -0.1355],
        [-0.0270, 0.0401, -0.0821],
        [-0.0616, -0.0997, -0.0727],
        [0.0249, -0.0469, -0.1703],
    ],
    np.float32,
)
"""Latent channel -> RGB, the linear fit to HunyuanVideo's VAE that the released sampler shows."""


def load_image(path: str | os.PathLike) -> np.ndarray:
    """The image file at `path` as (H, W, 3) uint8 RGB, turned upright as its EXIF data say.

    Transparent images are laid on white: the colours stored under transparent pixels are arbitrary
    and often black. 16-bit greyscale keeps its upper byte. Raises ValueError for what is no image.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("its floating-point pixels have no known range")
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {os.fspath(path)} cannot be read ({error}); give a PNG, JPEG or WebP file"
        ) from error


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
    """Write (H, W, 3) uint8 to `path`."""
    with _whole(path) as partial:
        Image.fromarray(image).save(partial, format="PNG")


def check_encoding(fps: float, crf: int) -> None:
    """Raise ValueError for what `write_mp4` would refuse, before there are any frames."""
    if not 1 <= crf <= 51:
        raise ValueError(f"crf is {crf}; give 1 (best) to 51 (smallest), usually {DEFAULT_CRF}")
    if fps <= 0:
        raise ValueError(f"fps is {fps}; give frames per second above 0, usually 30")


def write_mp4(
    path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, crf: int = DEFAULT_CRF
) -> None:
    """Encode uint8 frames (H, W, 3), an array (T, H, W, 3) or an iterator, as H.264 yuv420p.

    Colours are converted by BT.709 in the limited range, and tagged so: without tags, players
    guess from the size of the picture. Raises ValueError for crf outside 1..51 (0 is a lossless
    profile that players refuse), fps of 0 or less, no frames, and frames of odd or changing shape.
    """
    check_encoding(fps, crf)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"there are no frames to write to {os.fspath(path)}")
    shape = np.shape(first)
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"frames are {shape}; mp4 needs (H, W, 3) with an even height and width")
    with _whole(path) as partial, _h264(partial, shape[:2], fps, crf) as encode:
        encode(_yuv(first, shape))
        for frame in frames:
            encode(_yuv(frame, shape))


def read_mp4(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Frames (T, H, W, 3) uint8 RGB of a video file, and its frames per second.

    Raises ValueError where the file is no video that can be decoded.
    """
    try:
        with av.open(os.fspath(path)) as container:
            rate = container.streams.video[0].average_rate
            frames = [
                frame.reformat(format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
                for frame in container.decode(video=0)
            ]
        if not frames or not rate:
            raise ValueError(f"{len(frames)} frames at rate {rate}")
        return np.stack(frames), float(rate)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(
            f"video {os.fspath(path)} cannot be read ({error}); give a whole mp4 file"
        ) from error


def contact_sheet(
    frames: np.ndarray, fps: float, columns: int = 4, rows: int = 3, cell_width: int = 320
) -> np.ndarray:
    """A sheet (H', W', 3) uint8 of frames (T, H, W, 3), from first to last at even distances.

    Each carries its time in seconds. There are fewer rows where there are fewer frames.
    """
    cells = min(columns * rows, len(frames))
    columns = min(columns, cells)
    picks = np.linspace(0, len(frames) - 1, cells).round().astype(int)
    height, width = frames.shape[1:3]
    size, gap, strip = (cell_width, max(1, round(height * cell_width / width))), 6, 20
    pitch = size[0] + gap, size[1] + gap + strip
    sheet = Image.new(
        "RGB", (columns * pitch[0] + gap, -(-cells // columns) * pitch[1] + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for cell, pick in enumerate(picks):
        x, y = gap + cell % columns * pitch[0], gap + cell // columns * pitch[1]
        thumbnail = Image.fromarray(frames[pick]).resize(size, Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (x, y))
        label = f"{pick / fps:.2f} s"
        draw.text((x, y + size[1] + 3), label, fill="black", font=ImageFont.load_default(13))
    return np.asarray(sheet)


def latent_preview(latents: np.ndarray) -> np.ndarray:
    """A rough picture of scaled latents (..., 16): RGB (..., 3) float32 in [0, 1], no VAE."""
    latents = np.asarray(latents, np.float32)
    return np.clip(latents @ PREVIEW_WEIGHT + PREVIEW_BIAS, 0.0, 1.0)


def cross_fade(earlier: jax.Array, later: jax.Array, overlap: int, axis: int = 1) -> jax.Array:
    """Join two clips along `axis`, the last `overlap` frames of one over the first of the other.

    There the earlier clip's weight falls linearly from 1 to 0, both included. Returns the dtype of
    `earlier`. Raises ValueError where a clip is shorter than the overlap.
    """
    shortest = min(earlier.shape[axis], later.shape[axis])
    if not 1 <= overlap <= shortest:
        raise ValueError(f"overlap is {overlap} frames; it must be 1 to {shortest}, the short clip")
    ends = jnp.split(earlier, [earlier.shape[axis] - overlap], axis)
    starts = jnp.split(later, [overlap], axis)
    shape = [1] * earlier.ndim
    shape[axis] = overlap
    weight = jnp.linspace(1.0, 0.0, overlap).reshape(shape)
    blend = weight * ends[1] + (1.0 - weight) * starts[0]
    return jnp.concatenate([ends[0], blend.astype(earlier.dtype), starts[1]], axis)


@contextlib.contextmanager
def _whole(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write to that becomes `path` at the end, or disappears on an error."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _h264(path: Path, size: tuple[int, int], fps: float, crf: int):
    """An encoder into the mp4 file `path`: a function that takes one yuv420p frame."""
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        yield lambda frame: container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _yuv(frame: np.ndarray, shape: tuple[int, ...]) -> av.VideoFrame:
    """An RGB frame of `shape` as the encoder wants it."""
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.shape != shape:
        raise ValueError(f"frame is {frame.dtype} {frame.shape}, expected uint8 {shape}")
    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
    )
