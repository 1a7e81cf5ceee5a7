"""Images, videos and prompts on the timeline of a video, with random weights."""

from collections.abc import Iterator

import numpy as np
import pytest

from framepack_jax import FramePack, conditioning, packing, video
from framepack_jax.generation import pipeline
from framepack_jax.generation.request import source_from_frames
from tests.fixtures.run_folders import (
    F1,
    HEIGHT,
    INVERTED,
    WIDTH,
    assert_same_latents,
    command,
    copy,
    frames_of,
    make,
    watch_encoder,
)
from tests.fixtures.torch_reference import relative_error


def still(pipe: FramePack, image: np.ndarray, frames: int = 5) -> np.ndarray:
    """The last latent of a clip of equal frames: of five, it stands for the last four."""
    image = video.resize_center_crop(image, HEIGHT, WIDTH)
    clip = np.stack([image] * frames)[None]
    return np.asarray(
        conditioning.clip_latents(*pipe.vae, clip, pipe.latent_mean, pipe.latent_std)
    )[0, -1]


@pytest.mark.parametrize(
    ("schedule", "use", "end", "frames"),
    [
        # A guide follows the video, a still is its last latent; forward, it is the last target.
        (INVERTED, "auto", 5, 17),
        (INVERTED, "still", 5, 21),
        (F1, "auto", 4, 17),
    ],
)
def test_end_image_and_key_frames_lie_where_they_should(
    pipe, pictures, tmp_path, schedule: str, use: str, end: int, frames: int
) -> None:
    # 0.4 s is frame 12, the last of the four frames of position 3; 0.41 s rounds to it, too.
    run = make(
        tmp_path / "run", "--sections", 2, "--end-image", pictures["end"], "--end-image-as", use,
        "--key-frame", f"0.41s={pictures['key']}", schedule=schedule,
    )  # fmt: skip
    latents, guide = run.latents(), frames == 4 * end - 3
    assert sorted(latents) == list(range(end + 1))
    for position, name, alone in ((3, "key", False), (end, "end", guide)):
        expected = still(pipe, video.load_image(pictures[name]), frames=1 if alone else 5)
        np.testing.assert_array_equal(latents[position], expected)
    assert len(frames_of(run)) == run.record["frames"] == frames
    assert run.record["flags"]["end_image_as"] == ("guide" if guide else "still")


def test_the_end_image_is_read_by_what_comes_before(pipe, pictures, tmp_path) -> None:
    """It changes the section that is made with it in sight, not only its own latent."""
    plan = packing.plan(packing.parse(INVERTED), 2, after=1)
    nearest = [group for group in plan[0].groups if group.kernel == "k1"][-1]
    assert nearest.reads == (5,) and plan[0].decode == ((3, 6),)
    flags = ("--sections", 2)
    without = make(tmp_path / "a", *flags)
    other = make(tmp_path / "b", *flags, "--end-image", pictures["end"])
    assert relative_error(other.latents()[4], without.latents()[4]) > 1e-3


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("0s={}", "key frame at 0 s"),
        ("9s={}", "key frame at 9 s"),
        ("-1s={}", "-1"),
        ("nans={}", "nan"),
        ("0.55s={}", "same latent frame as the end image"),
        ("{}", "expected a time and an image"),
        ("xs={}", "expected a time and an image"),
        ("0.2s=nowhere.png", "nowhere.png"),
    ],
)
def test_key_frames_that_cannot_be(tmp_path, pictures, flag: str, named: str) -> None:
    with pytest.raises(SystemExit, match=named):
        make(
            tmp_path / "run", "--sections", 2, "--end-image", pictures["end"],
            "--key-frame", flag.format(pictures["key"]), schedule=F1,
        )  # fmt: skip


