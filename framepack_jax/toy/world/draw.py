"""Draw scenes at random.

Scene i of a seed and a split is the same however many are drawn.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from framepack_jax.toy.render import COLOURS, FORMS
from framepack_jax.toy.world.description import (
    DIRECTIONS,
    HIDDEN,
    SIZES,
    SPLITS,
    Motion,
    Scene,
    Split,
    Sprite,
)
from framepack_jax.toy.world.placement import apart, inside, placed

# Pairs of colour and form that occur in held-out scenes, and in no others.
HELD_OUT = frozenset({
    ("red", "ring"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle"),
    ("purple", "triangle"), ("orange", "square"), ("cyan", "ring"), ("white", "circle"),
})  # fmt: skip
# Seconds after which a second motion begins.
THEN = 1.2
# Width of a wall beyond that of the sprite that goes behind it.
WALL_SPARE = 0.08
# Motions of the acting sprite, all with the same frequency.
ACTS = ("move", "move then move", "orbit", "move then orbit")
# Minimum width / height of a picture with walls or orbits.
ROOM = 0.95
# Share of the scenes with a wall, where there is room.
WALLS = 0.25
# Aspect ratios, width / height, of the pictures, and their area in pixels.
ASPECTS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16)
AREA, UNIT = 128 * 128, 16
MAX_TRIES = 1000


def scene(
    seed: int, number: int, height: int | None = None, width: int | None = None,
    split: Split = "train", walls: float = WALLS,
) -> Scene:  # fmt: skip
    """Draw scene `number` of a seed and a split, at a size in pixels, or at one of several shapes
    of about 128 x 128 pixels. Where there is room, a share of `walls` has a wall."""
    rng = _rng(seed, number, split, 0)
    height, width = _size(number, height, width)
    if rng.random() < walls and width >= ROOM * height:
        return _with_wall(rng, height, width, split, rng.choice(list(HIDDEN)))
    return _scene(rng, height, width, split)


def counterfactual(
    seed: int, number: int, height: int | None = None, width: int | None = None
) -> tuple[Scene, Scene]:
    """Draw two held-out scenes with equal first frames, whose captions differ in the motion of one
    sprite, `different`."""
    rng = _rng(seed, number, "held-out", 1)
    size = _size(number, height, width)

    def draw() -> Scene:
        made = _scene(rng, *size, "held-out", "move")
        actor = _mover(made)
        # The centre leaves room on all sides.
        x, y = rng.uniform(0.42, 0.58, 2) * (made.aspect, 1.0)
        return _replaced(made, actor, start=(x, y))

    first = _first_good(draw, *size)
    actor = _mover(first)
    (motion,) = first.sprites[actor].motions
    others = [kind for kind in DIRECTIONS if kind != motion.kind]
    second = _replaced(first, actor, motions=(Motion(str(rng.choice(others))),))
    return first, second


def _mover(scene: Scene) -> int:
    """Return the number of the first sprite that moves in a direction."""
    return next(i for i, s in enumerate(scene.sprites) if s.motions[0].kind in DIRECTIONS)


def different(first: Scene, second: Scene) -> int:
    """Return the number of the sprite whose motion differs between two scenes."""
    pairs = zip(first.sprites, second.sprites, strict=True)
    return next(i for i, (a, b) in enumerate(pairs) if a.motions != b.motions)


def hiding(
    seed: int, number: int, hidden: float, height: int | None = None, width: int | None = None
) -> Scene:
    """Draw a held-out scene in which a sprite, `hider`, goes behind a wall and is hidden for one of
    `HIDDEN` seconds."""
    rng = _rng(seed, number, "held-out", 2)
    return _with_wall(rng, *_size(number, height, width), "held-out", hidden)


def hider(scene: Scene) -> int:
    """Return the number of the sprite that goes behind the wall."""
    kinds = [sprite.motions[0].kind for sprite in scene.sprites]
    return kinds.index("behind")


def _rng(seed: int, number: int, split: Split, purpose: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, number, SPLITS.index(split), purpose])


def _size(number: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the given (height, width), or multiples of `UNIT` for an aspect ratio and `AREA`."""
    if height is not None and width is not None:
        return height, width
    aspect = ASPECTS[number % len(ASPECTS)]
    height = round(math.sqrt(AREA / aspect) / UNIT) * UNIT
    return height, round(height * aspect / UNIT) * UNIT


