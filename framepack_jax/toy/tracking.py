"""Coloured shapes that are known by name: where they are in a video, and whether they are still
themselves. They are found by colour alone, so that a shape which became another one is still seen.

Shapes: P frames, S sprites, K colours of the palette, H W rows and columns. Frames are (H, W, 3)
uint8; places are (x, y) in pixels, the middle of the first pixel being (0.5, 0.5).
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
"""A pixel is of a colour when it is nearer than that, in levels of RGB, and to no other nearer."""
PRESENT = 0.25
"""Share of a sprite's area that must be seen of its colour, or the sprite is gone."""
PIECE = 0.25
"""Pieces smaller than that share of the largest one are stray pixels."""
CLEAR = 0.9
"""Share of a sprite that must be in sight in truth for it to be looked for."""
OPEN = 0.5
"""Share of a sprite that must lie neither outside of the picture nor under other sprites for its
form to be judged."""
ALIKE = 0.5
"""Least overlap, intersection over union, with the sprite's form and size."""
EVERY = 5
"""Forms are compared in one frame of so many: it takes longer than all else."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sprites:
    """Who is in a video: the sprites' `colours` as indices of the `palette` (K, 3), their `shapes`
    as keys of the `templates`, bool masks (h, w) of odd sides with the sprite's middle in the
    middle."""

    palette: np.ndarray
    colours: tuple[int, ...]
    shapes: tuple[str, ...]
    templates: Mapping[str, np.ndarray]


class Tracks(NamedTuple):
    """What is seen of sprites: `centres` (P, S, 2), nan where one is gone; `present` (P, S) bool;
    `identity` (P, S), 1 where a sprite has its colour, form and size, 0 where it has not or is
    gone, nan where that is not judged."""

    centres: np.ndarray
    present: np.ndarray
    identity: np.ndarray


def track(
    frames: Iterable[np.ndarray], cast: Sprites, visible: np.ndarray, every: int = EVERY
) -> Tracks:
    """Follow sprites through a video. `visible` (P, S) is the share of each that is in sight in
    truth: identity is judged where all of it is, in every frame of `every`."""
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
    """0 for a sprite that is not there; nan where others may cover it, at the `last` place where it
    was seen."""
    if math.isnan(last[0]):
        return 0.0
    half = np.asarray(template.shape) // 2
    corner = int(last[1]) - half[0], int(last[0]) - half[1]
    covered = _crop(hidden, *corner, template.shape) & template
    return math.nan if covered.sum() > (1 - OPEN) * template.sum() else 0.0


def label(frame: np.ndarray, palette: np.ndarray, within: float = WITHIN) -> np.ndarray:
    """The colour of each pixel (H, W) as an index of the palette, or BACKGROUND."""
    distances = np.linalg.norm(frame[:, :, None].astype(np.float32) - palette[None, None], axis=-1)
    nearest = distances.argmin(axis=-1)
    return np.where(distances.min(axis=-1) < within, nearest, BACKGROUND)


def pieces(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) without stray pixels: its largest connected piece, and those that are not
    much smaller, as of a sprite that another one divides."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 3:
        return mask
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = 1 + np.flatnonzero(areas >= PIECE * areas.max())
    return np.isin(labels, kept)


def centre(mask: np.ndarray) -> tuple[float, float]:
    """The middle (x, y) of a mask (H, W) that is not empty."""
    rows, columns = np.nonzero(mask)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def is_itself(
    mask: np.ndarray, hidden: np.ndarray, shape: str, templates: Mapping[str, np.ndarray]
) -> float:
    """1 where a mask (H, W) overlaps with its own template better than with any other, and by at
    least ALIKE; else 0. What lies `hidden` (H, W) under others or outside of the picture is left
    out; nan where that is too much."""
    found = {name: overlap(mask, ~hidden, template) for name, template in templates.items()}
    if found[shape].open < OPEN:
        return math.nan
    best = max(found, key=lambda name: found[name].iou)
    return float(best == shape and found[best].iou >= ALIKE)


class Overlap(NamedTuple):
    """Intersection over union at the best place, and the share of the template that is open
    there."""

    iou: float
    open: float


def overlap(mask: np.ndarray, seen: np.ndarray, template: np.ndarray) -> Overlap:
    """Of a mask (H, W) with a template (h, w) near it, where `seen` (H, W) tells what counts."""
    x, y = centre(mask)
    half = np.asarray(template.shape) // 2
    # A sprite half of which is covered has its middle somewhere else.
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
    """A window of an area (H, W) bool, False outside of it."""
    window = np.zeros(tuple(size), bool)
    rows = slice(max(0, top), max(0, min(area.shape[0], top + size[0])))
    columns = slice(max(0, left), max(0, min(area.shape[1], left + size[1])))
    part = area[rows, columns]
    at = rows.start - top, columns.start - left
    window[at[0] : at[0] + part.shape[0], at[1] : at[1] + part.shape[1]] = part
    return window
