"""The demo world: captioned videos whose truth is known for any length.

A few sprites of fixed colour, form and size over a textured background: they move and bounce off
the picture's edges, circle around one another, stay, or go behind a wall for a stated time and come
out on its other side. The camera's pans move the background; sprites and walls are stated in the
picture. What a sprite does cannot be seen in the first frame, only read in the caption, and how it
does it - speed, sense of turning, when one motion follows another - is always the same, so that
first frame and caption decide the video.

Scene i of a seed and a split is the same however many are made, and a longer video begins like a
shorter one. Positions are (x, y) in units of the picture's height, x to the right, y downwards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from framepack_jax.toy import render
from framepack_jax.toy.render import COLOURS, FORMS
from framepack_jax.utils.files import atomic_write
from framepack_jax.video import write_mp4

SIZES = {"small": 0.10, "large": 0.15}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HIDDEN = {0.5: "half a second", 1.0: "1 second", 2.0: "2 seconds", 4.0: "4 seconds"}
# Colours and forms that occur together in held-out scenes, and in no other.
HELD_OUT = frozenset({
    ("red", "ring"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle"),
    ("purple", "triangle"), ("orange", "square"), ("cyan", "ring"), ("white", "circle"),
})  # fmt: skip
FPS = 30
# Picture heights a second, of sprites and of the camera.
SPEED, PAN = 0.35, 0.12
# Seconds after which a second motion begins.
THEN = 1.2
# What a wall is wider than the sprite that goes behind it.
WALL_SPARE = 0.08
# What the sprite does that acts, each as often.
ACTS = ("move", "move then move", "orbit", "move then orbit")
# Least width / height of a picture in which there are walls and orbits.
ROOM = 0.95
# width / height of the pictures, and their area in pixels.
ASPECTS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16)
AREA, UNIT = 128 * 128, 16
TRIES = 1000

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")


@dataclasses.dataclass(frozen=True)
class Motion:
    """What a sprite does from `begin` seconds on: "left", "right", "up", "down", "stay", "orbit"
    around sprite `around`, or "behind" the wall, out of sight for `hidden` seconds."""

    kind: str
    begin: float = 0.0
    around: int = -1
    hidden: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A shape; `start` is where its middle is in the first frame."""

    colour: str
    form: str
    size: str
    start: tuple[float, float]
    motions: tuple[Motion, ...]

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.form}"

    @property
    def radius(self) -> float:
        """In picture heights."""
        return SIZES[self.size]


@dataclasses.dataclass(frozen=True)
class Scene:
    """All of one clip; sprites from back to front, then the wall (its middle and width), if any."""

    height: int
    width: int
    sprites: tuple[Sprite, ...]
    camera: str
    texture: tuple[int, ...]
    wall: tuple[float, float] | None = None

    @property
    def aspect(self) -> float:
        return self.width / self.height

    @property
    def caption(self) -> str:
        """What happens, in a sentence."""
        parts = [f"the {sprite.name} {self._said(sprite)}" for sprite in self.sprites]
        view = "stands still" if self.camera == "still" else f"pans {self.camera}"
        return f"{'; '.join(parts)}; the camera {view}."

    def _said(self, sprite: Sprite) -> str:
        def say(motion: Motion) -> str:
            match motion.kind:
                case "stay":
                    return "stays"
                case "orbit":
                    return f"orbits the {self.sprites[motion.around].name}"
                case "behind":
                    return f"goes behind the wall for {HIDDEN[motion.hidden]}"
            return f"moves {motion.kind}"

        return ", then ".join(say(motion) for motion in sprite.motions)


class Truth(NamedTuple):
    """Of every frame P and sprite S: the middle (x, y) in pixels, (P, S, 2), and the share of its
    area that is seen, (P, S)."""

    centres: np.ndarray
    visible: np.ndarray


def scene(
    seed: int, number: int, height: int | None = None, width: int | None = None,
    split: Split = "train",
) -> Scene:  # fmt: skip
    """Scene `number` of a seed and a split, at a size in pixels, or at one of several shapes of
    about 128 x 128 pixels."""
    rng = _rng(seed, number, split, 0)
    height, width = _size(number, height, width)
    if rng.random() < 0.25 and width >= ROOM * height:
        return _with_wall(rng, height, width, split, rng.choice(list(HIDDEN)))
    return _scene(rng, height, width, split)


