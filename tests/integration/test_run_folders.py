"""Run folders, and what people put on the timeline: from the command line, with random weights."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

from framepack_jax import FramePack, bundle, conditioning, packing, video
from framepack_jax.cli import decode, resume, sample
from framepack_jax.diffusion import sampler
from framepack_jax.generation import pipeline
from framepack_jax.generation.request import footage_of
from framepack_jax.jobs.inputs import saved_spec
from framepack_jax.jobs.output_folder import make_output_folder
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.models import registry
from framepack_jax.models.hunyuan import spec as hunyuan
from tests.fixtures.paths import ROOT
from tests.fixtures.torch_reference import relative_error

PHOTO = ROOT / "examples" / "astronaut.jpg"
INVERTED, F1 = "f1k1_x_g2_f1k1f2k2f16k4_td", "f1k1_x_f16k4f2k2f1k1_g2"
HEIGHT, WIDTH = 64, 48


def command(output: Path, *flags: object, schedule: str = INVERTED, image: bool = True) -> None:
    """Run `sample.py` in this process, so that programs stay compiled."""
    common = ["--bundle", "random", "--schedule", schedule, "--steps", 2, "--output", output]
    if not {"--height", "--extend"} & {flag for flag in flags if isinstance(flag, str)}:
        common += ["--height", HEIGHT, "--width", WIDTH]
    if image:
        common += ["--image", PHOTO]
    sample.main([str(flag) for flag in (*common, *flags)])


def make(output: Path, *flags: object, **options) -> RunDir:
    """`command` for one video."""
    command(output, *flags, **options)
    return RunDir.open(output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, RunDir]:
    """An uninterrupted run of three sections for each order."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        schedule: make(folder / schedule, "--sections", 3, "--gif", schedule=schedule)
        for schedule in (INVERTED, F1)
    }


@pytest.fixture(scope="module")
def pipe() -> FramePack:
    return FramePack.load(bundle.BUILTIN_BUNDLES["random"], schedule=packing.parse(INVERTED))


def frames_of(run: RunDir) -> np.ndarray:
    return video.read_mp4(run.folder / "video.mp4")[0]


def gif_of(run: RunDir) -> list[np.ndarray]:
    with Image.open(run.folder / "video.gif") as gif:
        assert gif.info["loop"] == 0 and gif.info["duration"] == 50
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]


def test_a_gif_plays_as_long_as_the_video(whole) -> None:
    """20 frames a second of 25 at 30: 17, each the one that the video shows at its time."""
    frames, shown = frames_of(whole[F1]), gif_of(whole[F1])
    assert len(shown) == 17
    for number, frame in enumerate(shown):
        apart = [np.abs(frame.astype(int) - other).mean() for other in frames]
        assert abs(int(np.argmin(apart)) - 1.5 * number) <= 1


@pytest.mark.parametrize("schedule", [INVERTED, F1])
def test_a_run_folder_holds_all_of_a_run(whole, schedule: str) -> None:
    run = whole[schedule]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["status"] == "finished" and record["schedule"] == schedule
    assert record["flags"]["seed"] == 0 and len(record["timings"]["section_seconds"]) == 3
    assert sorted(run.latents()) == list(range(7))
    assert len(frames_of(run)) == record["frames"] == 25
    # Every frame is encoded once, in the segment of the section that made it final.
    spans = [tuple(span) for span in record["spans"]]
    lengths = {p.name: video.mp4_info(p).frames for p in (run.folder / "segments").iterdir()}
    assert lengths == {f"frames_{a:08d}.mp4": b - a for a, b in spans if b > a}
    assert sum(lengths.values()) == 25
    starts = [a for a, b in spans if b > a]
    assert starts == sorted(starts, reverse=schedule == INVERTED)


