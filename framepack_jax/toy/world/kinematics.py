"""Positions of sprites over time.

The same motion always has the same speed, so that first frame and caption determine the video.
"""

import math

from framepack_jax.toy import render
from framepack_jax.toy.world.description import DIRECTIONS, SPEED, Motion, Scene, Sprite


def motion_at(sprite: Sprite, seconds: float) -> str:
    """Return the kind of motion of a sprite at a time."""
    return [m.kind for m in sprite.motions if m.begin <= seconds][-1]


def position(scene: Scene, sprite: Sprite, seconds: float) -> tuple[float, float]:
    """Return the centre of a sprite at a time. A sprite that bounces off the edges moves along a
    straight line folded at them."""
    x, y = sprite.start
    for i, motion in enumerate(sprite.motions):
        end = sprite.motions[i + 1].begin if i + 1 < len(sprite.motions) else math.inf
        span = min(seconds, end) - motion.begin
        if span < 0:
            break
        match motion.kind:
            case "stay":
                pass
            case "orbit":
                cx, cy = scene.sprites[motion.around].start
                radius, angle = math.dist((x, y), (cx, cy)), math.atan2(y - cy, x - cx)
                angle += SPEED / radius * span
                x, y = cx + radius * math.cos(angle), cy + radius * math.sin(angle)
            case "behind":
                x = x + _behind(scene, sprite, motion, span)
            case kind:
                dx, dy = DIRECTIONS[kind]
                x, y = x + dx * SPEED * span, y + dy * SPEED * span
        x = _fold(x, sprite.radius, scene.aspect - sprite.radius)
        y = _fold(y, sprite.radius, 1 - sprite.radius)
    return x, y


def _behind(scene: Scene, sprite: Sprite, motion: Motion, span: float) -> float:
    """Return the distance along x of a sprite that goes behind the wall: it moves to the centre of
    the wall, waits there, and moves on."""
    assert scene.wall is not None
    middle, wide = scene.wall
    way = abs(middle - sprite.start[0])
    # It is out of sight while its sides are behind those of the wall.
    wait = motion.hidden - (wide - 2 * render.HALF_WIDTHS[sprite.form] * sprite.radius) / SPEED
    arrival = way / SPEED
    moved = min(span, arrival) + max(0.0, span - arrival - wait)
    return math.copysign(SPEED * moved, middle - sprite.start[0])


def _fold(x: float, low: float, high: float) -> float:
    """Fold a coordinate into [low, high]."""
    period = 2 * (high - low)
    along = (x - low) % period
    return low + min(along, period - along)