@pytest.mark.parametrize("schedule", [INVERTED, F1])
def test_extended_from_a_run_folder(whole, tmp_path, monkeypatch, schedule: str) -> None:
    """Its latents lie on the timeline as they were saved, its frames stay."""
    old, given = whole[schedule], watch_encoder(monkeypatch)
    run = make(
        tmp_path / "run", "--sections", 1, "--extend", old.folder, schedule=schedule, image=False
    )
    latents, before = run.latents(), old.latents()
    assert sorted(latents) == list(range(9))
    for position in range(7):
        np.testing.assert_array_equal(latents[position], before[position])
    assert len(frames_of(run)) == run.record["frames"] == 33
    # The clip of the new section begins at position 5, frame 20: from there on it is blended in.
    assert sorted(given) == [0, 20] and len(given[20]) == 13
    np.testing.assert_array_equal(given[0], frames_of(old)[:20])
    np.testing.assert_allclose(given[20][0], frames_of(old)[20], atol=1)


def test_what_an_extension_reads_is_the_video_before(whole) -> None:
    forward = packing.plan(packing.parse(F1), 2, before=7)
    by_kernel = {(g.kernel, len(g.reads)): g.reads for g in forward[0].groups}
    assert by_kernel["k2", 2] == (4, 5) and by_kernel["k4", 16][-4:] == (0, 1, 2, 3)
    assert {(0,), (6,)} == {g.reads for g in forward[0].groups if g.kernel == "k1"}
    assert forward[0].targets == (7, 8) and forward[0].decode == ((5, 9),)
    inverted = packing.plan(packing.parse(INVERTED), 2, before=7)
    assert [s.targets for s in inverted] == [(9, 10), (7, 8)]
    assert all((6,) in [g.reads for g in s.groups] for s in inverted)
    assert [s.decode for s in inverted] == [((9, 11),), ((5, 11),)]
    # Frame indices are those of a video that begins with its last frame.
    for long, short in zip(inverted, packing.plan(packing.parse(INVERTED), 2), strict=True):
        assert long.indices == short.indices
        assert [g.indices for g in long.groups] == [g.indices for g in short.groups]


def moving_bars(frames: int) -> Iterator[np.ndarray]:
    """Frames (HEIGHT, WIDTH, 3) uint8 of colours that move and change."""
    columns = np.arange(WIDTH)[None, :, None] + np.array([0, 16, 32])[None, None, :]
    for i in range(frames):
        wave = 127.5 + 100 * np.sin((columns + i) / 8 + i / 50)
        yield np.broadcast_to(wave, (HEIGHT, WIDTH, 3)).astype(np.uint8)


@pytest.mark.parametrize("frames", [24, 82, 100, 1000])
def test_extended_videos_of_any_length(pipe, tmp_path, monkeypatch, frames: int) -> None:
    """By command and in Python alike; frames past the last whole latent are left out."""
    source = tmp_path / "source.mp4"
    video.write_mp4(source, moving_bars(frames), fps=30)
    given = np.stack(list(video.read_frames(source)))[: frames - (frames - 1) % 4]
    encoder = watch_encoder(monkeypatch)
    run = make(
        tmp_path / "run", "--sections", 1, "--extend", source, "--height", HEIGHT, "--width", WIDTH,
        image=False,
    )  # fmt: skip
    assert run.record["frames"] == len(given) + 8
    # The clip of the new section begins two latents before it, and is blended in from there.
    kept = len(given) - 5
    np.testing.assert_array_equal(encoder[0], given[:kept])
    latents, before = run.latents(), len(given) // 4 + 1
    # Of a longer video, the first latent of the clip stands for one frame instead of four.
    positions = [0, *range(max(1, before - 20), before)]
    known = dict(zip(positions, pipe.encode_clip(given[-81:]), strict=True))
    if len(given) > 81:
        known[0] = pipe.encode_clip(given[:1])[0]
    assert latents.keys() == known.keys() | {before, before + 1}
    for position, z in known.items():
        np.testing.assert_array_equal(latents[position], z, err_msg=str(position))

    continued = source_from_frames(pipe.geometry, video.read_frames(source), HEIGHT, WIDTH)
    options = {"sections": 1, "height": HEIGHT, "width": WIDTH, "source_video": continued}
    (span,) = pipe.stream(None, "", **options, settings=pipeline.Settings(steps=2))
    assert span.start == kept and span.positions == (before, before + 1)
    np.testing.assert_array_equal(span.frames, encoder[kept])
    for position, z in zip(span.positions, span.latents, strict=True):
        np.testing.assert_array_equal(latents[position], z, err_msg=str(position))


