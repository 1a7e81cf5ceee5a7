"""Whatever is wrong with the input is said in a line, and nothing that was made is lost by it.

All through the command line, at the size and length that one compilation serves.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framepack_jax import bundle, video
from framepack_jax.cli import decode, resume, sample
from framepack_jax.generation import pipeline
from framepack_jax.jobs import run_dir, run_files
from tests.fixtures.paths import ROOT

RANDOM = bundle.BUILTIN_BUNDLES["random"]
PHOTO = ROOT / "examples" / "astronaut.jpg"
SCHEDULE = "f1k1_x_g2_f1k1f2k2f16k4_td"
# Colours of the quarters of a picture: top left, top right, bottom left, bottom right.
RED, GREEN, BLUE, WHITE = (220, 20, 30), (20, 200, 40), (10, 30, 210), (255, 255, 255)
QUARTERS = (RED, GREEN, BLUE, WHITE)
ORIENTATION = 0x0112


def command(output: Path, *flags: object, **replaced: object) -> None:
    """`sample.py` with the flags of a small run; `replaced` are others, None leaves one out."""
    values = {
        "bundle": "random", "image": PHOTO, "prompt": "she waves", "height": 64, "width": 80,
        "sections": 2, "steps": 1, "schedule": SCHEDULE, "output": output,
    } | replaced  # fmt: skip
    given = [(f"--{k.replace('_', '-')}", v) for k, v in values.items() if v is not None]
    sample.main([str(part) for pair in given for part in pair] + [str(flag) for flag in flags])


def refused(output: Path, *flags: object, **replaced: object) -> str:
    """The error of a command that must end with one."""
    with pytest.raises(SystemExit) as ended:
        command(output, *flags, **replaced)
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("error: "), message
    assert "\n" not in message and "Traceback" not in message
    return message


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def change_record(folder: Path, **changes: object) -> None:
    (folder / "run.json").write_text(json.dumps(record_of(folder) | changes))


def latents_of(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.load(file)["latents"] for file in (folder / "latents").glob("*.npz")}


def check_same_latents(folder: Path, whole: Path) -> None:
    latents, expected = latents_of(folder), latents_of(whole)
    assert latents.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(latents[name], expected[name], err_msg=name)


def check_finished(folder: Path, whole: Path) -> None:
    """The run is there in full, and its latents are those of another."""
    assert record_of(folder)["status"] == "finished"
    check_same_latents(folder, whole)
    assert video.mp4_info(folder / "video.mp4").frames == record_of(folder)["frames"]


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """The weights of the bundle are read once: that is most of the time of so small a run."""
    load, kept = bundle.load_params, {}

    def load_params(root: Path, manifest: bundle.Manifest, name: str, **options: object) -> object:
        if Path(root) != RANDOM:
            return load(root, manifest, name, **options)
        key = name, *options.values()
        if key not in kept:
            kept[key] = load(root, manifest, name, **options)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "load_params", load_params)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of two sections."""
    folder = tmp_path_factory.mktemp("whole")
    command(folder)
    return folder


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """The same run as if it had been stopped just before its end."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    change_record(folder, status="interrupted")
    return folder


# Images


def quarters(height: int = 128, width: int = 160) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    halves = [(r, c) for r in (slice(height // 2), slice(height // 2, None))
              for c in (slice(width // 2), slice(width // 2, None))]  # fmt: skip
    for place, colour in zip(halves, QUARTERS, strict=True):
        picture[place] = colour
    return picture


def save_rgba(folder: Path) -> tuple[Path, np.ndarray]:
    """Transparent where it is white when laid on white, and stored as black there."""
    picture = quarters()
    clear = (picture == 255).all(axis=-1)
    stored = np.dstack([np.where(clear[..., None], 0, picture), np.where(clear, 0, 255)])
    Image.fromarray(stored.astype(np.uint8), "RGBA").save(folder / "rgba.png")
    return folder / "rgba.png", picture


def save_grey(folder: Path) -> tuple[Path, np.ndarray]:
    grey = Image.fromarray(quarters()).convert("L")
    grey.save(folder / "grey.png")
    return folder / "grey.png", np.dstack([np.asarray(grey)] * 3)


def save_cmyk(folder: Path) -> tuple[Path, np.ndarray]:
    Image.fromarray(quarters()).convert("CMYK").save(folder / "cmyk.tif")
    return folder / "cmyk.tif", quarters()


def save_sixteen_bits(folder: Path) -> tuple[Path, np.ndarray]:
    grey = np.asarray(Image.fromarray(quarters()).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    return folder / "sixteen.png", np.dstack([grey] * 3)


def save_rotated(folder: Path) -> tuple[Path, np.ndarray]:
    """Lying on its side, with the note that it is to be turned by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.rot90(quarters()).copy()).save(folder / "rotated.png", exif=exif)
    return folder / "rotated.png", quarters()