@pytest.mark.parametrize("schedule", [INVERTED, F1])
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_resumed_is_as_if_never_stopped(whole, tmp_path, schedule: str, kept: int) -> None:
    """With `kept` sections saved, of which the frames of the last are not written yet."""
    run = copy(whole[schedule], tmp_path / "run")
    for number in range(kept, 3):
        (run.folder / "latents" / f"section_{number:03d}.npz").unlink()
    run.write_record(status="begun", spans=run.record["spans"][: max(0, kept - 1)])
    (run.folder / "video.mp4").unlink()
    resume.main([str(run.folder)])
    assert_same_latents(run, whole[schedule])
    assert RunDir.open(run.folder).record["status"] == "finished"
    assert RunDir.open(run.folder).record["spans"] == whole[schedule].record["spans"]
    # The encoder's threads leave it some freedom, the frames it is given do not change.
    assert np.abs(frames_of(run).astype(int) - frames_of(whole[schedule])).mean() < 2


def test_a_finished_run_is_left_alone(whole, capsys) -> None:
    before = (whole[F1].folder / "video.mp4").stat().st_mtime_ns
    resume.main([str(whole[F1].folder)])
    assert "finished already" in capsys.readouterr().out
    assert (whole[F1].folder / "video.mp4").stat().st_mtime_ns == before


def test_latents_now_and_frames_later(whole, tmp_path) -> None:
    run = make(tmp_path / "run", "--sections", 3, "--latents-only", "--gif")
    assert run.record["status"] == "sampled" and not (run.folder / "video.mp4").exists()
    assert_same_latents(run, whole[INVERTED])
    decode.main([str(run.folder)])
    assert len(frames_of(run)) == 25 and RunDir.open(run.folder).record["status"] == "finished"
    assert gif_of(run)[0].shape == (HEIGHT, WIDTH, 3)


def test_frames_are_written_while_the_next_section_is_made(tmp_path, monkeypatch) -> None:
    """Two steps a section: the second is under way when the first calls back."""
    seen = []

    def noted(place: object, name: str) -> None:
        original = getattr(place, name)

        def call(*args):
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(place, name, call)

    noted(sampler, "step")
    noted(FramePack, "start_clip")
    noted(RunDir, "save_section")
    noted(RunDir, "add_span")
    make(tmp_path / "run", "--sections", 3, schedule=F1)
    section = ["save_section", "start_clip"]
    following = ["step", "step", "add_span", *section]
    assert seen == ["step", "step", *section, *following, *following, "add_span"]


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_frames_on_their_way_are_written_before_a_stop(whole, tmp_path, monkeypatch, stop) -> None:
    """In the first step of the second section, those of the first."""
    calls, step = itertools.count(), sampler.step

    def stopped(*args):
        if next(calls) == 2:
            raise stop
        return step(*args)

    monkeypatch.setattr(sampler, "step", stopped)
    with pytest.raises(SystemExit):
        command(tmp_path / "run", "--sections", 3, schedule=F1)
    run = RunDir.open(tmp_path / "run")
    assert run.record["spans"] == whole[F1].record["spans"][:1] and len(frames_of(run)) == 4
    monkeypatch.setattr(sampler, "step", step)
    resume.main([str(run.folder)])
    assert_same_latents(RunDir.open(run.folder), whole[F1])


def test_decoding_a_part_gives_what_is_final(whole, tmp_path) -> None:
    run = copy(whole[F1], tmp_path / "run")
    (run.folder / "latents" / "section_002.npz").unlink()
    decode.main([str(run.folder)])
    # The third clip would be cross-faded with the second from frame 12 on.
    assert len(frames_of(run)) == 12
    assert np.abs(frames_of(run).astype(int) - frames_of(whole[F1])[:12]).mean() < 2


def watch_encoder(monkeypatch) -> dict[int, np.ndarray]:
    """The frames that segments are made of from now on, by the number of the first."""
    given, write = {}, video.write_mp4

    def watch(path, frames, **encoding) -> None:
        frames = np.stack(list(frames))
        given[int(Path(path).stem.removeprefix("frames_"))] = frames
        write(path, frames, **encoding)

    monkeypatch.setattr(video, "write_mp4", watch)
    return given


