"""The toy world: captioned videos with known truth, of any length.

A few sprites of fixed colour, form and size move over a textured background. They bounce off the
edges of the picture, orbit one another, stay, or go behind a wall for a stated time and come out on
its other side. The camera pans over the background only; sprites and walls are placed in the
picture. The first frame does not show what a sprite will do, only the caption says it. Speed, sense
of rotation and the time of a second motion are always the same, so that first frame and caption
determine the video. A longer video begins like a shorter one.

description a scene and its caption
kinematics  positions of sprites over time
placement   where sprites may start
draw        scenes at random
rendering   frames and truth
files       mp4 files with captions
"""

from framepack_jax.toy.render import COLOURS, FORMS
from framepack_jax.toy.world.description import (
    DIRECTIONS,
    FPS,
    HIDDEN,
    PAN,
    SIZES,
    SPEED,
    SPLITS,
    Motion,
    Scene,
    Split,
    Sprite,
)
from framepack_jax.toy.world.draw import (
    HELD_OUT,
    WALLS,
    counterfactual,
    different,
    hider,
    hiding,
    scene,
)
from framepack_jax.toy.world.files import write
from framepack_jax.toy.world.kinematics import motion_at, position
from framepack_jax.toy.world.rendering import Truth, frames, full_area, masks, truth

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "FORMS",
    "FPS",
    "HELD_OUT",
    "HIDDEN",
    "PAN",
    "SIZES",
    "SPEED",
    "SPLITS",
    "WALLS",
    "Motion",
    "Scene",
    "Split",
    "Sprite",
    "Truth",
    "counterfactual",
    "different",
    "frames",
    "full_area",
    "hider",
    "hiding",
    "masks",
    "motion_at",
    "position",
    "scene",
    "truth",
    "write",
]
