"""Videos to try training with: coloured shapes over textured backgrounds under a moving camera.

What is shown is known for any time: each shape keeps its colour, form and size, moves as the
caption says, leaves the picture and comes back, and passes behind others. Clip i of a seed is the
same however many clips are made, and a longer one begins like a shorter one.

Shapes of arrays: H W rows and columns; positions are (x, y) in units of the picture's height.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from framepack_jax.video import write_mp4
from framepack_jax.video.files import whole

COLOURS = {
    "red": (214, 48, 49), "green": (46, 160, 67), "blue": (38, 102, 212),
    "yellow": (240, 200, 40), "purple": (140, 60, 180), "orange": (240, 130, 30),
    "white": (240, 240, 240),
}  # fmt: skip
FORMS = ("circle", "square", "triangle", "ring")
SIZES = {"small": 0.10, "large": 0.17}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# width / height of the pictures.
ASPECTS = (4 / 3, 16 / 9, 1.0, 3 / 4, 9 / 16)
OCTAVES = (2, 5, 11, 23)
FPS = 30
# Shapes come back when they are so far outside, in picture heights.
MARGIN = 0.25
SPEED = 0.35, 0.7
TURN = 1.6, 2.6
UNIT = 32


@dataclasses.dataclass(frozen=True)
class Motion:
    """What a shape does from `begin` seconds on: a direction, or circles around another shape."""

    begin: float
    direction: str | None
    speed: float


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A shape; `start` where it is at the beginning, `depth` larger ones lie in front."""

    colour: str
    form: str
    size: str
    start: tuple[float, float]
    motions: tuple[Motion, ...]

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.form}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """All of one clip; sprites from back to front, circled around is the first."""

    height: int
    width: int
    sprites: tuple[Sprite, ...]
    camera: str
    camera_speed: float
    seed: tuple[int, int]

    @property
    def aspect(self) -> float:
        return self.width / self.height

    @property
    def caption(self) -> str:
        """What happens, in a sentence."""
        parts = [f"a {self._said(sprite)}" for sprite in self.sprites]
        view = "stands still" if self.camera == "still" else f"pans {self.camera}"
        return f"{'; '.join(parts)}; the camera {view}."

    def _said(self, sprite: Sprite) -> str:
        said = [
            f"orbits the {self.sprites[0].name}" if m.direction is None
            else "stays where it is" if not m.speed
            else f"moves {m.direction}"
            for m in sprite.motions
        ]  # fmt: skip
        return f"{sprite.name} {', then '.join(said)}"


def scene(seed: int, number: int, height: int | None = None, width: int | None = None) -> Scene:
    """Scene `number` of a seed, at a size in pixels, or at one of several shapes of about
    96 x 128 pixels."""
    rng = np.random.default_rng([seed, number])
    if height is None or width is None:
        height, width = _size(ASPECTS[number % len(ASPECTS)], 96 * 128)
    count = int(rng.integers(2, 4))
    names = rng.permutation(len(COLOURS))[:count]
    sprites = []
    for i in range(count):
        start = rng.uniform(0.15, 0.85, 2) * (width / height, 1.0)
        sprites.append(
            Sprite(
                colour=list(COLOURS)[names[i]],
                form=str(rng.choice(FORMS)),
                size=str(rng.choice(list(SIZES))),
                start=(float(start[0]), float(start[1])),
                motions=_motions(rng, orbits=i > 0),
            )
        )
    camera = str(rng.choice(["still", *DIRECTIONS]))
    speed = float(rng.uniform(0.05, 0.2))
    return Scene(height, width, tuple(sprites), camera, speed, (seed, number))


def _size(aspect: float, area: int) -> tuple[int, int]:
    """(height, width) in multiples of `UNIT` / 2, nearest to an aspect and an area."""
    step = UNIT // 2
    height = round(math.sqrt(area / aspect) / step) * step
    return height, max(step, round(height * aspect / step) * step)


def _motions(rng: np.random.Generator, orbits: bool) -> tuple[Motion, ...]:
    """One motion, or one and then another after two seconds or so."""
    motions, begin = [], 0.0
    for _ in range(int(rng.integers(1, 3))):
        kind = rng.random()
        speed = float(rng.uniform(*SPEED))
        if orbits and kind < 0.25:
            motions.append(Motion(begin, None, speed))
        else:
            still = not orbits and kind < 0.3
            motions.append(
                Motion(begin, str(rng.choice(list(DIRECTIONS))), 0.0 if still else speed)
            )
        begin += float(rng.uniform(*TURN))
    return tuple(motions)


