"""Discretized history, `+D`: fit a codebook, train with it, and sample with what was trained."""

from pathlib import Path

import numpy as np
import pytest

from framepack_jax import bundle
from framepack_jax.cli import fit_codebook, sample, train
from framepack_jax.data import records
from framepack_jax.data.latent_pixels import draw_pixels
from framepack_jax.jobs import provenance
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.packing.codebook import Codebook
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_runs import CONFIG, flags, log_of, state_of

SCHEDULE = "f1k1_x_g2_f1k1f2k2f16k4_td"
FEW = ("--steps", "2", "--batch", "2", "--optimizer.warmup-steps", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dataset, its codebook of 8 entries, and a run that was trained with it."""
    folder = tmp_path_factory.mktemp("codebook")
    write_dataset(folder / "dataset", {(32, 48): (7, 5, 5, 7)})
    (folder / "config.py").write_text(CONFIG)
    fit_codebook.main(fitting(folder, "--entries", "8"))
    shown = ("--validation.every", "2", "--validation.steps", "1", "--validation.sigmas", "0.5")
    train.main(flags(folder, folder / "run", *FEW, *discrete(folder, 8), *shown))
    return folder


def fitting(place: Path, *more: str) -> list[str]:
    return ["--data", str(place / "dataset"), "--output", str(place / "codebook"), *more]


def discrete(place: Path, entries: int) -> list[str]:
    return ["--schedule", f"{SCHEDULE}+D{entries}", "--codebook", str(place / "codebook")]


def sampled(folder: Path, output: Path, *more: str) -> RunDir:
    sample.main([
        f"--bundle={folder}", f"--output={output}", "--prompt=waves", "--steps=2", "--sections=3",
        "--height=32", "--width=48", *more,
    ])  # fmt: skip
    return RunDir.open(output)


def test_the_loss_is_that_of_discretized_clips(place, tmp_path) -> None:
    """With an entry for each pixel the codebook changes nothing, and with one entry all history is
    the same."""
    fitted = bundle.read_codebook(place / "codebook")
    assert fitted.entries.shape == (8, 16) and 0 < fitted.error < 1
    pixels = np.unique(drawn(place), axis=0)
    every = Codebook(pixels, np.full(len(pixels), 1 / len(pixels)), 0.0)
    bundle.write_codebook(tmp_path / "codebook", every, "all")
    for name, more in {
        "plain": ("--schedule", SCHEDULE),
        "every": discrete(tmp_path, len(pixels)),
    }.items():
        train.main(flags(place, tmp_path / name, *FEW, "--no-export", *more))
    plain, same, few = (
        [log_of(run)[step]["loss"] for step in (1, 2)]
        for run in (tmp_path / "plain", tmp_path / "every", place / "run")
    )
    assert same == pytest.approx(plain, rel=1e-6)
    assert abs(few[0] - plain[0]) > 1e-4


def drawn(place: Path) -> np.ndarray:
    """All latent pixels of the dataset."""
    return draw_pixels(place / "dataset", 10**6)


def test_validation_samples_with_the_codebook_of_the_run(place) -> None:
    assert np.isfinite(log_of(place / "run")[2]["validation/loss"])
    assert list((place / "run" / "validation").rglob("0.mp4"))


def test_what_was_trained_is_sampled_with_its_codebook(place, tmp_path) -> None:
    folder = place / "run" / "bundle"
    manifest = bundle.read_manifest(folder)
    assert str(manifest.schedule) == f"{SCHEDULE}+D8"
    own = bundle.read_codebook(folder / bundle.CODEBOOK)
    assert (own.entries == bundle.read_codebook(place / "codebook").entries).all()
    first = sampled(folder, tmp_path / "first").latents()
    other = Codebook(own.entries[:, ::-1].copy(), own.usage, own.error)
    bundle.write_codebook(folder / bundle.CODEBOOK, other, "another")
    with pytest.raises(ValueError, match="was started with another codebook than bundle"):
        provenance.check_weights(RunDir.open(tmp_path / "first"))
    second = sampled(folder, tmp_path / "second").latents()
    # The end of the video is made first, without history.
    np.testing.assert_array_equal(first[max(first)], second[max(first)])
    assert np.abs(first[1] - second[1]).max() > 1e-3


def test_a_run_goes_on_with_its_codebook_only(place, tmp_path, capsys) -> None:
    more = (*FEW, "--no-export")
    train.main(flags(place, tmp_path / "run", *more, "--steps", "1", *discrete(place, 8)))
    own = bundle.read_codebook(place / "codebook")
    bundle.write_codebook(tmp_path / "codebook", own._replace(entries=own.entries + 1), "another")
    with pytest.raises(SystemExit):
        train.main(flags(place, tmp_path / "run", *more, *discrete(tmp_path, 8)))
    assert "with other settings (the entries of the codebook)" in capsys.readouterr().err
    train.main(flags(place, tmp_path / "run", *more, *discrete(place, 8)))
    for a, b in zip(state_of(tmp_path / "run", 2), state_of(place / "run", 2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_refused(place, tmp_path, capsys) -> None:
    run = str(tmp_path / "run")
    with pytest.raises(SystemExit):
        train.main(flags(place, run, *discrete(place, 16)))
    said = capsys.readouterr().err
    assert "has 8 entries of 16 channels" in said and "--entries 16" in said
    with pytest.raises(SystemExit, match=r"random/codebook\.safetensors is missing; fit"):
        sample.main(["--bundle=random", f"--output={run}", "--prompt=waves", "--sections=1",
                     f"--schedule={SCHEDULE}+D8"])  # fmt: skip
    with pytest.raises(SystemExit, match="codebook exists"):
        fit_codebook.main(fitting(place))
    with pytest.raises(SystemExit, match="needs as many different latent pixels"):
        fit_codebook.main(fitting(place, "--entries", "60000", "--overwrite"))
    (tmp_path / "codebook").write_text("no codebook")
    with pytest.raises(SystemExit):
        train.main(flags(place, run, *discrete(tmp_path, 8)))
    assert "is no codebook" in capsys.readouterr().err
    assert not Path(run).exists()


def test_as_many_pixels_of_each_clip_are_drawn(place) -> None:
    index = records.read_index(place / "dataset")
    source = records.VideoSource(place / "dataset", index.shards)
    clips = [np.asarray(source[n].latents, np.float32).reshape(-1, 16) for n in range(4)]
    pixels = draw_pixels(place / "dataset", 40)
    assert pixels.shape == (40, 16) and len(np.unique(pixels, axis=0)) == 40
    for clip, part in zip(clips, pixels.reshape(4, 10, 16), strict=True):
        assert all((clip == pixel).all(axis=1).any() for pixel in part)
    assert draw_pixels(place / "dataset", 3).shape == (3, 16)
    assert len(drawn(place)) == sum(map(len, clips))
