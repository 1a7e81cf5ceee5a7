"""Label the motion of a sprite with the words of captions: left, right, up, down, orbit, stay.

A track holds the positions (n, 2) of a sprite at equal time steps, x to the right and y downwards,
in picture heights. Positions of an invisible sprite are nan.
"""

import math
from collections.abc import Sequence

import numpy as np

WINDOW = 1.0
"""Seconds of a track that get one label."""
STILL = 0.08
"""Maximum extent of a track in a window, in picture heights, for the label "stay"."""
TURNED = 0.35
"""Minimum angle of an orbit in a window, in radians."""
ENOUGH = 0.6
"""Minimum fraction of a window in which the sprite must be visible."""

AXES = {"left": "sideways", "right": "sideways", "up": "upright", "down": "upright"}
"""Axis of each direction."""
KINDS = {word: {word} for word in (*AXES, "orbit", "stay")} | {
    axis: {word for word in AXES if AXES[word] == axis} for axis in AXES.values()
}
"""Labels of a track that agree with each word of a caption."""


def word(track: np.ndarray, anchor: np.ndarray | None = None) -> str:
    """Label a track (n, 2): a direction, "orbit", "stay", or "" if the sprite is mostly invisible.

    The label is "orbit" if a circle around the `anchor` fits better than a straight line.
    """
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
    """Fit a straight line by least squares. Return its velocity (2,) and the rms residual."""
    times = times - times.mean()
    centred = track - track.mean(axis=0, keepdims=True)
    velocity = (times[:, None] * centred).sum(axis=0) / (times**2).sum()
    rest = centred - times[:, None] * velocity[None]
    return velocity, float(np.sqrt((rest**2).sum(axis=1).mean()))


def _circles(times: np.ndarray, around: np.ndarray, off_line: float) -> bool:
    """Return True if positions (n, 2) relative to an anchor fit a steady rotation.

    The rms residual of the rotation must be smaller than `off_line`, that of the straight line.
    """
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
    """Compare the motion of sprites with the caption; return (P, S), 1 for agreement, 0 without.

    Values are nan in windows in which the caption has more than one word for a sprite. An invisible
    sprite does not agree.

    Args:
        tracks: positions (P, S, 2) in picture heights.
        words: words of the caption, (P, S).
        anchors: index of the sprite that each sprite may orbit, (S,).
    """
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
    """Return the index of the candidate (n, 2) with the smallest mean distance to a track.

    Time steps with an invisible sprite are ignored. Return None if the sprite is never visible.
    """
    seen = ~np.isnan(track).any(axis=1)
    if not seen.any():
        return None
    return int(np.argmin([np.hypot(*(track - c)[seen].T).mean() for c in candidates]))