def test_frames_are_those_of_stream(whole, pipe, tmp_path, monkeypatch) -> None:
    """What the encoder is given, against the same video in Python, without a run folder."""
    image, settings = video.load_image(PHOTO), pipeline.Settings(steps=2)
    options = {"sections": 3, "height": HEIGHT, "width": WIDTH, "settings": settings}
    spans = list(pipe.stream(image, "", **options))
    given = watch_encoder(monkeypatch)
    decode.main([str(copy(whole[INVERTED], tmp_path / "run").folder)])
    assert sorted(given) == sorted(span.start for span in spans if len(span.frames))
    latents = whole[INVERTED].latents()
    for span in spans:
        if len(span.frames):
            assert span.frames.dtype == np.uint8
            np.testing.assert_array_equal(given[span.start], span.frames)
        for position, z in zip(span.positions, span.latents, strict=True):
            np.testing.assert_array_equal(z, latents[position])
    covered = sorted(i for s in spans for i in range(s.start, s.start + len(s.frames)))
    assert covered == list(range(25))


def still(pipe: FramePack, image: np.ndarray, frames: int = 5) -> np.ndarray:
    """The last latent of a clip of equal frames: of five, it stands for the last four."""
    image = video.resize_center_crop(image, HEIGHT, WIDTH)
    cfg, params = pipe.vae.cfg, pipe.vae.params
    clip = np.stack([image] * frames)[None]
    return np.asarray(
        conditioning.clip_latents(cfg, params, clip, pipe.latent_mean, pipe.latent_std)
    )[0, -1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Two pictures unlike the photograph."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("end", "key"):
        coarse = rng.integers(0, 256, (4, 3, 3), dtype=np.uint8)
        video.save_png(folder / f"{name}.png", np.kron(coarse, np.ones((16, 16, 1), np.uint8)))
    return {name: folder / f"{name}.png" for name in ("end", "key")}


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


def test_runs_from_before_there_were_guides_go_on_as_they_were(pictures, tmp_path) -> None:
    flags = ("--sections", 2, "--end-image", pictures["end"], "--latents-only")
    whole = make(tmp_path / "whole", *flags, "--end-image-as", "still")
    run = copy(whole, tmp_path / "run")
    (run.folder / "latents" / "section_001.npz").unlink()
    del run.record["flags"]["end_image_as"]
    run.write_record(status="begun")
    # A job that says nothing of it is that run, one that says otherwise is not.
    with pytest.raises(
        SystemExit, match=r"holds a run of these flags, begun; go on with framepack resume"
    ):
        command(run.folder, *flags)
    with pytest.raises(SystemExit, match="end_image_as = 'still' there, 'guide' here"):
        command(run.folder, *flags, "--end-image-as", "guide")
    resume.main([str(run.folder), "--latents-only"])
    assert_same_latents(run, whole)


def test_records_of_the_first_format_are_read_under_todays_names(whole, tmp_path) -> None:
    run = copy(whole[F1], tmp_path / "run")
    assert run.record["format"] == 2 and run.record["flags"]["distilled_guidance"] == 10
    names = {"distilled_guidance": "guidance", "cfg_scale": "cfg", "cache_threshold": "threshold"}
    flags = {names.get(name, name): value for name, value in run.record["flags"].items()}
    assert set(names.values()) < set(flags)
    record = run.record | {"format": 1, "flags": flags | {"cfg": 1.5}, "memory": "low"}
    del record["offload"]
    (run.folder / "run.json").write_text(json.dumps(record))
    again = RunDir.open(run.folder)
    flags = run.record["flags"] | {"cfg_scale": 1.5}
    assert again.record == run.record | {"flags": flags, "offload": "full"}
    assert saved_spec(again).settings() == pipeline.Settings(steps=2, cfg_scale=1.5)


def test_the_end_image_is_read_by_what_comes_before(pipe, pictures, tmp_path) -> None:
    """It changes the section that is made with it in sight, not only its own latent."""
    plan = packing.plan(packing.parse(INVERTED), 2, after=1)
    nearest = [group for group in plan[0].groups if group.kernel == "k1"][-1]
    assert nearest.reads == (5,) and plan[0].decode == (3, 6)
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
    assert forward[0].targets == (7, 8) and forward[0].decode == (5, 9)
    inverted = packing.plan(packing.parse(INVERTED), 2, before=7)
    assert [s.targets for s in inverted] == [(9, 10), (7, 8)]
    assert all((6,) in [g.reads for g in s.groups] for s in inverted)
    assert [s.decode for s in inverted] == [(9, 11), (5, 11)]
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

    footage = footage_of(pipe.geometry, video.read_frames(source), HEIGHT, WIDTH)
    options = {"sections": 1, "height": HEIGHT, "width": WIDTH, "footage": footage}
    (span,) = pipe.stream(None, "", **options, settings=pipeline.Settings(steps=2))
    assert span.start == kept and span.positions == (before, before + 1)
    np.testing.assert_array_equal(span.frames, encoder[kept])
    for position, z in zip(span.positions, span.latents, strict=True):
        np.testing.assert_array_equal(latents[position], z, err_msg=str(position))


def test_text_alone_begins_from_black(pipe, tmp_path) -> None:
    run = make(tmp_path / "run", "--sections", 1, "--prompt", "a red circle", image=False)
    black = np.zeros((1, 1, HEIGHT, WIDTH, 3), np.uint8)
    z = conditioning.clip_latents(
        pipe.vae.cfg, pipe.vae.params, black, pipe.latent_mean, pipe.latent_std
    )
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


def test_a_batch_gives_the_videos_of_single_runs(tmp_path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    lines = [
        {"name": "one", "prompt": "waves", "seed": 3},
        {"name": "two", "prompt": "bows and smiles at the camera", "seed": 4},
        {"name": "three", "prompt": "", "seed": 3},
    ]
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command(tmp_path / "batch", "--sections", 2, "--jobs", jobs, "--batch", 3)
    for line in lines:
        flags = ("--sections", 2, "--prompt", line["prompt"], "--seed", line["seed"])
        alone = make(tmp_path / line["name"], *flags)
        together = RunDir.open(tmp_path / "batch" / line["name"])
        for position, z in alone.latents().items():
            assert relative_error(together.latents()[position], z) < 1e-5
        assert np.abs(frames_of(together).astype(int) - frames_of(alone)).mean() < 2


def test_jobs_go_on_where_they_were(tmp_path, capsys) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"seed": 1}\n{"promt": "x"}\n\n{"image": "nowhere.png"}\n{"seed": "2"}\n[1]\n')
    with pytest.raises(SystemExit, match="4 of 5 videos were not made") as error:
        command(tmp_path / "out", "--sections", 1, "--jobs", jobs)
    for named in (
        "line 2: 'promt'",
        "nowhere.png",
        "line 5: seed = '2': expected a whole number",
        "line 6",
    ):
        assert named in str(error.value)
    assert RunDir.open(tmp_path / "out" / "job_0001").record["status"] == "finished"
    before = (tmp_path / "out" / "job_0001" / "video.mp4").stat().st_mtime_ns
    jobs.write_text('{"seed": 1}\n')
    capsys.readouterr()
    command(tmp_path / "out", "--sections", 1, "--jobs", jobs)
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "out" / "job_0001" / "video.mp4").stat().st_mtime_ns == before


