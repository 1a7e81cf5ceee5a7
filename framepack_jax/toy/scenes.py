"""Held-out test cases of the toy world, and the metrics of their videos.

Three suites: `drift`, long videos; `forgetting`, a sprite that is hidden for a while and comes
back; `prompts`, two captions for one first frame that differ in the motion of one sprite.

Shapes: P frames, S sprites, H W rows and columns. Frames are (P, H, W, 3) uint8.
"""

import dataclasses
import functools
import hashlib
import itertools
import math

import numpy as np

from framepack_jax.evaluation import metrics
from framepack_jax.evaluation.drift import mean
from framepack_jax.toy import motion_labels, render, tracking, world
from framepack_jax.toy.tracking import Sprites
from framepack_jax.toy.world import DIRECTIONS, FPS, Scene

AFTER = 1.0
"""Seconds after the reappearance of a hidden sprite in which it is measured."""
GONE = 0.02
"""Maximum visible fraction of a hidden sprite."""
LATEST = 12.0
"""Maximum seconds until a hidden sprite reappears, in addition to its time hidden."""
Figures = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A video to sample: a scene with its first frame and caption, and the minimum of frames.

    Args:
        part: name of the suite.
        sprite: index of the hidden sprite, or of the sprite whose motion differs in the captions.
        away: frames in which the sprite is hidden.
        back: frames after its reappearance.
        other: scene of the other caption.
        shuffled: caption of another case.
    """

    part: str
    name: str
    scene: Scene
    frames: int
    seed: int
    sprite: int | None = None
    away: slice | None = None
    back: slice | None = None
    other: Scene | None = None
    shuffled: str = ""

    @functools.cached_property
    def image(self) -> np.ndarray:
        """The first frame (H, W, 3) uint8."""
        return next(iter(world.frames(self.scene, 1 / FPS)))

    def truth(self) -> np.ndarray:
        """Render the ground truth (P, H, W, 3)."""
        return np.stack(list(world.frames(self.scene, self.frames / FPS)))


def fingerprint(seed: int, size: tuple[int, int]) -> str:
    """Return a hash that changes if the scenes of a seed change."""
    scene = world.scene(seed, 0, *size, split="held-out")
    frame = next(iter(world.frames(scene, 1 / FPS)))
    return hashlib.sha256(scene.caption.encode() + frame.tobytes()).hexdigest()[:16]


def drift_cases(seed: int, count: int, frames: int, size: tuple[int, int], part: str) -> list[Case]:
    """Make cases of `frames` frames from held-out scenes."""
    scenes = [world.scene(seed, i, *size, split="held-out") for i in range(count)]
    return [Case(part, f"{i:03d}", scene, frames, seed + i) for i, scene in enumerate(scenes)]


def hiding_cases(
    seed: int, count: int, hidden: float, size: tuple[int, int], part: str
) -> list[Case]:
    """Make cases with a sprite hidden for `hidden` seconds, long enough to show it again."""
    made = []
    for number in range(count):
        scene = world.hiding(seed, number, hidden, *size)
        sprite = world.hider(scene)
        away, back = hidden_span(scene, sprite, hidden + LATEST)
        made.append((scene, sprite, away, back))
    frames = max(back.stop for *_, back in made)
    return [
        Case(part, f"{i:03d}", scene, frames, seed + i, sprite, away, back)
        for i, (scene, sprite, away, back) in enumerate(made)
    ]


def counterfactual_cases(
    seed: int, count: int, frames: int, size: tuple[int, int], part: str
) -> list[Case]:
    """Make two cases for each of `count` first frames, with the same noise seed."""
    pairs = [world.counterfactual(seed, i, *size) for i in range(count)]
    rng = np.random.default_rng([seed, 2])
    cases = []
    for i, pair in enumerate(pairs):
        strange = [scene.caption for scene in pairs[(i + 1) % count]]
        shuffled = [strange[k] for k in rng.permutation(2)]
        for k, (scene, other) in enumerate((pair, pair[::-1])):
            sprite = world.different(*pair)
            name = f"{i:03d}{'ab'[k]}"
            cases.append(
                Case(part, name, scene, frames, seed + i, sprite, other=other, shuffled=shuffled[k])
            )
    return cases


def hidden_span(scene: Scene, sprite: int, seconds: float) -> tuple[slice, slice]:
    """Return the frames in which a sprite is hidden, and the frames from its full reappearance.

    Raises ValueError if the sprite is never hidden or does not reappear.
    """
    visible = world.truth(scene, seconds).visible[:, sprite]
    gone = np.flatnonzero(visible <= GONE)
    if not gone.size:
        raise ValueError(f"{scene.sprites[sprite].name} of a scene is never hidden")
    first = int(gone[0])
    back = np.flatnonzero(visible[first:] > GONE)
    last = first + int(back[0]) if back.size else len(visible)
    clear = np.flatnonzero(visible[last:] >= tracking.CLEAR)
    if not clear.size:
        raise ValueError(f"{scene.sprites[sprite].name} of a scene does not come back")
    out = last + int(clear[0])
    return slice(first, last), slice(out, out + round(AFTER * FPS))


def cast_of(scene: Scene) -> Sprites:
    """Return colours, shapes and templates of a scene's sprites for tracking."""
    names = list(world.COLOURS)
    return Sprites(
        palette=np.asarray([world.COLOURS[name] for name in names], np.float32),
        colours=tuple(names.index(sprite.colour) for sprite in scene.sprites),
        shapes=tuple(f"{sprite.size} {sprite.form}" for sprite in scene.sprites),
        templates=templates(scene.height),
    )


