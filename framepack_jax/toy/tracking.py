"""Track coloured sprites through a video, and check that they keep colour, form and size.

Sprites are found by colour alone, so a sprite that changes its form is still tracked.

Shapes: P frames, S sprites, K colours of the palette, H W rows and columns. Frames are (H, W, 3)
uint8; positions are (x, y) in pixels, with the centre of the first pixel at (0.5, 0.5).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

BACKGROUND = -1
WITHIN = 70.0
"""Maximum distance of a pixel from its nearest palette colour, in levels of RGB."""
PRESENT = 0.25
"""Minimum area of a sprite's colour, as a fraction of its template; with less, it is missing."""
PIECE = 0.25
"""Minimum area of a connected piece, as a fraction of the largest one."""
CLEAR = 0.9
"""Minimum visible fraction of a sprite in the ground truth for its identity to be judged."""
OPEN = 0.5
"""Minimum fraction of a sprite inside the picture and not under other sprites for its form to be
judged."""
ALIKE = 0.5
"""Minimum intersection over union with the template of the sprite's form and size."""
EVERY = 5
"""Interval in frames at which forms are compared, the slowest part of tracking."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sprites:
    """The sprites of a video.

    Args:
        palette: all colours, (K, 3).
        colours: index into the palette for each sprite.
        shapes: key into the templates for each sprite.
        templates: bool masks (h, w) with odd sides, centred on the sprite.
    """

    palette: np.ndarray
    colours: tuple[int, ...]
    shapes: tuple[str, ...]
    templates: Mapping[str, np.ndarray]


class Tracks(NamedTuple):
    """Tracks of sprites.

    `centres` (P, S, 2) are nan if a sprite is missing; `present` (P, S) is bool. `identity` (P, S)
    is 1 if a sprite has its colour, form and size, 0 if not or if it is missing, nan if not judged.
    """

    centres: np.ndarray
    present: np.ndarray
    identity: np.ndarray


def track(
    frames: Iterable[np.ndarray], cast: Sprites, visible: np.ndarray, every: int = EVERY
) -> Tracks:
    """Track sprites through a video.

    `visible` (P, S) is the visible fraction of each sprite in the ground truth. Identity is judged
    in one of `every` frames, for sprites that are visible by at least `CLEAR`.
    """
    centres, present, identity = [], [], []
    last = [(math.nan, math.nan)] * len(cast.colours)
    for number, (frame, sight) in enumerate(zip(frames, visible, strict=True)):
        masks = [pieces(labels) for labels in _by_colour(frame, cast)]
        there = [
            mask.sum() >= PRESENT * cast.templates[shape].sum()
            for mask, shape in zip(masks, cast.shapes, strict=True)
        ]
        places = [
            centre(mask) if found else (math.nan, math.nan)
            for mask, found in zip(masks, there, strict=True)
        ]
        last = [
            now if found else then for now, then, found in zip(places, last, there, strict=True)
        ]
        row = [math.nan] * len(masks)
        for sprite in np.flatnonzero(sight >= CLEAR) if number % every == 0 else ():
            hidden = functools.reduce(
                np.logical_or,
                [mask for i, mask in enumerate(masks) if i != sprite],
                np.zeros_like(masks[0]),
            )
            shape = cast.shapes[sprite]
            if there[sprite]:
                row[sprite] = is_itself(masks[sprite], hidden, shape, cast.templates)
            else:
                row[sprite] = _gone(last[sprite], hidden, cast.templates[shape])
        centres.append(places)
        present.append(there)
        identity.append(row)
    return Tracks(
        np.asarray(centres, np.float32), np.asarray(present, bool), np.asarray(identity, np.float32)
    )


def _by_colour(frame: np.ndarray, cast: Sprites) -> list[np.ndarray]:
    labels = label(frame, cast.palette)
    return [labels == colour for colour in cast.colours]


def _gone(last: tuple[float, float], hidden: np.ndarray, template: np.ndarray) -> float:
    """Return the identity of a missing sprite: 0; nan if others may cover its `last` position."""
    if math.isnan(last[0]):
        return 0.0
    half = np.asarray(template.shape) // 2
    corner = int(last[1]) - half[0], int(last[0]) - half[1]
    covered = _crop(hidden, *corner, template.shape) & template
    return math.nan if covered.sum() > (1 - OPEN) * template.sum() else 0.0


def label(frame: np.ndarray, palette: np.ndarray, within: float = WITHIN) -> np.ndarray:
    """Label each pixel (H, W) with the index of its palette colour, or BACKGROUND."""
    distances = np.linalg.norm(frame[:, :, None].astype(np.float32) - palette[None, None], axis=-1)
    nearest = distances.argmin(axis=-1)
    return np.where(distances.min(axis=-1) < within, nearest, BACKGROUND)


def pieces(mask: np.ndarray) -> np.ndarray:
    """Remove stray pixels from a mask (H, W).

    Keep the largest connected piece and pieces of similar size, since another sprite may divide it.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 3:
        return mask
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = 1 + np.flatnonzero(areas >= PIECE * areas.max())
    return np.isin(labels, kept)


def centre(mask: np.ndarray) -> tuple[float, float]:
    """Return the centroid (x, y) of a non-empty mask (H, W)."""
    rows, columns = np.nonzero(mask)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def is_itself(
    mask: np.ndarray, hidden: np.ndarray, shape: str, templates: Mapping[str, np.ndarray]
) -> float:
    """Return 1 if a mask (H, W) fits its own template best, by at least ALIKE, else 0.

    Pixels `hidden` (H, W) under other sprites or outside the picture do not count. Return nan if
    less than OPEN of the template remains.
    """
    found = {name: overlap(mask, ~hidden, template) for name, template in templates.items()}
    if found[shape].open < OPEN:
        return math.nan
    best = max(found, key=lambda name: found[name].iou)
    return float(best == shape and found[best].iou >= ALIKE)


class Overlap(NamedTuple):
    """Intersection over union at the best position, and the template's visible fraction there."""

    iou: float
    open: float


def overlap(mask: np.ndarray, seen: np.ndarray, template: np.ndarray) -> Overlap:
    """Match a mask (H, W) with a template (h, w) near it; only pixels in `seen` (H, W) count."""
    x, y = centre(mask)
    half = np.asarray(template.shape) // 2
    # The centroid of a half-covered sprite is off its centre.
    reach = max(2, int(half.max()) // 2)
    top, left = int(y) - half[0] - reach, int(x) - half[1] - reach
    size = template.shape[0] + 2 * reach, template.shape[1] + 2 * reach
    mine, counting, form = (
        area.astype(np.float32)
        for area in (_crop(mask & seen, top, left, size), _crop(seen, top, left, size), template)
    )
    both = cv2.matchTemplate(mine, form, cv2.TM_CCORR)
    open_ = cv2.matchTemplate(counting, form, cv2.TM_CCORR)
    iou = both / np.maximum((mask & seen).sum() + open_ - both, 1)
    best = np.unravel_index(iou.argmax(), iou.shape)
    return Overlap(float(iou[best]), float(open_[best] / form.sum()))


def _crop(area: np.ndarray, top: int, left: int, size: Sequence[int]) -> np.ndarray:
    """Crop a window from a bool area (H, W), padded with False."""
    window = np.zeros(tuple(size), bool)
    rows = slice(max(0, top), max(0, min(area.shape[0], top + size[0])))
    columns = slice(max(0, left), max(0, min(area.shape[1], left + size[1])))
    part = area[rows, columns]
    at = rows.start - top, columns.start - left
    window[at[0] : at[0] + part.shape[0], at[1] : at[1] + part.shape[1]] = part
    return window
