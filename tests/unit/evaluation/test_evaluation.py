"""The ruler itself: figures with known answers, objects and motions that are known, statistics."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from framepack_jax import FramePack, bundle, packing, video
from framepack_jax.cli import evaluate
from framepack_jax.evaluation import clip_score, drift, metrics, plots, tables
from framepack_jax.evaluation.drift import Estimate
from framepack_jax.evaluation.metrics import Metric
from framepack_jax.generation.pipeline import Settings
from framepack_jax.toy import baselines, motion_labels, results, scenes, suites, tracking
from framepack_jax.toy.tracking import Sprites

SIDE, FPS = 96, 30.0
GREY = (112, 104, 120)
PALETTE = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (38, 102, 212)}
RADII = {"small": 10, "large": 16}
FORMS = ("circle", "square", "triangle", "ring")


def video_of(picture: np.ndarray, count: int = 8) -> np.ndarray:
    return np.repeat(picture[None], count, axis=0)


def grating(wave: float, amplitude: float = 80.0) -> np.ndarray:
    """A grey picture whose columns are a sine of so many radians a pixel."""
    row = 128 + amplitude * np.sin(wave * np.arange(SIDE))
    return np.tile(row[None, :, None], (SIDE, 1, 3))


def texture(seed: int = 0, size: int = 2 * SIDE) -> np.ndarray:
    """A smooth picture (size, size, 3) uint8 that continues at its edges."""
    rng = np.random.default_rng(seed)
    waves = np.fft.rfft2(rng.standard_normal((size, size)))
    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    smooth = np.fft.irfft2(waves * np.exp(-((rows**2 + columns**2) * 400)), (size, size))
    grey = 128 + 40 * smooth / smooth.std()
    return np.tile(grey[:, :, None], (1, 1, 3)).clip(0, 255).round().astype(np.uint8)


def measured(frames: np.ndarray, name: str) -> float:
    return drift.mean(metrics.measure(frames, FPS)[name])


def test_blur_takes_a_known_share_of_sharpness() -> None:
    for wave in (0.3, 0.8, 1.5):
        sharp = grating(wave)
        blurred = (np.roll(sharp, 1, 1) + 2 * sharp + np.roll(sharp, -1, 1)) / 4
        blurred[:, [0, -1]] = sharp[:, [0, -1]]
        values = [
            measured(video_of(p.round().astype(np.uint8)), "sharpness") for p in (sharp, blurred)
        ]
        # Central differences of a sine: amplitude sin(wave), of which the blur keeps a share.
        assert values[0] == pytest.approx(80 * math.sin(wave) / math.sqrt(2), rel=0.04)
        assert values[1] / values[0] == pytest.approx((1 + math.cos(wave)) / 2, rel=0.03)


@pytest.mark.parametrize("deviation", [2.0, 5.0, 15.0])
def test_noise_is_that_which_was_added(deviation: float) -> None:
    rng = np.random.default_rng(1)
    white = rng.normal(0, deviation, (6, SIDE, SIDE, 1))
    for picture in (np.full((1, SIDE, SIDE, 3), 128.0), texture()[None, :SIDE, :SIDE]):
        frames = (picture * 0.5 + 64 + white).clip(0, 255).round().astype(np.uint8)
        clean = (picture * 0.5 + 64).round().astype(np.uint8)
        assert measured(frames, "noise") == pytest.approx(deviation, rel=0.05)
        assert measured(clean, "noise") < 0.5
        assert measured(frames, "sharpness") > measured(clean, "sharpness")


def test_colours_are_what_they_are() -> None:
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, :20] = (200, 100, 50)
    found = metrics.still(frame)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert found["brightness"] == pytest.approx(luma / 2 / 255, rel=0.01)
    assert found["contrast"] == pytest.approx(luma / 2 / 255, rel=0.01)
    assert found["saturation"] == pytest.approx(0.75 / 2, rel=0.01)


@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (-3, 2)])
def test_flow_is_the_shift(shift: tuple[int, int]) -> None:
    whole = texture()
    frames = np.stack([np.roll(whole, (shift[1] * i, shift[0] * i), (0, 1)) for i in range(6)])
    frames = frames[:, 40 : 40 + SIDE, 40 : 40 + SIDE]
    speed = math.hypot(*shift) * FPS / SIDE
    assert measured(frames, "dynamics") == pytest.approx(speed, rel=0.02)
    # Steady motion is smooth, whatever its speed.
    assert measured(frames, "smoothness") > 0.99
    found = metrics.measure(frames, FPS)
    assert np.isnan(found["dynamics"]).tolist() == [True] + [False] * 5
    assert np.isnan(found["smoothness"]).tolist() == [True] + [False] * 4 + [True]


def test_flicker_is_not_smooth() -> None:
    frames = np.stack([np.full((SIDE, SIDE, 3), 100 + 20 * (i % 2), np.uint8) for i in range(7)])
    assert measured(frames, "smoothness") == pytest.approx(1 - 20 / 255, abs=1e-4)


def test_a_frozen_frame_has_no_dynamics_and_no_drift() -> None:
    found = metrics.measure(video_of(texture()[:SIDE, :SIDE], 20), FPS)
    assert drift.mean(found["dynamics"]) == 0 and drift.mean(found["smoothness"]) == 1
    assert all(drift.drift(values) == 0 for values in found.values())


def test_drift_of_a_linear_rise() -> None:
    count, rise = 101, 80
    levels = 60 + rise * np.arange(count) / (count - 1)
    frames = (
        np.broadcast_to(levels[:, None, None, None], (count, 16, 16, 3)).round().astype(np.uint8)
    )
    part = round(0.15 * count)
    expected = rise * (count - part) / (count - 1) / 255
    brightness = metrics.measure(frames, FPS)["brightness"]
    assert drift.drift(brightness) == pytest.approx(expected, abs=0.2 / 255)
    assert drift.drift(brightness[::-1]) == pytest.approx(expected, abs=0.2 / 255)


def test_estimates_have_standard_errors() -> None:
    found = drift.estimate([1.0, 2.0, math.nan, 6.0])
    assert found == Estimate(3.0, pytest.approx(math.sqrt(7 / 3)), 3)
    assert drift.estimate([4.0]) == Estimate(4.0, None, 1)
    assert drift.estimate([math.nan]) is None
    assert math.isnan(drift.drift(np.full(20, np.nan)))


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


def track(kind: str, turn: float = 1.5, n: int = 30) -> np.ndarray:
    time = np.linspace(0, 1, n)[:, None]
    steps = {"left": (-0.4, 0.1), "right": (0.5, -0.2), "up": (0.1, -0.3), "down": (0.0, 0.3)}
    if kind == "orbit":
        angle = 0.7 + turn * time[:, 0]
        return 0.5 + 0.25 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray([[0.2, 0.8]]) + time * np.asarray([steps.get(kind, (0.0, 0.02))])


@pytest.mark.parametrize("kind", ["left", "right", "up", "down", "orbit", "stay"])
def test_words_of_motions(kind: str) -> None:
    anchor = np.full((30, 2), 0.5)
    shaken = track(kind) + np.random.default_rng(4).normal(0, 0.004, (30, 2))
    shaken[7:12] = np.nan
    assert motion_labels.word(shaken, anchor) == kind
    assert motion_labels.word(track("orbit", -1.2), anchor) == "orbit"
    shaken[:20] = np.nan
    assert motion_labels.word(shaken, anchor) == ""


def test_an_orbit_goes_with_its_anchor() -> None:
    moving = np.linspace(0, 1, 30)[:, None] * np.asarray([[0.3, -0.2]])
    assert motion_labels.word(track("orbit") + moving, 0.5 + moving) == "orbit"
    assert motion_labels.word(track("left"), 0.5 + moving) == "left"


def test_agreement_counts_windows_of_one_word() -> None:
    tracks = np.concatenate([track("left"), track("up"), track("left")])[:, None]
    words = [["left"]] * 30 + [["down"]] * 30 + [["left"]] * 10 + [["up"]] * 20 + [["behind"]] * 30
    tracks = np.concatenate([tracks, tracks[60:]])
    found = motion_labels.agreement(tracks, words, [None], FPS)[:, 0]
    assert (found[:30] == 1).all() and (found[30:60] == 0).all() and np.isnan(found[60:]).all()


def test_the_nearest_of_two_tracks() -> None:
    left, right = track("left"), track("right")
    half = track("stay") + 0.5 * (left - track("stay"))
    half[3:20] = np.nan
    assert motion_labels.nearest(half, [right, left]) == 1
    assert motion_labels.nearest(np.full((30, 2), np.nan), [right, left]) is None


@pytest.mark.parametrize("schedule", [packing.RELEASED_INVERTED, packing.RELEASED_F1])
def test_blanked_context_is_zero_and_nothing_else_is(schedule: str) -> None:
    plan = packing.plan(packing.parse(schedule), 3)
    latents = np.random.default_rng(5).standard_normal((1, packing.length(plan), 4, 4, 2))
    timeline = packing.Timeline.of(latents.astype(np.float32))
    for before, after in zip(plan, packing.drop_context(plan, ("k2",)), strict=True):
        whole, blank = (packing.read_context(s, timeline) for s in (before, after))
        assert (before.targets, before.decode) == (after.targets, after.decode)
        for i, kernel in enumerate(whole.kernels):
            expected = 0 * whole.latents[i] if kernel == "k2" else whole.latents[i]
            np.testing.assert_array_equal(blank.latents[i], expected)
            np.testing.assert_array_equal(blank.indices[i], whole.indices[i])
    assert packing.drop_context(plan, ()) == plan


@pytest.fixture(scope="module")
def pipe() -> FramePack:
    return FramePack.load(
        bundle.BUILTIN_BUNDLES["random"], schedule=packing.parse("f1k1_x_f16k4f2k2f1k1_g2")
    )


def asks(count: int) -> list[baselines.Prompt]:
    return [
        baselines.Prompt(texture(i)[:32, :32], "a red circle moves left", i) for i in range(count)
    ]


def test_repeated_sections_know_nothing_of_each_other(pipe) -> None:
    settings = Settings(steps=1)
    made = baselines.repeated(pipe, asks(2), 2, settings)
    assert made.shape == (2, 17, 32, 32, 3) and made.dtype == np.uint8
    first = baselines.sampled(pipe, asks(2), 1, settings)
    np.testing.assert_array_equal(made[:, :9], first)
    # What follows depends on the last frame alone.
    again = [baselines.Prompt(made[i, 8], "a red circle moves left", 7919 + i) for i in range(2)]
    np.testing.assert_array_equal(made[:, 9:], baselines.sampled(pipe, again, 1, settings)[:, 1:])


def test_blanked_context_changes_what_is_made(pipe) -> None:
    settings = Settings(steps=1)
    made, blank, all_of_it = (
        baselines.sampled(pipe, asks(1), 2, settings, kernels) for kernels in ((), ("k2",), ())
    )
    np.testing.assert_array_equal(made, all_of_it)
    assert not np.array_equal(made, blank)


def test_reconstruction_has_every_frame_once(pipe, monkeypatch) -> None:
    monkeypatch.setattr(baselines, "CLIP_LATENTS", 2)
    frames = np.stack([np.roll(texture()[:32, :32], i, 0) for i in range(17)])
    made = baselines.reconstructed(pipe, frames)
    assert made.shape == frames.shape
    np.testing.assert_array_equal(made[:9], baselines.reconstructed(pipe, frames[:9]))
    np.testing.assert_array_equal(made[9:], baselines.reconstructed(pipe, frames[8:])[1:])


def test_tables_in_markdown_and_json() -> None:
    columns = {"a": Metric("Smoothness", "share", 1, 2), "b": Metric("Motion", "heights", 0, 1)}
    cells = {
        suites.TRUTH: (Estimate(0.4, 0.01, 4), Estimate(5.0, 0.5, 4)),
        suites.FROZEN: (Estimate(1.0, None, 1), Estimate(0.0, 0.0, 4)),
        "model": (Estimate(0.5, 0.125, 4), Estimate(7.0, 0.25, 4)),
        "empty": (None, None),
    }
    table = tables.Table(
        "T",
        "About.",
        columns,
        {row: dict(zip("ab", cell, strict=True)) for row, cell in cells.items()},
    )
    notes = tables.against(table, suites.TRUTH, suites.FROZEN, ["model"])
    assert notes == [
        "Against model, the frozen first frame is better in smoothness; worse in motion."
    ]
    text = tables.markdown(table, notes)
    assert "| model | 0.50 ± 0.12 | 7.0 ± 0.2 |" in text and "| empty | - | - |" in text
    assert "| frozen first frame | 1.00 | 0.0 ± 0.0 |" in text and notes[0] in text
    plain = json.loads(json.dumps(tables.plain(table), allow_nan=False))
    assert plain["rows"]["model"]["a"] == {"mean": 0.5, "error": 0.125, "videos": 4}
    assert plain["rows"]["empty"]["a"] is None


def test_curves_are_means_over_videos_where_there_are_figures() -> None:
    videos = [np.asarray([0.0, 1, 2, np.nan]), np.asarray([2.0, 3, np.nan, np.nan, 9])]
    times, mean, error = plots.curve(videos, 2.0)
    np.testing.assert_allclose(times, [0.25, 0.75, 1.25])
    np.testing.assert_allclose(mean, [1, 2, 2])
    np.testing.assert_allclose(error, [1, 1, 0])


def test_a_video_file_alone(tmp_path, capsys) -> None:
    levels = 60 + np.arange(40) * 2
    frames = np.broadcast_to(levels[:, None, None, None], (40, 32, 32, 3)).astype(np.uint8)
    video.write_mp4(tmp_path / "rise.mp4", frames, FPS)
    evaluate.main(["--video", str(tmp_path / "rise.mp4"), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "rise.mp4: 40 frames" in printed and "| drift |" in printed
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["rows"]["drift"]["brightness"]["mean"] == pytest.approx(2 * 34 / 255, abs=0.01)
    assert found["rows"]["last 15 %"]["brightness"]["mean"] == pytest.approx(133 / 255, abs=0.01)
    assert found["rows"]["drift"]["dynamics"]["mean"] < 0.05
    with Image.open(tmp_path / "out" / "plots" / "brightness.png") as plot:
        assert min(plot.size) > 300
    assert (tmp_path / "out" / "sheet.png").exists() and (tmp_path / "out" / "report.md").exists()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of toy size with random weights, as a folder; and the model."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        bundle.BUILTIN_BUNDLES["random"] / "tokenizer_2"
    )
    text = sizes | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"shortest_edge": 32}
    transformers.CLIPImageProcessor(size=side, crop_size=32).save_pretrained(folder)
    return folder, model


def test_a_pretrained_clip_measures_each_frame(clip) -> None:
    """Against transformers' own logits, which are cosines times a factor."""
    import torch
    import transformers

    folder, model = clip
    frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    frames[7] = frames[0]
    found = clip_score.measure(folder, iter(frames), "the red circle moves left")
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["the red circle moves left"], images=list(frames), return_tensors="pt")
    with torch.inference_mode():
        reference = model(**inputs)
        cosines = (reference.logits_per_image[:, 0] / model.logit_scale.exp()).numpy()
    np.testing.assert_allclose(found["agreement"], cosines, atol=1e-5)
    likeness = (reference.image_embeds @ reference.image_embeds[0]).numpy()
    np.testing.assert_allclose(found["likeness"], likeness, atol=1e-5)
    assert found["likeness"][7] == pytest.approx(1) and found["likeness"][1:7].max() < 1 - 1e-3
    assert "agreement" not in clip_score.measure(folder, frames[:2], "")