SAVES = [save_rgba, save_grey, save_cmyk, save_sixteen_bits, save_rotated]


def test_images_of_any_kind_begin_their_videos(tmp_path) -> None:
    pictures = [save(tmp_path) for save in SAVES]
    jobs = [{"image": str(path), "name": path.stem} for path, _ in pictures]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    output = tmp_path / "made"
    command(output, "--latents-only", jobs=tmp_path / "jobs.jsonl", image=None)
    for path, expected in pictures:
        used = np.asarray(Image.open(output / path.stem / "inputs" / "image.png"))
        assert used.shape == (64, 80, 3)
        # Amid the quarters, away from where they are blurred into each other.
        for row, column in ((16, 20), (16, 60), (48, 20), (48, 60)):
            np.testing.assert_allclose(used[row, column], expected[2 * row, 2 * column], atol=2)
        assert record_of(output / path.stem)["status"] == "sampled"
    known = [latents_of(output / path.stem)["known.npz"] for path, _ in pictures]
    # The transparent one, the inks and the one turned upright are one picture; the greys another.
    np.testing.assert_allclose(known[0], known[2], atol=0.05)
    np.testing.assert_array_equal(known[0], known[4])
    np.testing.assert_array_equal(known[1], known[3])
    assert np.abs(known[0] - known[1]).max() > 0.1


def text_file(path: Path) -> None:
    path.write_text("no image")


def cut_photo(path: Path) -> None:
    path.write_bytes(PHOTO.read_bytes()[:20000])


def one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1)).save(path)


def huge(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: None, "No such file"),
        (text_file, "cannot identify image file"),
        (cut_photo, "truncated"),
        (lambda path: path.touch(), "cannot identify image file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (one_pixel, "is 1 x 1 pixels"),
        (huge, "20000 x 20000 pixels"),
    ],
    ids=["absent", "text", "cut", "empty", "folder", "1x1", "20000x20000"],
)
@pytest.mark.parametrize("flag", ["image", "end_image", "key_frame"])
def test_images_that_cannot_be_used(tmp_path, make, named, flag) -> None:
    path = tmp_path / "picture.png"
    make(path)
    message = refused(tmp_path / "run", **{flag: f"0.2s={path}" if flag == "key_frame" else path})
    assert f"image {path} " in message and named in message
    assert not (tmp_path / "run").exists()


# Prompts


@pytest.mark.parametrize("prompt", ["", " \n", "她在雨中跳舞 — naïve café 👩‍🚀🌧️", "\u202e\x07"])
def test_prompts_of_any_kind(tmp_path, prompt) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        command(tmp_path, "--latents-only", prompt=prompt)
    assert record_of(tmp_path)["flags"]["prompt"] == prompt
    assert np.isfinite(latents_of(tmp_path)["section_001.npz"]).all()