def test_the_section_being_made_is_shown(tmp_path, monkeypatch) -> None:
    shown, save = [], video.save_png

    def watch(path, image) -> None:
        if Path(path).name == "preview.png":
            shown.append(np.asarray(image))
        save(path, image)

    monkeypatch.setattr(video, "save_png", watch)
    make(tmp_path / "run", "--sections", 2, "--steps", 8)
    # Four times a section, and the contact sheet at the end.
    assert len(shown) == 2 * 4 + 1
    assert all((a != b).any() for a, b in itertools.pairwise(shown[:8]))


def test_other_files_are_never_removed(tmp_path) -> None:
    (tmp_path / "inputs").mkdir()
    shutil.copy(PHOTO, tmp_path / "inputs" / "photo.jpg")
    for more in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match="has a inputs that is no run's"):
            command(tmp_path, "--sections", 1, *more)
    assert (tmp_path / "inputs" / "photo.jpg").exists()
    run = make(tmp_path / "run", "--sections", 1, "--latents-only")
    shutil.copy(PHOTO, run.folder / "inputs" / "photo.jpg")
    make(run.folder, "--sections", 2, "--latents-only", "--overwrite")
    assert (run.folder / "inputs" / "photo.jpg").exists()
    assert sorted(run.latents()) == list(range(5))


