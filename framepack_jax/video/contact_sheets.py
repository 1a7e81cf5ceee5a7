"""Contact sheets and GIFs of videos, and previews of latents without the VAE.

Shapes: T frames, F latent frames, H W rows and columns. Pictures are (H, W, 3) uint8 RGB.
"""

import functools
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np
from einops import repeat
from PIL import Image, ImageDraw, ImageFont

from framepack_jax.utils.files import atomic_write
from framepack_jax.video.decode import mp4_info, read_frames, read_frames_at

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
"""Linear map from latent channels to RGB in [-1, 1], fitted to HunyuanVideo's VAE; from the
released sampler."""
PREVIEW_CELLS = 12
PREVIEW_COLUMNS = 4
PREVIEW_WIDTH = 160
"""Minimum width of a latent frame in a preview, in pixels."""
GIF_FPS = 20.0
"""Frame rate of GIFs. Their delays are whole hundredths of a second, so 30 is not possible."""
GAP, STRIP, FONT_SIZE = 6, 20, 13
"""Pixels between cells, height of a line of text, and font size."""


def contact_sheet(
    frames: np.ndarray, fps: float, columns: int = 4, rows: int = 3, cell_width: int = 320
) -> np.ndarray:
    """Return a contact sheet (H', W', 3) uint8 of frames (T, H, W, 3) at equal distances.

    Each frame is labelled with its time in seconds. Short videos give fewer rows.
    """
    picks = _picks(len(frames), columns * rows)
    return _frame_sheet((frames[pick] for pick in picks), picks, fps, columns, cell_width)


def contact_sheet_mp4(
    path: str | os.PathLike, columns: int = 4, rows: int = 3, cell_width: int = 320
) -> np.ndarray:
    """Return the `contact_sheet` of a video file. Only one full frame is in memory at a time.

    Raises ValueError if the file is not a readable video.
    """
    info = mp4_info(path)
    picks = _picks(info.frames, columns * rows)
    return _frame_sheet(read_frames_at(path, picks), picks, info.fps, columns, cell_width)


def save_gif(path: str | os.PathLike, source: str | os.PathLike) -> None:
    """Convert a video file to a GIF in an endless loop, at `GIF_FPS` frames per second.

    Raises ValueError if `source` is not a video, OSError if writing `path` fails.
    """
    frames = map(Image.fromarray, read_frames(source, GIF_FPS))
    with atomic_write(path) as partial:
        next(frames).save(
            partial, format="GIF", save_all=True, append_images=frames, loop=0,
            duration=round(1000 / GIF_FPS),
        )  # fmt: skip


def labelled_sheet(
    pictures: Sequence[np.ndarray], labels: Sequence[str], columns: int = 6
) -> np.ndarray:
    """Return a sheet (H', W', 3) uint8 of pictures of any size, each above its label.

    Labels are truncated to the width of their picture.
    """
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    cells = []
    for picture in pictures:
        cell = np.full((height, width, 3), 255, np.uint8)
        cell[: picture.shape[0], : picture.shape[1]] = picture
        cells.append(cell)
    fitting = [_shortened(label, width) for label in labels]
    return np.asarray(_grid(cells, fitting, columns, STRIP))


def _shortened(label: str, width: int) -> str:
    """Truncate a label to `width` pixels."""
    while label and _font().getlength(label) > width:
        label = label[:-1]
    return label


def latent_preview(latents: np.ndarray) -> np.ndarray:
    """Map scaled latents (..., 16) to RGB (..., 3) float32 in [0, 1], as the released sampler does.

    The released sampler clips the fit, with range [-1, 1], to [0, 1], so dark colours become black.
    """
    return np.clip(_fitted(latents), 0.0, 1.0)


def preview_sheet(
    latents: np.ndarray, caption: str, fit: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Return a preview sheet (H', W', 3) uint8 of normalised latents (F, H, W, C).

    `fit` are weights (C, 3) and bias (3,) from latents to colours in [-1, 1], by default those of
    HunyuanVideo's 16 channels.

    The sheet shows at most 12 latent frames at equal distances, each at least 160 pixels wide, with
    `caption` below. It takes milliseconds, because the VAE is not needed.
    """
    latents = np.asarray(latents)
    picked = latents[_picks(len(latents), PREVIEW_CELLS)]
    weight, bias = fit or (PREVIEW_WEIGHT, PREVIEW_BIAS)
    colours = (
        ((np.asarray(picked, np.float32) @ weight + bias + 1) * 127.5)
        .round()
        .clip(0, 255)
        .astype(np.uint8)
    )
    scale = -(-PREVIEW_WIDTH // colours.shape[2])
    cells = repeat(colours, "f h w c -> f (h i) (w j) c", i=scale, j=scale)
    grid = _grid(list(cells), [""] * len(cells), PREVIEW_COLUMNS, strip=0)
    width = max(grid.width, 2 * GAP + math.ceil(_font().getlength(caption)))
    sheet = Image.new("RGB", (width, grid.height + STRIP), "white")
    sheet.paste(grid, (0, 0))
    _write(sheet, (GAP, grid.height), caption)
    return np.asarray(sheet)


def _picks(count: int, cells: int) -> list[int]:
    """Return at most `cells` indices below `count`, from first to last at equal distances."""
    return np.linspace(0, count - 1, min(cells, count)).round().astype(int).tolist()


def _frame_sheet(
    frames: Iterable[np.ndarray], picks: Sequence[int], fps: float, columns: int, cell_width: int
) -> np.ndarray:
    thumbnails = []
    for frame in frames:
        height, width = frame.shape[:2]
        size = cell_width, max(1, round(height * cell_width / width))
        thumbnails.append(np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)))
    return np.asarray(_grid(thumbnails, [f"{pick / fps:.2f} s" for pick in picks], columns, STRIP))


def _grid(
    cells: Sequence[np.ndarray], labels: Sequence[str], columns: int, strip: int
) -> Image.Image:
    """Arrange pictures of equal size in rows on white, each above its label."""
    columns = min(columns, len(cells))
    height, width = cells[0].shape[:2]
    pitch = width + GAP, height + GAP + strip
    size = columns * pitch[0] + GAP, -(-len(cells) // columns) * pitch[1] + GAP
    sheet = Image.new("RGB", size, "white")
    for number, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        x, y = GAP + number % columns * pitch[0], GAP + number // columns * pitch[1]
        sheet.paste(Image.fromarray(cell), (x, y))
        _write(sheet, (x, y + height + 3), label)
    return sheet


def _fitted(latents: np.ndarray) -> np.ndarray:
    """Map scaled latents (..., 16) to RGB (..., 3) float32, about [-1, 1]."""
    return np.asarray(latents, np.float32) @ PREVIEW_WEIGHT + PREVIEW_BIAS


def _write(sheet: Image.Image, place: tuple[int, int], text: str) -> None:
    ImageDraw.Draw(sheet).text(place, text, fill="black", font=_font())


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)