def _scene(rng: np.random.Generator, height: int, width: int, split: Split, act: str = "") -> Scene:
    """Draw a scene in which one sprite acts, by default as one of `ACTS` if there is room for it,
    and the others stay or move. Redraw until no sprites overlap in the first frame and none leaves
    the picture."""
    # Drawn once, before the parts that are redrawn: acts that are hard to place are as frequent.
    count, act = int(rng.integers(1, 4)), act or str(rng.choice(ACTS))
    if "orbit" in act and width < ROOM * height:
        act = "move"
    count = max(count, 2 if "orbit" in act else 1)

    def draw() -> Scene | None:
        sprites = _shapes(rng, count, split)
        for i in range(count):
            moves = i == 0 or rng.random() < 0.25
            motion = Motion(_direction(rng) if moves else "stay")
            sprites[i] = dataclasses.replace(sprites[i], motions=(motion,))
        if "orbit" in act:
            sprites[1] = dataclasses.replace(sprites[1], motions=(Motion("stay"),))
        motions = _acted(rng, act, sprites[0].motions[0])
        sprites[0] = dataclasses.replace(sprites[0], motions=motions)
        camera = "still" if rng.random() < 0.5 else _direction(rng)
        made = Scene(height, width, tuple(sprites), camera, _texture(rng))
        # The sprite that acts has any place in the order of depth.
        return placed(rng, _rotated(made, int(rng.integers(count))))

    return _first_good(draw, height, width)


def _acted(rng: np.random.Generator, act: str, first: Motion) -> tuple[Motion, ...]:
    """Return the motions of the sprite that acts. `first` is a direction; orbits are around the
    second sprite."""
    match act:
        case "move":
            return (first,)
        case "orbit":
            return (Motion("orbit", around=1),)
        case "move then orbit":
            return first, Motion("orbit", THEN, around=1)
    kinds = ["stay", *(kind for kind in DIRECTIONS if kind != first.kind)]
    return first, Motion(str(rng.choice(kinds)), THEN)


def _with_wall(
    rng: np.random.Generator, height: int, width: int, split: Split, hidden: float
) -> Scene:
    """Draw a scene in which a sprite goes behind a wall, with at most one other, which stays."""

    def draw() -> Scene | None:
        count = int(rng.integers(1, 3))
        sprites = _shapes(rng, count, split)
        made = Scene(height, width, tuple(sprites), "still", _texture(rng))
        wide = 2 * sprites[0].radius + WALL_SPARE
        wall = float(rng.uniform(0.4, 0.6)) * made.aspect, wide
        motions = [(Motion("behind", hidden=float(hidden)),), *[(Motion("stay"),)] * (count - 1)]
        sprites = [dataclasses.replace(s, motions=m) for s, m in zip(sprites, motions, strict=True)]
        return placed(rng, dataclasses.replace(made, sprites=tuple(sprites), wall=wall))

    return _first_good(draw, height, width)


def _first_good(draw: Callable[[], Scene | None], height: int, width: int) -> Scene:
    for _ in range(MAX_TRIES):
        made = draw()
        if made is not None and apart(made) and inside(made):
            return made
    raise ValueError(
        f"{height}x{width} pixels leave no room for such a scene; give another size, as 128x128"
    )


def _direction(rng: np.random.Generator) -> str:
    return str(rng.choice(list(DIRECTIONS)))


def _texture(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(x) for x in rng.integers(0, 2**31, 2))


def _shapes(rng: np.random.Generator, count: int, split: Split) -> list[Sprite]:
    """Draw sprites of different colours, without positions. In the held-out split, the first has a
    held-out pair of colour and form."""
    known = [(c, f) for c in COLOURS for f in FORMS if (c, f) not in HELD_OUT]
    while True:
        pairs = [known[int(i)] for i in rng.choice(len(known), count, replace=False)]
        if split == "held-out":
            pairs[0] = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
        if len({colour for colour, _ in pairs}) == count:
            sizes = [str(rng.choice(list(SIZES))) for _ in pairs]
            return [
                Sprite(*pair, size, (0.0, 0.0), ()) for pair, size in zip(pairs, sizes, strict=True)
            ]


def _rotated(scene: Scene, by: int) -> Scene:
    """Return the scene with the order of depth of its sprites rotated."""
    count = len(scene.sprites)
    order = [(i + by) % count for i in range(count)]
    moved = {old: new for new, old in enumerate(order)}
    sprites = [
        dataclasses.replace(
            scene.sprites[i],
            motions=tuple(
                dataclasses.replace(m, around=moved.get(m.around, -1))
                for m in scene.sprites[i].motions
            ),
        )
        for i in order
    ]
    return dataclasses.replace(scene, sprites=tuple(sprites))


def _replaced(scene: Scene, number: int, **fields: Any) -> Scene:
    sprites = list(scene.sprites)
    sprites[number] = dataclasses.replace(sprites[number], **fields)
    return dataclasses.replace(scene, sprites=tuple(sprites))