def test_a_prompt_of_ten_thousand_words_is_cut_with_a_warning(tmp_path) -> None:
    prompt = " ".join(f"word{number}" for number in range(10_000))
    with pytest.warns(UserWarning, match="too long") as said:
        command(tmp_path, "--latents-only", prompt=prompt)
    # CLIP reads no more than the gist, and says nothing.
    (warning,) = [w for w in said if issubclass(w.category, UserWarning)]
    last = str(warning.message).partition('"... ')[2].partition('"')[0].split()
    assert len(last) >= 2 and " ".join(last[:-1]) in prompt
    assert record_of(tmp_path)["flags"]["prompt"] == prompt


# Numbers


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"seconds": "0"}, "seconds = 0.0"),
        ({"seconds": "-3"}, "seconds = -3.0"),
        ({"seconds": "nan"}, "seconds = nan"),
        ({"seconds": "inf"}, "seconds = inf"),
        ({"seconds": "1e12"}, "seconds = 1000000000000.0"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": -1}, "fps is -1"),
        ({"fps": 10**9}, "fps is 1000000000"),
        ({"distilled_guidance": "nan"}, "distilled_guidance = nan"),
        ({"cfg_scale": "inf"}, "cfg_scale = inf"),
        ({"cfg_rescale": "nan"}, "cfg_rescale = nan"),
        ({"prompt_blend": "nan"}, "prompt_blend = nan"),
        ({"prompt_blend": "-1"}, "prompt_blend = -1"),
        ({"step_cache": "tea", "cache_threshold": "nan"}, "threshold of the step cache = nan"),
        ({"batch": 0}, "batch = 0"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be(tmp_path, flags, named) -> None:
    lengths = {"sections": None} if "seconds" in flags else {}
    assert named in refused(tmp_path / "run", **flags, **lengths)
    assert not (tmp_path / "run" / "run.json").exists()


# Bundles


def without(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        fields = json.loads((root / "bundle.json").read_text())
        change(fields)
        (root / "bundle.json").write_text(json.dumps(fields))

    return write


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (shutil.rmtree, "is no bundle"),
        (without("bundle.json"), "has no bundle.json"),
        (lambda root: cut_short(root / "bundle.json"), "bundle.json is damaged"),
        (manifest(lambda m: m.update(format=2)), "has format 2, this version reads format 1"),
        (manifest(lambda m: m["roles"].pop("vae")), "has no vae; make one"),
        (manifest(lambda m: m.pop("latent_mean")), "damaged (latent_mean is missing)"),
        (without("vae"), "the parameters of vae are missing at"),
        (without("transformer"), "the parameters of transformer are missing at"),
        (without("tokenizer"), "no tokenizer in"),
    ],
    ids=[
        "missing",
        "half-written",
        "cut",
        "format",
        "role",
        "field",
        "vae",
        "transformer",
        "words",
    ],
)
def test_bundles_that_cannot_be_used(tmp_path, change, named) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(RANDOM, root)
    change(root)
    assert named in refused(tmp_path / "run", bundle=root)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_schedule_that_the_network_has_no_kernels_for(tmp_path) -> None:
    message = refused(tmp_path / "run", schedule="f1k1_x_g2_f1k1f2k2f16k8_td")
    assert "kernel k8" in message and "k1, k2, k4" in message
    assert not (tmp_path / "run").exists()


# Folders


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/framepack"])
def test_folders_that_cannot_be_written(tmp_path, place) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / place
    assert f"output folder {output} cannot be written" in refused(output)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_of_other_flags_is_not_replaced(stopped, whole) -> None:
    message = refused(stopped, prompt="he sits", seed=4)
    assert f"{stopped} already holds a run of other flags" in message
    assert "prompt = 'she waves' there, 'he sits' here" in message and "seed = 0 there" in message
    assert f"go on with framepack resume {stopped}" in refused(stopped)
    check_same_latents(stopped, whole)


@pytest.mark.parametrize("command", [resume, decode])
def test_folders_that_hold_no_run(tmp_path, command) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(SystemExit, match=f"error: {folder} holds no run: it has no run.json"):
            command.main([str(folder)])


# Files of a run that are damaged


def test_latents_cut_short_are_made_again(stopped, whole, capsys) -> None:
    file = stopped / "latents" / "section_001.npz"
    cut_short(file)
    resume.main([str(stopped)])
    said = capsys.readouterr().err
    assert f"{file} is damaged" in said and "section 2 is made again" in said
    check_finished(stopped, whole)


def test_latents_of_the_first_section_cut_short(stopped, whole, capsys) -> None:
    cut_short(stopped / "latents" / "section_000.npz")
    resume.main([str(stopped)])
    assert "section 1 is made again" in capsys.readouterr().err
    check_finished(stopped, whole)


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
def test_given_latents_are_encoded_again(stopped, whole, capsys, damage) -> None:
    file = stopped / "latents" / "known.npz"
    damage(file)
    resume.main([str(stopped)])
    said = capsys.readouterr().err
    assert str(file) in said and "it is made again" in said
    check_finished(stopped, whole)


def test_a_video_cut_short_is_joined_again(stopped, whole) -> None:
    cut_short(stopped / "video.mp4")
    resume.main([str(stopped)])
    check_finished(stopped, whole)


@pytest.mark.parametrize(("name", "named"), [
    ("run.json", "run.json cannot be read"), ("inputs/image.png", "inputs/image.png is damaged"),
])  # fmt: skip
def test_what_cannot_be_made_again_is_named(stopped, whole, name, named) -> None:
    cut_short(stopped / name)
    for command in (resume, decode):
        with pytest.raises(SystemExit) as ended:
            command.main([str(stopped)])
        message = str(ended.value)
        assert str(stopped) in message and named in message and "--overwrite" in message
    check_same_latents(stopped, whole)


# A disk that is full


@pytest.mark.parametrize(
    "name",
    [
        "latents/section_001.npz",
        "segments/frames_00000000.mp4",
        "video.mp4",
        "preview.png",
        "run.json",
    ],
)
def test_a_full_disk_stops_a_run_that_goes_on_later(
    tmp_path, whole, monkeypatch, capsys, name
) -> None:
    begin = run_dir.RunDir.begin

    def begin_on_full_disk(self: run_dir.RunDir, *given: object) -> None:
        begin(self, *given)
        # All that is written to this file meets a full disk; once it is removed, there is space.
        (self.folder / f"{name}.part").symlink_to("/dev/full")

    monkeypatch.setattr(run_dir.RunDir, "begin", begin_on_full_disk)
    message = refused(tmp_path)
    assert "No space left on device" in message and str(tmp_path / name) in message
    assert record_of(tmp_path)["status"] == "failed"
    assert f"framepack resume {tmp_path}" in capsys.readouterr().err
    expected = latents_of(whole)
    for file, latents in latents_of(tmp_path).items():
        np.testing.assert_array_equal(latents, expected[file])
    resume.main([str(tmp_path)])
    check_finished(tmp_path, whole)


@pytest.mark.parametrize("name", ["inputs/image.png", "latents/known.npz", "run.json"])
def test_a_full_disk_at_the_beginning(tmp_path, whole, monkeypatch, name) -> None:
    prepare = run_files.pictures

    def fill_disk(request: object) -> dict:
        (tmp_path / f"{name}.part").symlink_to("/dev/full")
        return prepare(request)

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "pictures", fill_disk)
        message = refused(tmp_path)
    assert "No space left on device" in message and str(tmp_path / name) in message
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "beginning"
    command(tmp_path)
    check_finished(tmp_path, whole)