def test_a_video_file_by_a_pretrained_clip(clip, tmp_path, capsys) -> None:
    video.write_mp4(tmp_path / "a.mp4", video_of(texture()[:SIDE, :SIDE], 6), FPS)
    flags = ["--video", str(tmp_path / "a.mp4"), "--clip", str(clip[0])]
    evaluate.main([*flags, "--caption", "waves", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "Likeness to the caption" in printed
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(kept["frames"]["agreement"]) == 6
    assert (tmp_path / "out" / "plots" / "likeness.png").exists()
    with pytest.raises(SystemExit, match="expected a folder with a CLIP model"):
        evaluate.main([*flags[:3], str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--bundle"),
        (["--video", "nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["--video", "x.mp4", "--bundle", "random"], "--video"),
        (["--video", "x.mp4", "--caption", "waves"], "give --clip"),
        (["--bundle", "random", "--output", "out", "--clip", "x"], "go with --video"),
        (["--bundle", "random"], "--output"),
        (["--bundle", "nowhere", "--output", "out"], "nowhere"),
        (["--bundle", "random", "--output", "out", "--size", "64"], "--size 64"),
        (["--bundle", "random", "--output", "out", "--size", "64x72"], "--size 64x72"),
        (["--bundle", "random", "--output", "out", "--seconds", "0"], "--seconds 0"),
        (
            ["--bundle", "random", "--output", "out", "--occlusion-seconds", "1", "1"],
            "--occlusion-seconds",
        ),
        (["--bundle", "random", "--output", "out", "--videos", "-1"], "--videos -1"),
        (["--bundle", "random", "--output", "out", "--batch", "0"], "--batch 0"),
        (["--bundle", "random", "--output", "out", "--steps", "0"], "steps = 0"),
        (
            ["--bundle", "random", "--bundle", "random", "--output", "out"],
            "two bundles are called random",
        ),
        (["--bundle", "random", "--output", "out", "--schedule", "g9x"], "g9x"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, flags, named) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        evaluate.main(flags)
    assert str(error.value).startswith("error: ") and named in str(error.value)
    assert not list(tmp_path.iterdir())


WORLD = 64, 64


@pytest.fixture(scope="module")
def truths() -> list[tuple[scenes.Case, np.ndarray]]:
    return [(case, case.truth()) for case in scenes.drift_cases(0, 8, 121, WORLD, "drift")]


def test_the_truth_of_the_world_agrees_with_itself(truths) -> None:
    found = [scenes.drift_figures(case, frames) for case, frames in truths]
    assert np.mean([drift.mean(f["identity"]) for f in found]) > 0.97
    # Of a sprite behind the wall nothing is said that could be looked for.
    assert np.nanmean([drift.mean(f["caption"]) for f in found]) > 0.95


def test_captions_of_others_agree_by_chance(truths) -> None:
    agreed = []
    for (case, frames), (other, _) in zip(truths, truths[1:] + truths[:1], strict=True):
        tracks = scenes.tracks_of(case.scene, frames)
        words = scenes.words_of(other.scene, len(frames))
        count = min(tracks.shape[1], len(words[0]))
        anchors = [a if a is None or a < count else None for a in scenes.anchors_of(case.scene)]
        agreed.append(
            drift.mean(
                motion_labels.agreement(
                    tracks[:, :count], [w[:count] for w in words], anchors[:count], FPS
                )
            )
        )
    assert np.nanmean(agreed) < 0.45


def test_a_hidden_sprite_is_gone_and_comes_back_in_truth() -> None:
    for hidden in (0.5, 1.0):
        for case in scenes.hiding_cases(0, 2, hidden, WORLD, "forgetting"):
            frames = case.truth()
            found = scenes.forgetting_figures(case, frames)
            assert found["hidden"] > 0.95 and found["identity"] > 0.95 and found["place"] < 0.03
            assert abs((case.away.stop - case.away.start) / FPS - hidden) < 0.2
            # Without the sprite, or with the beginning for all of it.
            still = scenes.forgetting_figures(case, np.repeat(frames[:1], len(frames), 0))
            assert still["hidden"] < 0.05 and still["place"] > 0.1
            empty = np.full_like(frames, GREY)
            lost = scenes.forgetting_figures(case, empty)
            assert lost["hidden"] == 1 and lost["identity"] == 0 and np.isnan(lost["place"])


def test_counterfactual_truth_matches_its_own_caption() -> None:
    made = scenes.counterfactual_cases(0, 3, 73, WORLD, "prompts")
    assert len(made) == 6 and {case.name for case in made} >= {"000a", "000b", "002b"}
    for case, twin in zip(made[::2], made[1::2], strict=True):
        assert case.scene.caption != twin.scene.caption and case.seed == twin.seed
        np.testing.assert_array_equal(case.image, twin.image)
        assert {case.shuffled, twin.shuffled}.isdisjoint((case.scene.caption, twin.scene.caption))
        mine, others = case.truth(), twin.truth()
        found = scenes.prompt_figures(case, mine)
        assert found["match"] == 1 and found["psnr"] == 99 and found["dynamics"] > 0
        assert scenes.prompt_figures(case, others)["match"] == 0
        assert scenes.prompt_figures(twin, others)["match"] == 1


def test_an_evaluation_goes_on_where_it_was_stopped(tmp_path, monkeypatch) -> None:
    flags = [
        "--bundle", "random", "--schedule", "f1k1_x_f16k4f2k2f1k1_g2", "--size", "32x32",
        "--steps", "1", "--videos", "2", "--seconds", "0.6", "--occlusion-videos", "2",
        "--occlusion-seconds", "0.5", "--prompt-pairs", "1", "--pair-seconds", "0.3",
        "--output", str(tmp_path),
    ]  # fmt: skip
    # Few shapes to compile: clips of 9 frames, 2 videos side by side.
    monkeypatch.setattr(baselines, "CLIP_LATENTS", 2)
    stopped, save = [], results.save

    def stop_in_time(*args) -> None:
        if len(stopped) == 12:
            raise KeyboardInterrupt
        stopped.append(args[1])
        save(*args)

    monkeypatch.setattr(results, "save", stop_in_time)
    with pytest.raises(SystemExit, match="interrupted"):
        evaluate.main(flags)
    assert not (tmp_path / "report.md").exists()
    monkeypatch.setattr(results, "save", lambda *args: (stopped.append(args[1]), save(*args)))
    evaluate.main(flags)
    # Drift: 4 references and the model, twice; forgetting: also without k2, k4, both; prompts: also
    # the control.
    assert len(stopped) == 2 * 5 + 2 * 8 + 2 * 6
    found = json.loads((tmp_path / "report.json").read_text())
    name = "random f1k1_x_f16k4f2k2f1k1_g2"
    titles = [table["title"] for table in found["tables"]]
    assert [title.split()[0] for title in titles] == [
        "Over",
        "Drift",
        "Forgetting:",
        "Counterfactual",
    ]
    for table in found["tables"]:
        assert {*suites.REFERENCES, name} <= set(table["rows"])
        assert all(set(cells) == set(table["columns"]) for cells in table["rows"].values())
    assert f"{name}, without k2 and k4" in found["tables"][2]["rows"]
    frozen = found["tables"][0]["rows"][suites.FROZEN]
    assert frozen["dynamics"] == {"mean": 0.0, "error": 0.0, "videos": 2}
    text = (tmp_path / "report.md").read_text()
    for picture in re.findall(r"\]\((.+?\.png)\)", text):
        assert (tmp_path / picture).exists()
    assert f"Against {name}, the frozen first frame is better in" in text

    def refuse(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(results, "save", refuse)
    evaluate.main(flags)
    with pytest.raises(SystemExit, match="steps = 1 there, 2 here"):
        evaluate.main([*flags, "--steps", "2"])
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(SystemExit, match="not empty"):
        evaluate.main(flags)
