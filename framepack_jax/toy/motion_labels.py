"""What a shape does, in the words of captions: left, right, up, down, orbit, stay.

A track is the places (n, 2) of a shape in even steps of time, x to the right and y downwards, in
picture heights, nan where it is not seen.
"""

import math
from collections.abc import Sequence

import numpy as np

WINDOW = 1.0
"""Seconds of a track that are put into one word."""
STILL = 0.08
"""A shape whose places in a window are within so many picture heights stays where it is."""
TURNED = 0.35
"""Least angle of an orbit in a window, in radians."""
ENOUGH = 0.6
"""Share of a window in which a shape must be seen."""

AXES = {"left": "sideways", "right": "sideways", "up": "upright", "down": "upright"}
"""Of a direction, the way there and back."""
KINDS = {word: {word} for word in (*AXES, "orbit", "stay")} | {
    axis: {word for word in AXES if AXES[word] == axis} for axis in AXES.values()
}
"""Of what may be said, the words that a track may have."""


def word(track: np.ndarray, anchor: np.ndarray | None = None) -> str:
    """What a shape does along its track (n, 2): a direction; "orbit" where a circle around the
    `anchor` fits better than a straight line; "stay"; "" where it is hardly seen."""
    seen = ~np.isnan(track).any(axis=1)
    if seen.mean() < ENOUGH:
        return ""
    times = np.linspace(-0.5, 0.5, len(track))
    if np.ptp(track[seen], axis=0).max() < STILL:
        return "stay"
    velocity, off_line = _line(times[seen], track[seen])
    if anchor is not None and _circles(times, track - anchor, off_line):
        return "orbit"
    across, down = velocity
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def _line(times: np.ndarray, track: np.ndarray) -> tuple[np.ndarray, float]:
    """Velocity (2,) of the best straight line, and how far the track is from it (rms)."""
    times = times - times.mean()
    centred = track - track.mean(axis=0, keepdims=True)
    velocity = (times[:, None] * centred).sum(axis=0) / (times**2).sum()
    rest = centred - times[:, None] * velocity[None]
    return velocity, float(np.sqrt((rest**2).sum(axis=1).mean()))


def _circles(times: np.ndarray, around: np.ndarray, off_line: float) -> bool:
    """Whether places (n, 2) relative to an anchor turn steadily, nearer to that than `off_line`."""
    seen = ~np.isnan(around).any(axis=1)
    if seen.mean() < ENOUGH:
        return False
    times, around = times[seen], around[seen]
    radii = np.hypot(*around.T)
    angles = np.unwrap(np.arctan2(around[:, 1], around[:, 0]))
    slope, rest = _line(times, angles[:, None])
    off_circle = math.hypot(radii.std(), radii.mean() * rest)
    turned = abs(float(slope[0])) * np.ptp(times)
    return turned >= TURNED and off_circle < off_line


def agreement(
    tracks: np.ndarray,
    words: Sequence[Sequence[str]],
    anchors: Sequence[int | None],
    fps: float,
    window: float = WINDOW,
) -> np.ndarray:
    """Whether sprites do what the caption says, (P, S): 1 or 0 in windows in which it says one
    thing throughout, nan in others. `tracks` (P, S, 2), `words` (P, S) of the caption, `anchors`
    (S,) the sprite that each may circle around. A sprite that is not seen does not agree."""
    count, sprites, _ = tracks.shape
    found = np.full((count, sprites), math.nan, np.float32)
    length = max(2, round(window * fps))
    for first in range(0, count - length + 1, length):
        part = slice(first, first + length)
        for sprite in range(sprites):
            said = {at[sprite] for at in words[part]}
            if len(said) > 1 or not said <= set(KINDS):
                continue
            anchor = anchors[sprite]
            around = None if anchor is None else tracks[part, anchor]
            found[part, sprite] = word(tracks[part, sprite], around) in KINDS[said.pop()]
    return found


def nearest(track: np.ndarray, candidates: Sequence[np.ndarray]) -> int | None:
    """Which of the candidates (n, 2) a track is nearest to, on average over where it is seen; None
    where it never is."""
    seen = ~np.isnan(track).any(axis=1)
    if not seen.any():
        return None
    return int(np.argmin([np.hypot(*(track - c)[seen].T).mean() for c in candidates]))