def counterfactual(
    seed: int, number: int, height: int | None = None, width: int | None = None
) -> tuple[Scene, Scene]:
    """Two held-out scenes whose first frames are equal and whose captions differ in what one sprite
    does: see `different`."""
    rng = _rng(seed, number, "held-out", 1)
    size = _size(number, height, width)

    def draw() -> Scene:
        made = _scene(rng, *size, "held-out", "move")
        actor = _mover(made)
        # From the middle there is room to all sides.
        start = tuple(rng.uniform(0.42, 0.58, 2) * (made.aspect, 1.0))
        return _replaced(made, actor, start=start)

    first = _first_good(draw, *size)
    actor = _mover(first)
    (motion,) = first.sprites[actor].motions
    others = [kind for kind in DIRECTIONS if kind != motion.kind]
    second = _replaced(first, actor, motions=(Motion(str(rng.choice(others))),))
    return first, second


def _mover(scene: Scene) -> int:
    """Number of the first sprite that moves to a side."""
    return next(i for i, s in enumerate(scene.sprites) if s.motions[0].kind in DIRECTIONS)


def different(first: Scene, second: Scene) -> int:
    """Number of the sprite that does something else in another scene."""
    pairs = zip(first.sprites, second.sprites, strict=True)
    return next(i for i, (a, b) in enumerate(pairs) if a.motions != b.motions)


def hiding(
    seed: int, number: int, hidden: float, height: int | None = None, width: int | None = None
) -> Scene:
    """A held-out scene in which a sprite, `hider`, goes behind a wall and is out of sight for one
    of `HIDDEN` seconds."""
    rng = _rng(seed, number, "held-out", 2)
    return _with_wall(rng, *_size(number, height, width), "held-out", hidden)


def hider(scene: Scene) -> int:
    """Number of the sprite that goes behind the wall."""
    kinds = [sprite.motions[0].kind for sprite in scene.sprites]
    return kinds.index("behind")


def _rng(seed: int, number: int, split: Split, purpose: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, number, SPLITS.index(split), purpose])


def _size(number: int, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width): the given one, or multiples of `UNIT` nearest to an aspect and to `AREA`."""
    if height is not None and width is not None:
        return height, width
    aspect = ASPECTS[number % len(ASPECTS)]
    height = round(math.sqrt(AREA / aspect) / UNIT) * UNIT
    return height, round(height * aspect / UNIT) * UNIT


def _scene(rng: np.random.Generator, height: int, width: int, split: Split, act: str = "") -> Scene:
    """One sprite acts: by default as one of `ACTS`, where there is room for it; the others stay or
    move. Drawn until nothing lies on anything else in the first frame, and nobody leaves the
    picture."""
    # Before all that is drawn again: what is hard to place is no rarer.
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
        # In front or behind: any place in the order.
        return _placed(rng, _rotated(made, int(rng.integers(count))))

    return _first_good(draw, height, width)


def _acted(rng: np.random.Generator, act: str, first: Motion) -> tuple[Motion, ...]:
    """The motions of the sprite that acts, of which `first` is a direction; orbits are around the
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
    """A sprite goes behind a wall; at most one other, which stays."""

    def draw() -> Scene | None:
        count = int(rng.integers(1, 3))
        sprites = _shapes(rng, count, split)
        made = Scene(height, width, tuple(sprites), "still", _texture(rng))
        wide = 2 * sprites[0].radius + WALL_SPARE
        wall = float(rng.uniform(0.4, 0.6)) * made.aspect, wide
        motions = [(Motion("behind", hidden=float(hidden)),), *[(Motion("stay"),)] * (count - 1)]
        sprites = [dataclasses.replace(s, motions=m) for s, m in zip(sprites, motions, strict=True)]
        return _placed(rng, dataclasses.replace(made, sprites=tuple(sprites), wall=wall))

    return _first_good(draw, height, width)


def _first_good(draw: Callable[[], Scene | None], height: int, width: int) -> Scene:
    for _ in range(TRIES):
        made = draw()
        if made is not None and _apart(made) and _inside(made):
            return made
    raise ValueError(
        f"{height}x{width} pixels leave no room for such a scene; give another size, as 128x128"
    )


def _direction(rng: np.random.Generator) -> str:
    return str(rng.choice(list(DIRECTIONS)))


def _texture(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(x) for x in rng.integers(0, 2**31, 2))


def _shapes(rng: np.random.Generator, count: int, split: Split) -> list[Sprite]:
    """Sprites of different colours, without places; of held-out ones the first is new."""
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
    """The sprites in another order, front for back."""
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


