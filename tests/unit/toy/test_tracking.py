"""Sprites found by colour, and told from others by their form."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from framepack_jax.toy import tracking
from framepack_jax.toy.tracking import Sprites
from tests.fixtures.pictures import GREY, SIDE

PALETTE = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (38, 102, 212)}
RADII = {"small": 10, "large": 16}
FORMS = ("circle", "square", "triangle", "ring")


def drawn(sprites, background=GREY, side: int = SIDE) -> np.ndarray:
    """A picture with (colour, form, radius, x, y) on it, four times finer and then reduced."""
    picture = Image.new("RGB", (4 * side, 4 * side), background)
    pen = ImageDraw.Draw(picture)
    for colour, form, radius, x, y in sprites:
        x, y, r = 4 * x, 4 * y, 4 * radius
        box = (x - r, y - r, x + r, y + r)
        match form:
            case "circle":
                pen.ellipse(box, fill=colour)
            case "ring":
                pen.ellipse(box, outline=colour, width=int(r / 2))
            case "square":
                pen.rectangle(
                    tuple(0.15 * c + 0.85 * b for c, b in zip((x, y) * 2, box, strict=True)),
                    fill=colour,
                )
            case _:
                pen.polygon(
                    [(x, y + 1.2 * r), (x - r, y - 0.6 * r), (x + r, y - 0.6 * r)], fill=colour
                )
    return np.asarray(picture.reduce(4))


def template(form: str, radius: float) -> np.ndarray:
    side = 2 * math.ceil(1.3 * radius) + 1
    picture = drawn([((255,) * 3, form, radius, side / 2, side / 2)], (0, 0, 0), side)
    return picture[:, :, 0] > 127


TEMPLATES = {
    f"{size} {form}": template(form, radius)
    for (size, radius), form in itertools.product(RADII.items(), FORMS)
}


def cast(*sprites: tuple[str, str]) -> Sprites:
    names = list(PALETTE)
    return Sprites(
        np.asarray(list(PALETTE.values()), np.float32),
        tuple(names.index(colour) for colour, _ in sprites),
        tuple(shape for _, shape in sprites),
        TEMPLATES,
    )


@pytest.mark.parametrize("shape", TEMPLATES)
def test_a_sprite_is_itself_and_no_other(shape: str) -> None:
    size, form = shape.split()
    rng = np.random.default_rng(3)
    for x, y in ((40.3, 52.8), (30.0, 47.5)):
        frame = drawn([(PALETTE["red"], form, RADII[size], x, y)]).astype(np.float32)
        frame = (frame + rng.normal(0, 8, frame.shape)).clip(0, 255).astype(np.uint8)
        for other in TEMPLATES:
            seen = tracking.track(frame[None], cast(("red", other)), np.ones((1, 1)))
            assert seen.present.all() or other.startswith("large")
            assert seen.identity[0, 0] == float(other == shape)
            if other == shape:
                np.testing.assert_allclose(seen.centres[0, 0], (x, y), atol=1)
        gone = tracking.track(frame[None], cast(("blue", shape)), np.ones((1, 1)))
        assert not gone.present.any() and gone.identity[0, 0] == 0
        assert np.isnan(gone.centres).all()


def test_what_is_like_no_form_is_no_sprite() -> None:
    frame = np.full((SIDE, SIDE, 3), GREY, np.uint8)
    frame[45:49, 5:90] = PALETTE["red"]
    for shape in TEMPLATES:
        seen = tracking.track(frame[None], cast(("red", shape)), np.ones((1, 1)))
        assert seen.present.all() and seen.identity[0, 0] == 0


def test_what_is_covered_is_not_held_against_a_sprite() -> None:
    large = RADII["large"]
    red, blue = ((PALETTE[c], "circle", large, x, 48) for c, x in (("red", 40), ("blue", 62)))
    seen = tracking.track(
        drawn([red, blue])[None],
        cast(("red", "large circle"), ("blue", "large circle")),
        np.ones((1, 2)),
    )
    assert seen.identity.tolist() == [[1, 1]]
    # Most of it covered, or out of sight in truth: it is not judged.
    over = (PALETTE["blue"], "square", 1.1 * large, 50, 48)
    for frame, visible in ((drawn([red, over]), (1, 0)), (drawn([red]), (0.5, 0))):
        seen = tracking.track(
            frame[None],
            cast(("red", "large circle"), ("blue", "large square")),
            np.asarray([visible]),
        )
        assert np.isnan(seen.identity).all()


def test_a_sprite_may_be_under_another_one_for_a_while() -> None:
    size = RADII["large"]
    red, over, away = (
        (PALETTE[colour], "square", size, x, 48)
        for colour, x in (("red", 40), ("blue", 41), ("blue", 75))
    )
    frames = np.stack([drawn(on) for on in ([red, away], [red, over], [away], [])])
    seen = tracking.track(
        frames, cast(("red", "large square"), ("blue", "large square")), np.ones((4, 2)), every=1
    )
    np.testing.assert_array_equal(seen.identity, [[1, 1], [np.nan, 1], [0, 1], [0, 0]])


def test_pieces_and_stray_pixels() -> None:
    mask = np.zeros((30, 30), bool)
    mask[2:12, 2:12] = mask[14:20, 2:12] = True
    stray = mask.copy()
    stray[25, 25] = stray[28, 3:5] = True
    np.testing.assert_array_equal(tracking.pieces(stray), mask)