# Numbers that are none

NAN_SEED = 13


@contextlib.contextmanager
def nan_in_section_2() -> Iterator[None]:
    """The noise of section 2 is not a number for the videos of one seed."""
    noise = pipeline._noise

    def broken(seed: int, section: int, shape: tuple[int, ...]) -> object:
        return noise(seed, section, shape) * (np.nan if (seed, section) == (NAN_SEED, 1) else 1)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(pipeline, "_noise", broken)
        yield


def test_nan_stops_a_run_and_keeps_what_is_done(tmp_path) -> None:
    with nan_in_section_2():
        message = refused(tmp_path, seed=NAN_SEED)
    assert "section 2, step 1 of 1" in message and "not finite in float32" in message
    assert record_of(tmp_path)["status"] == "failed"
    before = latents_of(tmp_path)
    assert sorted(before) == ["known.npz", "section_000.npz"]
    assert np.isfinite(before["section_000.npz"]).all()
    resume.main([str(tmp_path)])
    assert record_of(tmp_path)["status"] == "finished"
    after = latents_of(tmp_path)
    np.testing.assert_array_equal(after["section_000.npz"], before["section_000.npz"])
    assert np.isfinite(after["section_001.npz"]).all()


# Jobs


def write_jobs(folder: Path, *jobs: object) -> Path:
    lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    return folder / "jobs.jsonl"


