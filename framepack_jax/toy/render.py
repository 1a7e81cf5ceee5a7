"""Render the toy world: muted moving textures, sprites with soft edges, grey walls.

The colours of textures and walls are far from those of sprites, so sprites are found by colour.
Positions and lengths are in picture heights; H W are rows and columns.
"""

import math

import numpy as np

COLOURS = {
    "red": (220, 40, 40), "green": (30, 170, 60), "blue": (40, 80, 225), "yellow": (245, 215, 30),
    "purple": (150, 40, 190), "orange": (250, 135, 20), "cyan": (40, 205, 225),
    "white": (250, 250, 250),
}  # fmt: skip
FORMS = ("circle", "square", "triangle", "ring")
# Half the width of each form, as a fraction of its radius.
HALF_WIDTHS = {"circle": 1.0, "square": 0.86, "triangle": 0.866, "ring": 1.0}
WALL = (88, 88, 92)
# Waves per texture, their maximum number of periods over twice the picture, and their amplitude.
WAVES, HIGHEST, HEIGHT = 6, 7, 9.0
# Width of a soft edge, in pixels.
EDGE = 1.5
Box = tuple[slice, slice]


class Texture:
    """A sum of waves in muted colours, periodic over twice the picture's size."""

    def __init__(self, seed: tuple[int, ...], height: int, width: int) -> None:
        rng = np.random.default_rng(seed)
        grey = rng.uniform(105, 150)
        self.base = (grey + rng.uniform(-14, 14, 3)).astype(np.float32)
        numbers = rng.integers(1, HIGHEST + 1, (WAVES, 2)) * rng.choice([-1, 1], (WAVES, 2))
        # In radians per picture height; whole periods over twice the width and twice the height.
        self.waves = numbers * np.pi / np.asarray([width / height, 1.0])
        self.phases = rng.uniform(0, 2 * np.pi, WAVES)
        tint = rng.uniform(0.6, 1.0, (WAVES, 3)) * HEIGHT
        self.tint = tint.astype(np.float32)
        self.rows = (np.arange(height) + 0.5) / height
        self.columns = (np.arange(width) + 0.5) / height
        self._still: np.ndarray | None = None

    def seen(self, x: float, y: float) -> np.ndarray:
        """Render the view of a camera at (x, y) as a new array (H, W, 3) float32."""
        if self._still is None or x or y:
            across = self.waves[:, :1] * (self.columns + x)[None, :] + self.phases[:, None]
            down = self.waves[:, 1:] * (self.rows + y)[None, :]
            # sin(a + b) = sin(a) cos(b) + cos(a) sin(b), as one matrix product.
            parts = [np.sin(across), np.cos(across), np.sin(down), np.cos(down)]
            sin_a, cos_a, sin_d, cos_d = (part.astype(np.float32) for part in parts)
            down_parts = np.concatenate([cos_d, sin_d])  # (2 waves, H)
            across_parts = np.concatenate([sin_a, cos_a])  # (2 waves, W)
            tint = np.concatenate([self.tint, self.tint])
            weighted = across_parts[:, :, None] * tint[:, None, :]
            flat = down_parts.T @ weighted.reshape(2 * WAVES, -1)
            picture = self.base[None, None] + flat.reshape(len(self.rows), len(self.columns), 3)
            if x or y:
                return picture
            self._still = picture
        return self._still.copy()


def cover(
    form: str, radius: float, place: tuple[float, float], height: int, width: int
) -> tuple[Box, np.ndarray]:
    """Return (box of rows and columns around a sprite, covered fraction of each of its pixels)."""
    x, y = place[0] * height, place[1] * height
    reach = radius * height * 1.05 + EDGE
    rows = slice(max(0, math.floor(y - reach)), max(0, min(height, math.ceil(y + reach) + 1)))
    columns = slice(max(0, math.floor(x - reach)), max(0, min(width, math.ceil(x + reach) + 1)))
    down = (np.arange(rows.start, rows.stop) + 0.5 - y)[:, None]
    across = (np.arange(columns.start, columns.stop) + 0.5 - x)[None, :]
    distance = _distance(form, radius * height, across, down)
    return (rows, columns), np.clip(0.5 - distance / EDGE, 0, 1).astype(np.float32)


def _distance(form: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance to the border of a sprite at (0, 0), in pixels, negative inside."""
    match form:
        case "circle":
            return np.hypot(x, y) - radius
        case "ring":
            return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
        case "triangle":
            # (0, 0) is the centroid of the triangle.
            return np.maximum(np.abs(x) * 0.866 - y * 0.5, y) - 0.5 * radius
    raise ValueError(f"form {form!r}: expected one of {', '.join(FORMS)}")


def paint(picture: np.ndarray, box: Box, cover: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Blend a sprite into a picture (H, W, 3) float32, in place."""
    part = picture[box]
    part += cover[:, :, None] * (np.asarray(colour, np.float32)[None, None] - part)


def wall_cover(middle: float, wide: float, height: int, width: int) -> np.ndarray:
    """Return the fraction of each column that a vertical wall covers, (W,)."""
    columns = np.arange(width) + 0.5
    inside = wide / 2 * height - np.abs(columns - middle * height)
    return np.clip(inside + 0.5, 0, 1).astype(np.float32)


def paint_wall(picture: np.ndarray, middle: float, wide: float) -> None:
    """Blend a wall into a picture (H, W, 3) float32, in place."""
    cover = wall_cover(middle, wide, *picture.shape[:2])[None, :, None]
    picture += cover * (np.asarray(WALL, np.float32)[None, None] - picture)
