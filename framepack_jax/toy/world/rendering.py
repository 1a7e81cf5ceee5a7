"""Render the frames of a scene, and the truth about its sprites."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from framepack_jax.toy import render
from framepack_jax.toy.render import COLOURS
from framepack_jax.toy.world.description import DIRECTIONS, FPS, PAN, Scene
from framepack_jax.toy.world.kinematics import position


class Truth(NamedTuple):
    """Ground truth of S sprites in P frames: centres (x, y) in pixels, (P, S, 2), and the visible
    fraction of their areas, (P, S)."""

    centres: np.ndarray
    visible: np.ndarray


def frames(scene: Scene, seconds: float) -> Iterator[np.ndarray]:
    """Render the frames (H, W, 3) uint8, 30 a second."""
    dx, dy = DIRECTIONS.get(scene.camera, (0, 0))
    texture = render.Texture(scene.texture, scene.height, scene.width)
    for number in range(round(seconds * FPS)):
        moved = PAN * number / FPS
        picture = texture.seen(dx * moved, dy * moved)
        for sprite, (box, cover) in zip(scene.sprites, _covers(scene, number), strict=True):
            render.paint(picture, box, cover, COLOURS[sprite.colour])
        if scene.wall is not None:
            render.paint_wall(picture, *scene.wall)
        yield picture.round().astype(np.uint8)


def _covers(scene: Scene, number: int) -> list[tuple[render.Box, np.ndarray]]:
    """Return the box of each sprite in a frame, and its coverage of the pixels there."""
    return [
        render.cover(
            sprite.form, sprite.radius, position(scene, sprite, number / FPS),
            scene.height, scene.width,
        )
        for sprite in scene.sprites
    ]  # fmt: skip


def masks(scene: Scene, number: int) -> np.ndarray:
    """Return the visible coverage of each pixel by each sprite in a frame, (S, H, W)."""
    return _visible(scene, _covers(scene, number))


def _visible(scene: Scene, covers: list[tuple[render.Box, np.ndarray]]) -> np.ndarray:
    seen = np.zeros((len(covers), scene.height, scene.width), np.float32)
    left = np.ones((scene.height, scene.width), np.float32)
    if scene.wall is not None:
        left -= render.wall_cover(*scene.wall, scene.height, scene.width)[None, :]
    for i in reversed(range(len(covers))):
        box, cover = covers[i]
        seen[i][box] = cover * left[box]
        left[box] *= 1 - cover
    return seen


def truth(scene: Scene, seconds: float) -> Truth:
    """Return the position and visible fraction of every sprite in every frame."""
    centres, visible = [], []
    for number in range(round(seconds * FPS)):
        covers = _covers(scene, number)
        places = [position(scene, sprite, number / FPS) for sprite in scene.sprites]
        centres.append(np.asarray(places) * scene.height)
        areas = [full_area(s.form, s.radius * scene.height) for s in scene.sprites]
        visible.append(_visible(scene, covers).sum(axis=(1, 2)) / areas)
    return Truth(np.asarray(centres, np.float32), np.minimum(visible, 1).astype(np.float32))


@functools.lru_cache(maxsize=64)
def full_area(form: str, radius: float) -> float:
    """Return the area in pixels of a sprite that nothing hides, for a radius in pixels."""
    side = 4 * math.ceil(radius)
    _, cover = render.cover(form, radius / side, (0.5, 0.5), side, side)
    return float(cover.sum())