def position(scene: Scene, sprite: Sprite, seconds: float) -> tuple[float, float]:
    """Where the middle of a shape is at a time, (x, y) in picture heights; x grows to the right,
    y downwards. What leaves the picture comes back on the other side."""
    x, y = sprite.start
    for i, motion in enumerate(sprite.motions):
        end = sprite.motions[i + 1].begin if i + 1 < len(sprite.motions) else math.inf
        span = min(seconds, end) - motion.begin
        if span <= 0:
            break
        if motion.direction is None:
            centre = position(scene, scene.sprites[0], motion.begin + span)
            begun = position(scene, scene.sprites[0], motion.begin)
            radius = max(0.2, math.hypot(x - begun[0], y - begun[1]))
            radius = min(radius, 0.35)
            angle = math.atan2(y - begun[1], x - begun[0]) + 3.0 * motion.speed * span
            x, y = centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)
        else:
            dx, dy = DIRECTIONS[motion.direction]
            x, y = x + dx * motion.speed * span, y + dy * motion.speed * span
    x = (x + MARGIN) % (scene.aspect + 2 * MARGIN) - MARGIN
    y = (y + MARGIN) % (1 + 2 * MARGIN) - MARGIN
    return x, y


def frames(scene: Scene, seconds: float) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8, 30 a second."""
    background = _background(scene)
    rows = (np.arange(scene.height) + 0.5)[:, None] / scene.height
    columns = (np.arange(scene.width) + 0.5)[None, :] / scene.height
    for number in range(round(seconds * FPS)):
        time = number / FPS
        picture = _shifted(scene, background, time)
        for sprite in scene.sprites:
            x, y = position(scene, sprite, time)
            cover = _cover(sprite, columns - x, rows - y, 1.5 / scene.height)[:, :, None]
            colour = np.asarray(COLOURS[sprite.colour], np.float32)[None, None]
            picture = picture * (1 - cover) + colour * cover
        yield picture.round().astype(np.uint8)


def _background(scene: Scene) -> np.ndarray:
    """A texture that continues at its edges, twice the size of the picture."""
    rng = np.random.default_rng([*scene.seed, 1])
    height, width = 2 * scene.height, 2 * scene.width
    total = np.zeros((height, width, 3), np.float32)
    for octave in OCTAVES:
        cells = rng.standard_normal((octave, octave * 2, 3)).astype(np.float32)
        cells = np.pad(cells, ((2, 2), (2, 2), (0, 0)), mode="wrap")
        scale = height / octave, width / (octave * 2)
        size = round(cells.shape[1] * scale[1]), round(cells.shape[0] * scale[0])
        layers = [
            np.asarray(Image.fromarray(cells[:, :, c]).resize(size, Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        top, left = round(2 * scale[0]), round(2 * scale[1])
        total += np.stack(layers, axis=-1)[top : top + height, left : left + width] / octave**0.5
    base = rng.uniform(70, 150, 3).astype(np.float32)
    return np.clip(base[None, None] + 22 * total, 0, 255)


def _shifted(scene: Scene, background: np.ndarray, seconds: float) -> np.ndarray:
    """What the camera sees of the background, to a fraction of a pixel."""
    if scene.camera == "still":
        return background[: scene.height, : scene.width].copy()
    dx, dy = DIRECTIONS[scene.camera]
    moved = scene.camera_speed * seconds * scene.height
    pieces = 0.0
    for step, share in ((math.floor(moved), 1 - moved % 1), (math.floor(moved) + 1, moved % 1)):
        rolled = np.roll(background, (-dy * step, -dx * step), (0, 1))
        pieces = pieces + np.float32(share) * rolled[: scene.height, : scene.width]
    return pieces


def _cover(sprite: Sprite, x: np.ndarray, y: np.ndarray, edge: float) -> np.ndarray:
    """How much of each pixel a shape covers (H, W), with soft edges."""
    radius = SIZES[sprite.size]
    match sprite.form:
        case "circle":
            distance = np.hypot(x, y) - radius
        case "ring":
            distance = np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius
        case "square":
            distance = np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
        case _:
            slope = np.abs(x) * 0.866 + y * 0.5
            distance = np.maximum(slope, -y) - 0.6 * radius
    return np.clip(0.5 - distance / edge, 0, 1).astype(np.float32)


def write(
    folder: Path, number: int, seed: int, seconds: float, size: tuple[int, int] | None = None
) -> Path:
    """Make clip `number`: an mp4 file, and its caption in a .txt file beside it. Nothing is done
    where both are there."""
    made = scene(seed, number, *(size or (None, None)))
    file = Path(folder) / f"{number:05d}.mp4"
    if file.exists() and file.with_suffix(".txt").exists():
        return file
    write_mp4(file, frames(made, seconds), FPS)
    with whole(file.with_suffix(".txt")) as partial:
        partial.write_text(made.caption + "\n")
    return file