def test_resumed_with_key_frames_and_end_image(pictures, tmp_path) -> None:
    flags = ("--sections", 2, "--end-image", pictures["end"])
    flags += ("--key-frame", f"0.2s={pictures['key']}", "--prompt", "0s: waves 0.2s: bows")
    whole, part = make(tmp_path / "whole", *flags), make(tmp_path / "part", *flags)
    (part.folder / "latents" / "section_001.npz").unlink()
    part.write_record(status="interrupted", spans=part.record["spans"][:1])
    resume.main([str(part.folder)])
    assert_same_latents(part, whole)


def test_a_seed_is_drawn_and_kept(tmp_path, capsys) -> None:
    """-1 draws another for every video; the same jobs again keep those that were drawn."""
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"seed": -1}\n{"seed": -1}\n')
    flags = ("--sections", 1, "--latents-only", "--jobs", jobs)
    command(tmp_path / "out", *flags)
    seeds = [RunDir.open(tmp_path / "out" / f"job_000{i}").record["flags"]["seed"] for i in (1, 2)]
    assert seeds[0] != seeds[1] and min(seeds) >= 0
    printed = capsys.readouterr().out
    assert all(f"seed {seed}\n" in printed for seed in seeds)
    command(tmp_path / "out", *flags)
    assert capsys.readouterr().out.count("finished already") == 2
    again = make(tmp_path / "again", "--sections", 1, "--latents-only", "--seed", seeds[0])
    assert_same_latents(again, RunDir.open(tmp_path / "out" / "job_0001"))


def test_seeds_of_64_bits() -> None:
    """Below 2**32 they are jax's, above it all bits count."""
    seeds = [7, 2**31 + 7, 2**32 + 7, 2**63 + 7, 2**64 - 1]
    keys = [jax.random.key_data(pipeline._key(seed)) for seed in seeds]
    for key, seed in zip(keys[:2], seeds, strict=False):
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(seed)))
    assert len({tuple(map(int, key)) for key in keys}) == len(seeds)


def test_a_rate_that_is_no_whole_number(tmp_path) -> None:
    """Also of a run that is stopped, whose segments are joined."""
    run = make(tmp_path / "run", "--sections", 3, "--fps", "29.97002997", schedule=F1)
    assert run.record["frames"] == 25
    (run.folder / "latents" / "section_002.npz").unlink()
    run.write_record(status="interrupted", spans=run.record["spans"][:1])
    resume.main([str(run.folder)])
    info = video.mp4_info(run.folder / "video.mp4")
    assert (info.frames, info.fps) == (25, 30000 / 1001)


def test_a_run_is_not_extended_into_itself(whole, tmp_path) -> None:
    run = copy(whole[F1], tmp_path / "run")
    for source in (run.folder, run.folder / "video.mp4"):
        with pytest.raises(SystemExit, match="holds what --extend names"):
            command(run.folder, "--extend", source, "--overwrite", schedule=F1, image=False)
    assert_same_latents(run, whole[F1])


