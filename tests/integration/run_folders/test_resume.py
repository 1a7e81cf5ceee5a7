"""Run folders: what they hold, and runs that are resumed or decoded again."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

from framepack_jax import FramePack, video
from framepack_jax.cli import decode, resume
from framepack_jax.diffusion import sampler
from framepack_jax.generation import pipeline
from framepack_jax.jobs.inputs import saved_spec
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.models import registry
from framepack_jax.models.hunyuan import spec as hunyuan
from tests.fixtures.run_folders import (
    F1,
    HEIGHT,
    INVERTED,
    PHOTO,
    WIDTH,
    assert_same_latents,
    command,
    copy,
    frames_of,
    make,
    watch_encoder,
)


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
    assert "already finished" in capsys.readouterr().out
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


def test_frames_are_those_of_stream(whole, pipe, tmp_path, monkeypatch) -> None:
    """Frames given to the encoder are those of the same video in Python, without a run folder."""
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


def test_runs_from_before_there_were_guides_go_on_as_they_were(pictures, tmp_path) -> None:
    flags = ("--sections", 2, "--end-image", pictures["end"], "--latents-only")
    whole = make(tmp_path / "whole", *flags, "--end-image-as", "still")
    run = copy(whole, tmp_path / "run")
    (run.folder / "latents" / "section_001.npz").unlink()
    del run.record["flags"]["end_image_as"]
    run.write_record(status="begun")
    # A job that says nothing of it is that run, one that says otherwise is not.
    with pytest.raises(
        SystemExit, match=r"holds a run with these flags, begun; continue it with framepack resume"
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


def test_resumed_with_key_frames_and_end_image(pictures, tmp_path) -> None:
    flags = ("--sections", 2, "--end-image", pictures["end"])
    flags += ("--key-frame", f"0.2s={pictures['key']}", "--prompt", "0s: waves 0.2s: bows")
    whole, part = make(tmp_path / "whole", *flags), make(tmp_path / "part", *flags)
    (part.folder / "latents" / "section_001.npz").unlink()
    part.write_record(status="interrupted", spans=part.record["spans"][:1])
    resume.main([str(part.folder)])
    assert_same_latents(part, whole)


def test_a_rate_that_is_no_whole_number(tmp_path) -> None:
    """Also of a run that is stopped, whose segments are joined."""
    run = make(tmp_path / "run", "--sections", 3, "--fps", "29.97002997", schedule=F1)
    assert run.record["frames"] == 25
    (run.folder / "latents" / "section_002.npz").unlink()
    run.write_record(status="interrupted", spans=run.record["spans"][:1])
    resume.main([str(run.folder)])
    info = video.mp4_info(run.folder / "video.mp4")
    assert (info.frames, info.fps) == (25, 30000 / 1001)


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


def test_other_weights_are_noticed(whole, tmp_path) -> None:
    """Resumed, decoded or asked for again: a run does not go on with another network."""
    run = copy(whole[F1], tmp_path / "run")
    weights = json.loads(json.dumps(run.record["weights"]))
    weights["vae"]["sha256"] = "0" * 64
    run.write_record(status="interrupted", weights=weights)
    for again in (resume, decode):
        with pytest.raises(SystemExit, match="was started with another vae"):
            again.main([str(run.folder)])
    with pytest.raises(SystemExit, match="the vae of the bundle has changed"):
        command(run.folder, "--sections", 3, schedule=F1)


@pytest.mark.parametrize(("command", "flag"), [(resume, "--seed"), (decode, "--dtype")])
def test_options_of_the_video_come_from_the_run(whole, capsys, command, flag) -> None:
    """Commands that continue a video have no flags for the options that it was started with."""
    with pytest.raises(SystemExit) as ended:
        command.main([str(whole[F1].folder), flag, "5"])
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err