def test_text_alone_begins_from_black(pipe, tmp_path) -> None:
    run = make(tmp_path / "run", "--sections", 1, "--prompt", "a red circle", image=False)
    black = np.zeros((1, 1, HEIGHT, WIDTH, 3), np.uint8)
    z = conditioning.clip_latents(*pipe.vae, black, pipe.latent_mean, pipe.latent_std)
    np.testing.assert_array_equal(run.latents()[0], np.asarray(z)[0, 0])


def test_any_even_size(tmp_path, capsys) -> None:
    run = make(tmp_path / "run", "--sections", 1, "--height", 58, "--width", 46)
    assert frames_of(run).shape == (9, 58, 46, 3)
    assert "58 x 46 pixels (the middle of 64 x 48)" in capsys.readouterr().out


def test_prompts_by_time(tmp_path, capsys) -> None:
    """Sections in time order have middles at 0.117 s and 0.383 s."""
    flags = ("--sections", 2, "--prompt-blend", 0, "--prompt")
    first, second = (make(tmp_path / p, *flags, p) for p in ("waves", "bows"))
    changing = make(tmp_path / "changing", *flags, "[0s: waves] [0.25s: bows]")
    assert "\n  from 0 s: waves\n  from 0.25 s: bows\n" in capsys.readouterr().out
    # The last in time is made first, so that it is that of the second prompt alone.
    for position in (3, 4):
        np.testing.assert_array_equal(changing.latents()[position], second.latents()[position])
    assert relative_error(changing.latents()[1], second.latents()[1]) > 1e-6
    assert relative_error(first.latents()[4], second.latents()[4]) > 1e-6
    blended = make(
        tmp_path / "blended", "--sections", 2, "--prompt-blend", 2, "--prompt",
        "0s: waves 0.25s: bows",
    )  # fmt: skip
    between = [relative_error(blended.latents()[4], r.latents()[4]) for r in (first, second)]
    assert min(between) > 1e-6


def test_prompt_times_that_cannot_be(tmp_path) -> None:
    with pytest.raises(SystemExit, match="0s, 4s, 2s"):
        make(tmp_path / "run", "--prompt", "0s: a 4s: b 2s: c")


def test_a_run_is_not_extended_into_itself(whole, tmp_path) -> None:
    run = copy(whole[F1], tmp_path / "run")
    for source in (run.folder, run.folder / "video.mp4"):
        with pytest.raises(SystemExit, match="holds the source of --extend"):
            command(run.folder, "--extend", source, "--overwrite", schedule=F1, image=False)
    assert_same_latents(run, whole[F1])


def test_a_run_of_another_rate_or_size_is_not_extended(whole, tmp_path) -> None:
    for flags in (("--fps", 24), ("--height", 32, "--width", 32)):
        with pytest.raises(SystemExit, match=f"{flags[0][2:]} = {flags[1]}, but run"):
            command(
                tmp_path / "run", "--extend", whole[F1].folder, *flags, schedule=F1, image=False
            )


def test_flags_that_change_nothing_are_told(tmp_path, recwarn) -> None:
    command(
        tmp_path / "run", "--sections", 1, "--latents-only", "--negative-prompt", "blurred",
        "--cfg-rescale", 0.7, "--prompt-blend", 2, "--seconds", 3, "--merge-lora",
        "--end-image-as", "still",
    )  # fmt: skip
    told = {str(warning.message).partition(" ")[0] for warning in recwarn}
    assert told == {
        "--negative-prompt", "--cfg-rescale", "--prompt-blend", "--seconds", "--merge-lora",
        "--end-image-as",
    }  # fmt: skip


def test_prompts_that_lead_no_section_are_named(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"prompt at 0.25 s, 'bows', leads no section"):
        command(
            tmp_path / "run", "--sections", 1, "--latents-only", "--prompt-blend", 0,
            "--prompt", "0s: waves 0.25s: bows",
        )  # fmt: skip