def test_a_failed_decoding_does_not_pass_for_a_finished_run(whole, tmp_path, monkeypatch) -> None:
    run, start = copy(whole[F1], tmp_path / "run"), FramePack.start_clip
    calls = itertools.count()

    def full(*args, **options):
        if next(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nat length")
        return start(*args, **options)

    monkeypatch.setattr(FramePack, "start_clip", full)
    with pytest.raises(SystemExit, match=r"error: out of memory \(RESOURCE.*--vae-tile"):
        decode.main([str(run.folder)])
    assert RunDir.open(run.folder).record["status"] == "sampled"
    resume.main([str(run.folder)])
    assert len(frames_of(run)) == 25 and RunDir.open(run.folder).record["status"] == "finished"


@pytest.mark.parametrize("damage", [b"", b"not an mp4"])
def test_a_damaged_segment_is_made_again(whole, tmp_path, damage: bytes) -> None:
    run = copy(whole[F1], tmp_path / "run")
    run.write_record(status="interrupted")
    (run.folder / "segments" / "frames_00000004.mp4").write_bytes(damage)
    resume.main([str(run.folder)])
    assert len(frames_of(run)) == 25


def test_frames_that_are_not_finite_are_no_video(tmp_path, monkeypatch) -> None:
    spec = dataclasses.replace(hunyuan.VAE, decode=lambda *args: hunyuan.VAE.decode(*args) * np.nan)
    monkeypatch.setitem(registry.NETWORKS, "hunyuan_vae", spec)
    with pytest.raises(SystemExit, match=r"latents 0 to 2 are not finite in float32"):
        command(tmp_path / "run", "--sections", 1)
    run = RunDir.open(tmp_path / "run")
    assert run.record["status"] == "failed" and sorted(run.latents()) == [0, 1, 2]


def test_a_run_of_another_rate_or_size_is_not_extended(whole, tmp_path) -> None:
    for flags in (("--fps", 24), ("--height", 32, "--width", 32)):
        with pytest.raises(SystemExit, match=f"{flags[0][2:]} = {flags[1]}, but run"):
            command(
                tmp_path / "run", "--extend", whole[F1].folder, *flags, schedule=F1, image=False
            )


def test_a_changed_image_is_another_run(tmp_path) -> None:
    image = tmp_path / "image.png"
    shutil.copy(PHOTO, image)
    flags = ("--sections", 1, "--latents-only", "--image", image)
    make(tmp_path / "run", *flags, image=False)
    video.save_png(image, np.zeros((64, 48, 3), np.uint8))
    with pytest.raises(SystemExit, match=r"image.png has changed"):
        make(tmp_path / "run", *flags, image=False)


def test_other_weights_are_noticed(whole, tmp_path) -> None:
    """Resumed, decoded or asked for again: a run does not go on with another network."""
    run = copy(whole[F1], tmp_path / "run")
    weights = json.loads(json.dumps(run.record["weights"]))
    weights["vae"]["sha256"] = "0" * 64
    run.write_record(status="interrupted", weights=weights)
    for again in (resume, decode):
        with pytest.raises(SystemExit, match="was begun with another vae"):
            again.main([str(run.folder)])
    with pytest.raises(SystemExit, match="the vae of the bundle has changed"):
        command(run.folder, "--sections", 3, schedule=F1)


def test_a_finished_job_needs_its_image_no_more(tmp_path, capsys) -> None:
    image, jobs = tmp_path / "image.png", tmp_path / "jobs.jsonl"
    shutil.copy(PHOTO, image)
    jobs.write_text(json.dumps({"image": str(image), "name": "one"}), encoding="utf-8-sig")
    flags = ("--sections", 1, "--latents-only", "--jobs", jobs)
    command(tmp_path / "out", *flags, image=False)
    image.unlink()
    command(tmp_path / "out", *flags, image=False)
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "flag"), [(resume, "--seed"), (decode, "--dtype")])
def test_options_of_the_video_come_from_the_run(whole, capsys, command, flag) -> None:
    """What the video was started with is no flag of the commands that continue it."""
    with pytest.raises(SystemExit) as ended:
        command.main([str(whole[F1].folder), flag, "5"])
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


