"""Many videos: jobs files, batches, seeds, and several processes at work in one folder."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.cli import resume, sample
from framepack_jax.generation import noise
from framepack_jax.jobs.output_folder import make_output_folder
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.run_folders import (
    F1,
    PHOTO,
    assert_same_latents,
    command,
    copy,
    frames_of,
    make,
)
from tests.fixtures.torch_reference import relative_error


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
    with pytest.raises(SystemExit, match="4 of 5 videos failed") as error:
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
    assert "already finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "job_0001" / "video.mp4").stat().st_mtime_ns == before


def test_other_files_are_never_removed(tmp_path) -> None:
    (tmp_path / "inputs").mkdir()
    shutil.copy(PHOTO, tmp_path / "inputs" / "photo.jpg")
    for more in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match="has a inputs that belongs to no run"):
            command(tmp_path, "--sections", 1, *more)
    assert (tmp_path / "inputs" / "photo.jpg").exists()
    run = make(tmp_path / "run", "--sections", 1, "--latents-only")
    shutil.copy(PHOTO, run.folder / "inputs" / "photo.jpg")
    make(run.folder, "--sections", 2, "--latents-only", "--overwrite")
    assert (run.folder / "inputs" / "photo.jpg").exists()
    assert sorted(run.latents()) == list(range(5))


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
    assert capsys.readouterr().out.count("already finished") == 2
    again = make(tmp_path / "again", "--sections", 1, "--latents-only", "--seed", seeds[0])
    assert_same_latents(again, RunDir.open(tmp_path / "out" / "job_0001"))


def test_seeds_of_64_bits() -> None:
    """Below 2**32 they are jax's, above it all bits count."""
    seeds = [7, 2**31 + 7, 2**32 + 7, 2**63 + 7, 2**64 - 1]
    keys = [jax.random.key_data(noise.key_of(seed)) for seed in seeds]
    for key, seed in zip(keys[:2], seeds, strict=False):
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(seed)))
    assert len({tuple(map(int, key)) for key in keys}) == len(seeds)


def test_a_changed_image_is_another_run(tmp_path) -> None:
    image = tmp_path / "image.png"
    shutil.copy(PHOTO, image)
    flags = ("--sections", 1, "--latents-only", "--image", image)
    make(tmp_path / "run", *flags, image=False)
    video.save_png(image, np.zeros((64, 48, 3), np.uint8))
    with pytest.raises(SystemExit, match=r"image.png has changed"):
        make(tmp_path / "run", *flags, image=False)


def test_a_finished_job_needs_its_image_no_more(tmp_path, capsys) -> None:
    image, jobs = tmp_path / "image.png", tmp_path / "jobs.jsonl"
    shutil.copy(PHOTO, image)
    jobs.write_text(json.dumps({"image": str(image), "name": "one"}), encoding="utf-8-sig")
    flags = ("--sections", 1, "--latents-only", "--jobs", jobs)
    command(tmp_path / "out", *flags, image=False)
    image.unlink()
    command(tmp_path / "out", *flags, image=False)
    assert "already finished" in capsys.readouterr().out


def test_one_run_is_not_made_twice_at_once(whole, tmp_path) -> None:
    run = copy(whole[F1], tmp_path / "run")
    run.write_record(status="interrupted")
    run.lock()
    with pytest.raises(SystemExit, match="is in use by another process"):
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
    assert "left to other processes, which sample them: " in capsys.readouterr().out
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
