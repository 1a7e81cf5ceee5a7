"""Place the sprites of a scene, so that nothing overlaps or leaves the picture."""

import dataclasses
import math

import numpy as np

from framepack_jax.toy.world.description import DIRECTIONS, SPEED, Scene, Sprite
from framepack_jax.toy.world.kinematics import position


def placed(rng: np.random.Generator, scene: Scene) -> Scene | None:
    """Draw the positions of all sprites; None if the picture is too small.

    A sprite that moves does so for a second before it bounces. A sprite that goes behind the wall
    has a quarter of a second to reach it, and room on its other side.
    """
    sprites = []
    for sprite in scene.sprites:
        start = _start(rng, scene, sprite)
        if start is None:
            return None
        sprites.append(dataclasses.replace(sprite, start=start))
    for i, sprite in enumerate(sprites):
        if sprite.motions[-1].kind == "orbit":
            _place_orbit(rng, scene, sprites, i)
    return dataclasses.replace(scene, sprites=tuple(sprites))


def _start(rng: np.random.Generator, scene: Scene, sprite: Sprite) -> tuple[float, float] | None:
    """Draw the first position of a sprite; None if there is no room."""
    low = np.full(2, sprite.radius + 0.01)
    high = np.asarray([scene.aspect, 1.0]) - low
    kind = sprite.motions[0].kind
    if kind in DIRECTIONS:
        ahead = np.asarray(DIRECTIONS[kind]) * SPEED
        low, high = low + np.maximum(-ahead, 0), high - np.maximum(ahead, 0)
    if scene.wall is not None:
        middle, wide = scene.wall
        clear = wide / 2 + sprite.radius + (SPEED / 4 if kind == "behind" else 0.01)
        sides = middle, scene.aspect - middle
        left = rng.random() < 0.5
        if left:
            high = np.minimum(high, [middle - clear, np.inf])
        else:
            low = np.maximum(low, [middle + clear, -np.inf])
        if kind == "behind" and sides[left] < wide / 2 + 2 * sprite.radius + 0.01:
            return None
    if (low > high).any():
        return None
    start = low + rng.random(2) * (high - low)
    return float(start[0]), float(start[1])


def _place_orbit(
    rng: np.random.Generator, scene: Scene, sprites: list[Sprite], number: int
) -> None:
    """Move a sprite that ends with an orbit, and the sprite that it circles, in `sprites`."""
    sprite = sprites[number]
    *before, last = sprite.motions
    # The centre leaves room around; a motion before the orbit ends where the orbit begins.
    around = sprites[last.around]
    middle = np.asarray([scene.aspect, 1.0]) / 2 + rng.uniform(-0.1, 0.1, 2)
    radius = rng.uniform(0.04, 0.12) + sprite.radius + around.radius
    angle = rng.uniform(0, 2 * math.pi)
    start = middle + radius * np.asarray([math.cos(angle), math.sin(angle)])
    for motion in before:
        start -= np.asarray(DIRECTIONS[motion.kind]) * SPEED * last.begin
    sprites[last.around] = dataclasses.replace(around, start=tuple(middle.tolist()))
    sprites[number] = dataclasses.replace(sprite, start=tuple(start.tolist()))


def apart(scene: Scene) -> bool:
    """Return True if no sprites overlap in the first frame."""
    pairs = [(a, b) for i, a in enumerate(scene.sprites) for b in scene.sprites[:i]]
    return all(math.dist(a.start, b.start) > a.radius + b.radius + 0.03 for a, b in pairs)


def inside(scene: Scene) -> bool:
    """Return True if all sprites start, and orbits stay, inside the picture."""
    for sprite in scene.sprites:
        places = [sprite.start]
        for motion in sprite.motions:
            if motion.kind == "orbit":
                around = scene.sprites[motion.around]
                radius = math.dist(position(scene, sprite, motion.begin), around.start)
                if radius < sprite.radius + around.radius + 0.03:
                    return False
                places += [(around.start[0] + radius * a, around.start[1] + radius * b)
                           for a, b in DIRECTIONS.values()]  # fmt: skip
        if not all(
            sprite.radius <= x <= scene.aspect - sprite.radius
            and sprite.radius <= y <= 1 - sprite.radius
            for x, y in places
        ):
            return False
    return True
