"""Images, prompts, numbers, bundles and folders that cannot be used: one line says why."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framepack_jax.cli import decode, resume
from tests.fixtures.paths import ROOT
from tests.fixtures.small_run import (
    PHOTO,
    RANDOM,
    SCHEDULE,
    check_same_latents,
    command,
    cut_short,
    latents_of,
    record_of,
    refused,
)

# Colours of the quarters of a picture: top left, top right, bottom left, bottom right.
RED, GREEN, BLUE, WHITE = (220, 20, 30), (20, 200, 40), (10, 30, 210), (255, 255, 255)


QUARTERS = (RED, GREEN, BLUE, WHITE)


ORIENTATION = 0x0112


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
        (shutil.rmtree, "is not a bundle"),
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
    assert f"{stopped} already holds a run with other flags" in message
    assert "prompt = 'she waves' there, 'he sits' here" in message and "seed = 0 there" in message
    assert f"continue it with framepack resume {stopped}" in refused(stopped)
    check_same_latents(stopped, whole)


@pytest.mark.parametrize("command", [resume, decode])
def test_folders_that_hold_no_run(tmp_path, command) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(SystemExit, match=f"error: {folder} holds no run: it has no run.json"):
            command.main([str(folder)])


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