def _placed(rng: np.random.Generator, scene: Scene) -> Scene | None:
    """Places for all: such that what moves does so for a second before it bounces, and what goes
    behind the wall has a quarter of a second to get there, and room on the other side. None where
    the picture is too small for that."""
    sprites = []
    for sprite in scene.sprites:
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
        sprites.append(dataclasses.replace(sprite, start=(float(start[0]), float(start[1]))))
    for i, sprite in enumerate(sprites):
        *before, last = sprite.motions
        if last.kind != "orbit":
            continue
        # From the middle there is room around; what moves first is sent to where it begins.
        around = sprites[last.around]
        middle = np.asarray([scene.aspect, 1.0]) / 2 + rng.uniform(-0.1, 0.1, 2)
        radius = rng.uniform(0.04, 0.12) + sprite.radius + around.radius
        angle = rng.uniform(0, 2 * math.pi)
        start = middle + radius * np.asarray([math.cos(angle), math.sin(angle)])
        for motion in before:
            start -= np.asarray(DIRECTIONS[motion.kind]) * SPEED * last.begin
        sprites[last.around] = dataclasses.replace(around, start=tuple(middle.tolist()))
        sprites[i] = dataclasses.replace(sprite, start=tuple(start.tolist()))
    return dataclasses.replace(scene, sprites=tuple(sprites))


def _apart(scene: Scene) -> bool:
    """Whether no sprite lies on another in the first frame."""
    pairs = [(a, b) for i, a in enumerate(scene.sprites) for b in scene.sprites[:i]]
    return all(math.dist(a.start, b.start) > a.radius + b.radius + 0.03 for a, b in pairs)


def _inside(scene: Scene) -> bool:
    """Whether all is inside the picture at the beginning, and orbits stay there."""
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


def _replaced(scene: Scene, number: int, **fields: object) -> Scene:
    sprites = list(scene.sprites)
    sprites[number] = dataclasses.replace(sprites[number], **fields)
    return dataclasses.replace(scene, sprites=tuple(sprites))


def motion_at(sprite: Sprite, seconds: float) -> str:
    """The kind of motion that a sprite has at a time."""
    return [m.kind for m in sprite.motions if m.begin <= seconds][-1]


def position(scene: Scene, sprite: Sprite, seconds: float) -> tuple[float, float]:
    """Where the middle of a sprite is at a time: one motion after another, bounces being a straight
    line folded at the edges."""
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
    """How far a sprite that goes behind the wall has come along x: up to the middle of the wall,
    where it waits, and on."""
    middle, wide = scene.wall
    way = abs(middle - sprite.start[0])
    # It is out of sight while its sides are behind those of the wall.
    wait = motion.hidden - (wide - 2 * render.HALF_WIDTHS[sprite.form] * sprite.radius) / SPEED
    arrival = way / SPEED
    moved = min(span, arrival) + max(0.0, span - arrival - wait)
    return math.copysign(SPEED * moved, middle - sprite.start[0])


def _fold(x: float, low: float, high: float) -> float:
    """A straight way folded into [low, high]."""
    period = 2 * (high - low)
    along = (x - low) % period
    return low + min(along, period - along)


def frames(scene: Scene, seconds: float) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8, 30 a second."""
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
    """Where each sprite is in a frame, and how much of each pixel there it covers."""
    return [
        render.cover(
            sprite.form, sprite.radius, position(scene, sprite, number / FPS),
            scene.height, scene.width,
        )
        for sprite in scene.sprites
    ]  # fmt: skip


def masks(scene: Scene, number: int) -> np.ndarray:
    """How much of each pixel each sprite covers in a frame as it is seen, (S, H, W)."""
    return _seen(scene, _covers(scene, number))


def _seen(scene: Scene, covers: list[tuple[render.Box, np.ndarray]]) -> np.ndarray:
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
    """Where every sprite is in every frame, and how much of it is seen."""
    centres, visible = [], []
    for number in range(round(seconds * FPS)):
        covers = _covers(scene, number)
        places = [position(scene, sprite, number / FPS) for sprite in scene.sprites]
        centres.append(np.asarray(places) * scene.height)
        areas = [full_area(s.form, s.radius * scene.height) for s in scene.sprites]
        visible.append(_seen(scene, covers).sum(axis=(1, 2)) / areas)
    return Truth(np.asarray(centres, np.float32), np.minimum(visible, 1).astype(np.float32))


@functools.lru_cache(maxsize=64)
def full_area(form: str, radius: float) -> float:
    """Pixels that a sprite of a radius in pixels covers where nothing hides it."""
    side = 4 * math.ceil(radius)
    _, cover = render.cover(form, radius / side, (0.5, 0.5), side, side)
    return float(cover.sum())


def write(
    folder: Path, number: int, seed: int, seconds: float, size: tuple[int, int] | None = None,
    split: Split = "train",
) -> Path:  # fmt: skip
    """Make clip `number`: an mp4 file, and its caption in a .txt file beside it. Nothing is done
    where both are there."""
    made = scene(seed, number, *(size or (None, None)), split)
    file = Path(folder) / f"{number:05d}.mp4"
    if file.exists() and file.with_suffix(".txt").exists():
        return file
    write_mp4(file, frames(made, seconds), FPS)
    with atomic_write(file.with_suffix(".txt")) as partial:
        partial.write_text(made.caption + "\n")
    return file