@functools.cache
def templates(height: int) -> dict[str, np.ndarray]:
    """Return masks of all forms in all sizes for pictures of `height` rows."""
    made = {}
    for (size, radius), form in itertools.product(world.SIZES.items(), world.FORMS):
        side = 2 * math.ceil(1.2 * radius * height) + 1
        _, cover = render.cover(form, radius * height / side, (0.5, 0.5), side, side)
        made[f"{size} {form}"] = cover >= 0.5
    return made


def drift_figures(case: Case, frames: np.ndarray) -> Figures:
    """Measure every frame, (P,): those of `metrics.measure`, identity and caption agreement."""
    scene = case.scene
    truth = world.truth(scene, len(frames) / FPS)
    seen = tracking.track(frames, cast_of(scene), truth.visible)
    words = words_of(scene, len(frames))
    tracks = seen.centres / scene.height
    agreed = motion_labels.agreement(tracks, words, anchors_of(scene), FPS)
    return metrics.measure(frames, FPS) | {
        "identity": over_sprites(seen.identity),
        "caption": over_sprites(agreed),
    }


def words_of(scene: Scene, frames: int) -> list[list[str]]:
    """Return the caption's word for each sprite in each frame.

    After a sprite bounced off an edge, the word is the axis of its direction.
    """
    words: list[list[str]] = [[] for _ in range(frames)]
    for sprite in scene.sprites:
        places = [world.position(scene, sprite, n / FPS) for n in range(frames + 1)]
        before = None
        for number, step in enumerate(np.diff(places, axis=0)):
            said = world.motion_at(sprite, number / FPS)
            if said != before:
                before, bounced = said, False
            bounced |= said in DIRECTIONS and np.dot(step, DIRECTIONS[said]) < 0
            words[number].append(motion_labels.AXES[said] if bounced else said)
    return words


def anchors_of(scene: Scene) -> list[int | None]:
    """Return the index of the sprite that each sprite orbits, or None."""
    return [
        next((motion.around for motion in sprite.motions if motion.kind == "orbit"), None)
        for sprite in scene.sprites
    ]


def tracks_of(scene: Scene, frames: np.ndarray) -> np.ndarray:
    """Track the sprites of a scene; return positions (P, S, 2) in picture heights."""
    everyone = np.zeros((len(frames), len(scene.sprites)))
    return tracking.track(frames, cast_of(scene), everyone).centres / scene.height


def over_sprites(values: np.ndarray) -> np.ndarray:
    """Average values (P, S) over sprites, ignoring nan; nan if a frame has no value."""
    judged = ~np.isnan(values)
    total = np.where(judged, values, 0).sum(axis=1)
    count = judged.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan).astype(np.float32)


def forgetting_figures(case: Case, frames: np.ndarray) -> Figures:
    """Measure the hidden sprite.

    `hidden` is the fraction of the frames `away` without it. `identity` is the fraction of the
    frames `back` in which it has its colour, form and size. `place` is its mean distance there from
    the true position, in picture heights; nan if it is missing.
    """
    scene, sprite, away, back = case.scene, case.sprite, case.away, case.back
    truth = world.truth(scene, len(frames) / FPS)
    cast = cast_of(scene)
    hidden = tracking.track(frames[away], cast, 0 * truth.visible[away]).present[:, sprite]
    seen = tracking.track(frames[back], cast, truth.visible[back], every=1)
    apart = np.hypot(*(seen.centres - truth.centres[back])[:, sprite].T) / scene.height
    return {
        "hidden": np.asarray(1 - hidden.mean(), np.float32),
        "identity": np.asarray(mean(seen.identity[:, sprite]), np.float32),
        "place": np.asarray(mean(apart), np.float32),
    }


def prompt_figures(case: Case, frames: np.ndarray) -> Figures:
    """Measure whether the video follows its caption.

    `match` is 1 if the sprite's track is nearer to that of its caption than to that of the other.
    `dynamics` is the dynamic degree of the video. `psnr` compares its first frame with the image.
    """
    cast, sprite = cast_of(case.scene), case.sprite
    assert case.other is not None
    truths = [world.truth(scene, len(frames) / FPS) for scene in (case.scene, case.other)]
    seen = tracking.track(frames, cast, 0 * truths[0].visible)
    near = motion_labels.nearest(
        seen.centres[1:, sprite], [truth.centres[1:, sprite] for truth in truths]
    )
    return {
        "match": np.asarray(near == 0, np.float32),
        "dynamics": np.asarray(mean(metrics.measure(frames, FPS)["dynamics"]), np.float32),
        "psnr": np.asarray(min(99.0, metrics.psnr(frames[0], case.image)), np.float32),
    }
