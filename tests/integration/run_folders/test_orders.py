"""Run folders of endpoint and planned orders: growing frames, resuming, and what they are given."""

import json

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.cli import resume
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.loading import ENDPOINT, PLANNED, SYMMETRIC, TAILS
from tests.fixtures.run_folders import assert_same_latents, command, copy, frames_of, make

# Four sections of 8 frames: the frames that are final after each clip.
SPANS = {
    # Both ends; the gap from the left; the rest meets the ending.
    ENDPOINT: [(0, 4), (33, 33), (4, 12), (12, 20), (20, 33)],
    # No clip for the end of the first part, until both its neighbours are made.
    PLANNED[0]: [(33, 33), (0, 12), (12, 20), (20, 33)],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, RunDir]:
    folder = tmp_path_factory.mktemp("whole")
    return {text: make(folder / text, "--sections", 4, schedule=text) for text in SPANS}


@pytest.mark.parametrize("text", SPANS)
def test_frames_grow_where_they_are_final(whole, text: str) -> None:
    run = whole[text]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["status"] == "finished" and record["schedule"] == text
    assert sorted(run.latents()) == list(range(9))
    assert len(frames_of(run)) == record["frames"] == 33
    spans = [tuple(span) for span in record["spans"]]
    lengths = {p.name: video.mp4_info(p).frames for p in (run.folder / "segments").iterdir()}
    assert lengths == {f"frames_{a:08d}.mp4": b - a for a, b in spans if b > a}
    assert spans == SPANS[text]


@pytest.mark.parametrize("text", SPANS)
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_resumed_is_as_if_never_stopped(whole, tmp_path, text: str, kept: int) -> None:
    """With `kept` sections saved, and the frames of one clip."""
    run = copy(whole[text], tmp_path / "run")
    for file in sorted((run.folder / "latents").glob("section_*.npz"))[kept:]:
        file.unlink()
    run.write_record(status="begun", spans=run.record["spans"][: kept > 1])
    (run.folder / "video.mp4").unlink()
    resume.main([str(run.folder)])
    assert_same_latents(run, whole[text])
    resumed = RunDir.open(run.folder)
    assert resumed.record["status"] == "finished"
    assert resumed.record["spans"] == whole[text].record["spans"]
    assert np.abs(frames_of(run).astype(int) - frames_of(whole[text])).mean() < 2


@pytest.mark.parametrize("text", SPANS)
def test_an_extension_with_an_end_image_and_a_key_frame(whole, pictures, tmp_path, text) -> None:
    run = make(
        tmp_path / "run", "--sections", 2, "--extend", whole[text].folder,
        "--end-image", pictures["end"], "--end-image-as", "still",
        "--key-frame", f"0.2s={pictures['key']}", schedule=text, image=False,
    )  # fmt: skip
    latents, before = run.latents(), whole[text].latents()
    assert sorted(latents) == list(range(14))
    for position in range(9):
        np.testing.assert_array_equal(latents[position], before[position])
    assert len(frames_of(run)) == run.record["frames"] == 53


def test_a_guide_is_read_in_the_pass_of_both_ends(whole, pictures, tmp_path) -> None:
    run = make(
        tmp_path / "run", "--sections", 4, "--latents-only", "--end-image", pictures["end"],
        schedule=ENDPOINT,
    )  # fmt: skip
    assert run.record["flags"]["end_image_as"] == "guide"
    latents, without = run.latents(), whole[ENDPOINT].latents()
    assert all(np.abs(latents[p] - without[p]).max() > 1e-4 for p in (1, 8))


@pytest.mark.parametrize("text", [SYMMETRIC, TAILS[0]])
def test_an_extension_has_no_frames_far_back(whole, tmp_path, text) -> None:
    with pytest.raises(SystemExit, match=r"far back in the video.*with the tail td"):
        command(tmp_path / "run", "--extend", whole[ENDPOINT].folder, schedule=text, image=False)


def test_prompts_by_time_need_passes_of_one_section(tmp_path) -> None:
    flags = "--sections", 4, "--prompt", "0s: she waves 0.5s: she bows"
    with pytest.raises(SystemExit, match=r"prompt at 0.5 s: order 'endpoint'.*@planned\(4\)"):
        command(tmp_path / "run", *flags, schedule=ENDPOINT)
    planned = make(tmp_path / "planned", "--latents-only", *flags, schedule=PLANNED[0])
    assert sorted(planned.latents()) == list(range(9))