def test_one_run_is_not_made_twice_at_once(whole, tmp_path) -> None:
    run = copy(whole[F1], tmp_path / "run")
    run.write_record(status="interrupted")
    run.lock()
    with pytest.raises(SystemExit, match="is being made by another process"):
        resume.main([str(run.folder)])
    run.unlock()
    resume.main([str(run.folder)])


def during_the_first_section(monkeypatch, work) -> None:
    """Call `work` once, when the next section is saved."""
    save = RunDir.save_section

    def saved(*args) -> None:
        monkeypatch.setattr(RunDir, "save_section", save)
        save(*args)
        work()

    monkeypatch.setattr(RunDir, "save_section", saved)


def job_files(folder: Path) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """Flags for the jobs one and two, and for two alone."""
    lines = ['{"name": "one", "seed": 1}\n', '{"name": "two", "seed": -1}\n']
    (folder / "both.jsonl").write_text("".join(lines))
    (folder / "second.jsonl").write_text(lines[1])
    flags = ("--sections", 1, "--jobs")
    return (*flags, folder / "both.jsonl"), (*flags, folder / "second.jsonl")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_finishes_is_not_made_again(
    tmp_path, monkeypatch, capsys, overwrite: bool
) -> None:
    """While the first job is made, another process begins and finishes the second."""
    both, second = job_files(tmp_path)
    flags = ("--overwrite",) if overwrite else ()
    if overwrite:
        command(tmp_path / "out", *second)
    made = []

    def other() -> None:
        command(tmp_path / "out", *second, *flags)
        made.append((tmp_path / "out" / "two" / "video.mp4").stat())

    during_the_first_section(monkeypatch, other)
    command(tmp_path / "out", *both, *flags)
    assert "two: finished by another process" in capsys.readouterr().out
    now = (tmp_path / "out" / "two" / "video.mp4").stat()
    assert (now.st_ino, now.st_mtime_ns) == (made[0].st_ino, made[0].st_mtime_ns)
    assert RunDir.open(tmp_path / "out" / "one").record["status"] == "finished"


def test_what_another_process_makes_is_left_to_it(tmp_path, monkeypatch, capsys) -> None:
    """Unless it ends before it has finished: then it is made by those who are left."""
    both, _ = job_files(tmp_path)
    (tmp_path / "out" / "one").mkdir(parents=True)
    other = RunDir(tmp_path / "out" / "one", {})
    other.lock()
    command(tmp_path / "out", *both, "--latents-only")
    assert "left to other processes, which are making them: " in capsys.readouterr().out
    assert not (other.folder / "run.json").exists()
    assert RunDir.open(tmp_path / "out" / "two").record["status"] == "sampled"
    during_the_first_section(monkeypatch, other.unlock)
    command(tmp_path / "out", *both, "--overwrite")
    assert RunDir.open(other.folder).record["status"] == "finished"


def test_output_folders_by_default_never_meet(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({make_output_folder(PHOTO) for _ in range(5)}) == 5
    with pytest.raises(SystemExit, match="steps = 0"):
        sample.main(["--bundle", "random", "--image", str(PHOTO), "--steps", "0"])
    assert len(list((tmp_path / "outputs").iterdir())) == 5


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


def copy(run: RunDir, folder: Path) -> RunDir:
    shutil.copytree(run.folder, folder)
    return RunDir.open(folder)


def assert_same_latents(run: RunDir, expected: RunDir) -> None:
    ours, theirs = run.latents(), expected.latents()
    assert ours.keys() == theirs.keys()
    for position, z in theirs.items():
        np.testing.assert_array_equal(ours[position], z)