def test_a_bad_job_does_not_stop_the_others(tmp_path, whole, capsys) -> None:
    jobs = write_jobs(
        tmp_path,
        '{"prompt": "cut',
        {"name": "absent", "image": str(tmp_path / "nowhere.png")},
        {"name": "odd", "heigth": 64},
        {"name": "good"},
    )
    output = tmp_path / "made"
    message = refused(output, jobs=jobs)
    assert "3 of 4 videos were not made" in message
    for part in ("line 1", "nowhere.png", "'heigth' is no flag of a video"):
        assert part in message
    check_finished(output / "good", whole)
    capsys.readouterr()
    refused(output, jobs=jobs)
    assert "finished already" in capsys.readouterr().out


def test_nan_in_one_of_two_does_not_stop_the_other(tmp_path, whole) -> None:
    jobs = write_jobs(tmp_path, {"name": "nan", "seed": NAN_SEED}, {"name": "good"})
    output = tmp_path / "made"
    with nan_in_section_2():
        message = refused(output, jobs=jobs, batch=2)
    assert "1 of 2 videos" in message and "nan: section 2, step 1 of 1" in message
    assert record_of(output / "nan")["status"] == "failed"
    assert sorted(latents_of(output / "nan")) == ["known.npz", "section_000.npz"]
    assert record_of(output / "good")["status"] == "finished"
    made, single = latents_of(output / "good"), latents_of(whole)
    for name in single:
        # Two at once round differently from one alone.
        np.testing.assert_allclose(made[name], single[name], atol=1e-4 * np.abs(single[name]).max())


def test_a_damaged_run_does_not_stop_its_neighbour(tmp_path, whole) -> None:
    jobs = write_jobs(tmp_path, {"name": "bad"}, {"name": "good", "seed": 1})
    output = tmp_path / "made"
    shutil.copytree(whole, output / "bad")
    change_record(output / "bad", status="interrupted")
    cut_short(output / "bad" / "inputs" / "image.png")
    message = refused(output, jobs=jobs, batch=2)
    assert "1 of 2 videos" in message and "image.png is damaged" in message
    assert record_of(output / "good")["status"] == "finished"


@pytest.mark.parametrize(
    ("text", "named"),
    [(b"", "is empty"), (b"\n \n", "is empty"), (b"\x89PNG", "in UTF-8")],
)
def test_files_that_hold_no_jobs(tmp_path, text, named) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_bytes(text)
    message = refused(tmp_path / "made", jobs=jobs)
    assert str(jobs) in message and named in message


# As a person sees it


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--image", "nowhere.png", "--output", "run"], "nowhere.png"),
        (["--image", str(PHOTO), "--sections", "1", "--output", "/proc/framepack"], "/proc/"),
    ],
    ids=["image", "output"],
)
def test_an_error_is_one_line_on_stderr(tmp_path, flags, named) -> None:
    program = [sys.executable, ROOT / "sample.py", "--bundle", "random", "--schedule", SCHEDULE]
    done = subprocess.run(
        [*program, *flags], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and named in line
