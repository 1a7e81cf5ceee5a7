"""A scene of the toy world and its caption.

Positions are (x, y) in picture heights, x to the right, y downwards.
"""

import dataclasses
from typing import Literal

SIZES = {"small": 0.10, "large": 0.15}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HIDDEN = {0.5: "half a second", 1.0: "1 second", 2.0: "2 seconds", 4.0: "4 seconds"}
FPS = 30
# Speed of sprites and of the camera, in picture heights a second.
SPEED, PAN = 0.35, 0.12

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")


@dataclasses.dataclass(frozen=True)
class Motion:
    """A motion of a sprite, from `begin` seconds on. Its kind is "left", "right", "up", "down",
    "stay", "orbit" around sprite `around`, or "behind" the wall, hidden for `hidden` seconds."""

    kind: str
    begin: float = 0.0
    around: int = -1
    hidden: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A shape; `start` is its centre in the first frame."""

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
        """Radius in picture heights."""
        return SIZES[self.size]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One video: sprites from back to front, then the wall (its centre and width), if any."""

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
        """One sentence that describes the motions."""
        parts = [f"the {sprite.name} {self._phrase(sprite)}" for sprite in self.sprites]
        view = "stands still" if self.camera == "still" else f"pans {self.camera}"
        return f"{'; '.join(parts)}; the camera {view}."

    def _phrase(self, sprite: Sprite) -> str:
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
