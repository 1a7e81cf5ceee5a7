"""Training as a person starts it: stopped anywhere and gone on with, by one process and by two."""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from framepack_jax import FramePack, bundle, packing, video
from framepack_jax import __main__ as cli
from framepack_jax.cli import common, export_run, sample, train
from framepack_jax.cli.config_file import read_config
from framepack_jax.conversion import lora as conversion_lora
from framepack_jax.data import holdout, loader, records
from framepack_jax.data.config import DataConfig
from framepack_jax.data.records import read_index
from framepack_jax.models import lora
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import merge_params
from framepack_jax.parallel import sharding
from framepack_jax.training import checkpoints, export, flow_matching_task, state
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.export import provenance
from framepack_jax.training.metrics import Jsonl, WandB
from framepack_jax.training.prefetch import check_batch
from framepack_jax.training.vae_config import VaeTrainConfig
from tests.fixtures.compiling import quick_flags
from tests.fixtures.hosts import ended, launch
from tests.fixtures.paths import ROOT
from tests.fixtures.torch_reference import relative_error
from tests.fixtures.training_data import damage, write_dataset

CONFIG = """
from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig, LoRAConfig, OptimizerConfig, TrainConfig, ValidationConfig,
)

def get_config():
    return TrainConfig(
        bundle="random", init="scratch",
        network={"double_layers": 1, "single_layers": 1, "refiner_layers": 1},
        schedule="f1k1_x_g2_f1k1f2k2f16k4_td",
        data=DataConfig(holdout=2),
        batch=4, steps=12, dtype="float32", remat="none", ema=0.9,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3),
        lora=LoRAConfig(rank=2, alpha=4.0),
        validation=ValidationConfig(every=0),
        checkpoints=CheckpointConfig(every=3, keep=2), log_every=1, tensorboard=False,
    )
"""
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset, a configuration, and programs compiled so far."""
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "dataset", {(32, 48): (7, 9, 5, 5, 7, 3)})
    (folder / "config.py").write_text(CONFIG)
    return folder


def flags(place, output, *more):
    return [
        "--config", str(place / "config.py"), "--data.path", str(place / "dataset"),
        "--output", str(output), *more,
    ]  # fmt: skip


def start(place, output, *more, limit: int | None = None) -> subprocess.Popen:
    """`limit`: KiB that a file may have."""
    env = os.environ | {
        "XLA_FLAGS": quick_flags(), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    limited = ["bash", "-c", 'ulimit -f "$0" && exec "$@"', str(limit)] if limit else []
    return subprocess.Popen(
        [*limited, sys.executable, str(ROOT / "train.py"), *flags(place, output, *more)],
        env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def log_of(output: Path) -> dict[int, dict[str, float]]:
    """The lines of a log by step, without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    clock = ("per_second", "seconds", "fraction", "memory", "mfu")
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        kept = {k: v for k, v in line.items() if not any(c in k for c in clock)}
        found[line["step"]] = found.get(line["step"], {}) | kept
    return found


def state_of(output: Path, step: int = STEPS):
    """All arrays of a checkpoint."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore((output / "checkpoints" / str(step) / "state").absolute())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def same(first: Path, second: Path) -> None:
    """To the last bit."""
    assert log_of(first) == log_of(second)
    pairs = list(zip(state_of(first), state_of(second), strict=True))
    assert len(pairs) > 50
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole(place):
    """A run that was never stopped, in a folder named as people name it: relative."""
    output = place / "whole"
    finish(start(place, output.name))
    assert sorted(log_of(output)) == list(range(1, STEPS + 1))
    return output


def test_a_disk_that_fills_leaves_what_is_whole(place, whole) -> None:
    """By a limit on the size of files, which tensorstore meets as it meets a full disk."""
    output = place / "full"
    finish(start(place, output, "--steps", "5"))
    # Of the last checkpoint the run hears when it waits for it, of others when it saves the next.
    for steps in ("6", str(STEPS)):
        process = start(place, output, "--steps", steps, limit=200)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1
        # Threads of orbax write at the same time, so that it need not begin a line.
        (said,) = re.findall("error: a checkpoint in .*", err)
        assert "the newest complete checkpoint is step 5" in said
        assert checkpoints.steps_of(output) == [3, 5]
    finish(start(place, output))
    same(output, whole)
    # With other numbers of steps, it is the same program.
    assert len(list((place / "compiled").glob("jit_train_step-*-cache"))) == 1


@pytest.fixture(scope="module")
def damaged(place, whole):
    """A dataset one of whose clips cannot be read, and a run on it that was never stopped; its
    number in the dataset."""
    folder = place / "damaged"
    made = write_dataset(folder, {(32, 48): (7, 9, 5, 5, 7, 3)})
    held = set(holdout.split(read_index(folder), 2)[1])
    number = min(set(range(6)) - held)
    damage(folder, made[number])
    output = place / "damaged_whole"
    return folder, output, number, finish(start(place, output, "--data.path", str(folder)))


def test_a_run_says_what_it_will_do(damaged) -> None:
    out = damaged[-1].splitlines()
    assert out[1] == (
        "data         4 clips in 1 bucket (32x48: 4), 2 more held out; 12 epochs in the whole run"
    )
    assert re.fullmatch(r"trained      ([\d,]+) of \1 parameters", out[2])
    assert out[3:5] == [
        "batch        4 samples on one device",
        "steps        1 to 12; the first checkpoint comes after step 3, no validation"
        " (--validation.every 0)",
    ]
    assert out[5].startswith("compiling    1 program of the step")


def test_a_clip_that_cannot_be_read_is_replaced_and_named(place, damaged) -> None:
    """One more than may be ends the run with a checkpoint; it goes on as if it never had ended."""
    folder, whole, number, out = damaged
    name = f"{folder}/shards/32x48-00000.arrayrecord, record {number}, cannot be read"
    assert f"clips that could not be read and were replaced: {name}" in out
    seen = [step for step, line in log_of(whole).items() if line.get("unread_clips") == 1]
    assert seen == list(range(seen[0], STEPS + 1))
    output = place / "damaged_stopped"
    more = "--data.path", str(folder), "--data.max-bad-records", "0"
    process = start(place, output, *more, "--checkpoints.every", "100")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"warning: step {seen[0]}: {name}" in err
    step = checkpoints.steps_of(output)[-1]
    assert re.search(
        rf"error: 1 clips cannot be read, more than --data.max-bad-records 0: {name}"
        rf" .*step {step} is saved; .* give --data.max-bad-records 1 or more", err,
    )  # fmt: skip
    assert seen[0] <= step <= seen[0] + 1
    with pytest.raises(SystemExit, match=r"more than --data\.max-bad-records 0"):
        train.main(flags(place, output, *more))
    finish(start(place, output, "--data.path", str(folder)))
    same(output, whole)


def test_a_disk_that_goes_ends_a_run_before_the_step(place, whole, tmp_path, monkeypatch) -> None:
    """It leaves no trace: the run goes on as if the disk had always been there."""
    output, read, reads = tmp_path / "run", records.VideoSource.__getitem__, itertools.count()

    def gone_after_a_while(source: records.VideoSource, number: int) -> records.Record:
        if next(reads) > 40:
            raise OSError("the disk is gone")
        return read(source, number)

    monkeypatch.setattr(records.VideoSource, "__getitem__", gone_after_a_while)
    with pytest.raises(SystemExit) as left:
        train.main(flags(place, output, "--checkpoints.every", "100"))
    step = checkpoints.steps_of(output)[-1]
    assert 2 < step < STEPS
    assert re.match(
        rf"error: step {step + 1} has no data: the disk is gone.*resume after step {step}",
        str(left.value),
    )  # fmt: skip
    monkeypatch.undo()
    finish(start(place, output))
    same(output, whole)


def test_rates_are_of_the_time_that_steps_take(place, damaged) -> None:
    """Also of a line a step, beside checkpoints: no step waits longer than it takes."""
    lines = [json.loads(line) for line in (damaged[1] / "log.jsonl").read_text().splitlines()]
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in lines)
    for line in lines:
        assert line["samples_per_second"] * line["seconds_per_step"] == pytest.approx(4)


def wait_for(process, output: Path, step: int) -> None:
    """Until a step is in the log."""
    until = time.monotonic() + 200
    while time.monotonic() < until and process.poll() is None:
        if (output / "log.jsonl").exists():
            lines = (output / "log.jsonl").read_text().splitlines()
            if (
                lines
                and json.loads(lines[-1] if lines[-1].endswith("}") else lines[-2])["step"] >= step
            ):
                return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def test_killed_three_times_it_is_the_run_that_never_was(place, whole) -> None:
    output, rng = place / "killed", np.random.default_rng()
    steps = sorted(rng.choice(np.arange(2, STEPS - 1), 3, replace=False).tolist())
    for step in steps:
        process = start(place, output)
        wait_for(process, output, step)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.kill()
        process.communicate()
    # A checkpoint is on disk some time after its step, or was about to be.
    kept = checkpoints.steps_of(output)
    expected = f"resumes after step {kept[-1]}" if kept else "starts from random weights"
    assert expected in finish(start(place, output))
    same(output, whole)


def test_sigterm_saves_the_step_and_ends_well(place, whole) -> None:
    output = place / "terminated"
    process = start(place, output, "--checkpoints.every", "100")
    wait_for(process, output, 4)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert "stopped after step" in out and "run the same command again to resume" in out
    (step,) = checkpoints.steps_of(output)
    assert 4 <= step < STEPS
    finish(start(place, output))
    same(output, whole)


def test_a_finished_run_has_nothing_to_do(place, whole) -> None:
    before = state_of(whole)
    out = finish(start(place, whole))
    assert f"resumes after step {STEPS}" in out
    assert all(np.array_equal(a, b) for a, b in zip(before, state_of(whole), strict=True))


def two(place, output: Path, *more: str, devices: int = 1) -> list[subprocess.Popen]:
    """The command in two processes of so many devices."""
    for i in range(2):
        (place / f"host{i}").mkdir(exist_ok=True)
    return launch(
        [place / "host0", place / "host1"], str(ROOT / "train.py"), *flags(place, output, *more),
        "--coordinator-address", "localhost:{port}", "--num-processes", "2", devices=devices,
    )  # fmt: skip


def close(found: Path, expected: Path, steps=range(1, STEPS + 1)) -> None:
    for step in steps:
        ours, theirs = log_of(found)[step], log_of(expected)[step]
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5 * theirs["loss"], step
        assert abs(ours["grad_norm"] - theirs["grad_norm"]) < 1e-4 * theirs["grad_norm"], step


def test_two_processes_train_as_one_and_one_goes_on(place, whole) -> None:
    """Stopped by SIGTERM to one of them: both save the same step and end well."""
    output = place / "two"
    looking = ("--validation.every", "2", "--validation.samples", "4", "--validation.sections", "1",
               "--validation.steps", "1", "--validation.sigmas", "0.5")  # fmt: skip
    started = two(place, output, "--mesh", "fsdp=2", "--checkpoints.every", "100", *looking)
    wait_for(started[0], output, 4)
    started[1].send_signal(signal.SIGTERM)
    for code, _, err in ended(started):
        assert code == 0, err[-3000:]
    (step,) = checkpoints.steps_of(output)
    assert 4 <= step < STEPS
    close(output, whole, range(1, step + 1))
    found = log_of(output)[2]
    assert 0 < found["validation/loss"] < 10 and "context/k4_other" in found
    frames, _ = video.read_mp4(output / "validation" / "step_0000002" / "0.mp4")
    # A start image and one section of two latent frames, above the truth.
    assert frames.shape[0] == 9 and frames.shape[1] == 2 * (32 + 16 * (frames.shape[2] == 32))
    finish(start(place, output))
    close(output, whole)


def test_one_process_begins_and_two_go_on_fsdp_and_tensor(place, whole) -> None:
    """Of four devices each; to the end, so that one of them makes the bundle."""
    output = place / "one"
    finish(start(place, output, "--steps", "3", "--no-export"))
    started = two(place, output, "--mesh", "fsdp=4,tensor=2", devices=4)
    for code, _, err in ended(started):
        assert code == 0, err[-3000:]
    manifest = bundle.read_manifest(output / "bundle")
    name = ["head/out/kernel"]
    (ours, theirs) = (
        dict(bundle.read_leaves(run / "bundle", manifest, "transformer", name))[name[0]]
        for run in (output, whole)
    )
    assert relative_error(ours, theirs) < 1e-2  # bfloat16
    # The learning rate of a constant schedule does not depend on the number of steps.
    close(output, whole)


def test_the_bundle_of_a_run_samples(place, whole, tmp_path) -> None:
    """It points to the bundle that it was trained from; its weights are those of the average."""
    root = whole / "bundle"
    manifest = bundle.read_manifest(root)
    assert manifest.roles["vae"].path != "vae" and manifest.schedule.startswith("f1k1_x_g2")
    # It was trained from nothing at this size alone, which is what it samples by default.
    assert manifest.buckets == ((32, 48),)
    _, cfg = bundle.role_config(manifest, "transformer")
    assert (cfg.double_layers, cfg.single_layers) == (1, 1)
    leaves = dict(bundle.read_leaves(root, manifest, "transformer", ["head/out/kernel"]))
    average = checkpoints.restore_params(
        whole, STEPS, {"head": {"out": {"kernel": jax.ShapeDtypeStruct(
            leaves["head/out/kernel"].shape, np.float32)}}}, "ema",
    )  # fmt: skip
    expected = np.asarray(average["head"]["out"]["kernel"]).astype(leaves["head/out/kernel"].dtype)
    np.testing.assert_array_equal(leaves["head/out/kernel"], expected)
    sample.main([
        "--bundle", str(root), "--prompt", "waves", "--sections", "1", "--steps", "1",
        "--latents-only", "--output", str(tmp_path / "video"),
    ])  # fmt: skip
    copy = tmp_path / "copy"
    export_run.main([str(whole), "--output", str(copy), "--copy", "--dtype", "float32"])
    pipe = FramePack.load(copy)
    assert pipe.transformer.params["head"]["out"]["kernel"].dtype == np.float32
    assert not list(copy.rglob("*.part*"))
    # How it was trained stands beside the weights, and not in what is said of each video.
    story = bundle.read_manifest(copy).roles["transformer"].source["training"]
    assert story == json.loads(json.dumps(provenance(str(whole), STEPS)))
    assert story["step"] == STEPS and story["config"]["batch"] == 4
    assert story["config"]["data"]["seed"] == 0 and story["fingerprint"]
    assert story["metrics"]["loss"] == log_of(whole)[STEPS]["loss"]
    assert story["code"]["jax"] == jax.__version__
    assert "training" not in (tmp_path / "video" / "run.json").read_text()
    assert provenance(str(whole), 9)["metrics"]["loss"] == log_of(whole)[9]["loss"]
    shutil.copy(whole / "run.json", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert provenance(str(tmp_path), 9)["metrics"] == {"loss": 0.5}


def test_what_cannot_be_gone_on_with_is_refused(place, whole, capsys) -> None:
    cases = {
        ("--batch", "8"): "batch = 4 then, 8 now.*--init RUN@STEP",
        ("--seed", "7"): "seed = 0 then, 7 now",
        ("--optimizer.name", "adafactor"): "optimizer = .*adamw.* then",
        ("--ema", "0"): "ema = 0.9 then, 0.0 now",
        (
            "--init",
            f"{whole}@9",
            "--trainable",
            "lora",
        ): "init = 'scratch' then.*trainable = 'all' then, 'lora' now",
        ("--resume", "never"): "holds a run up to step 12",
    }
    for more, message in cases.items():
        with pytest.raises(SystemExit) as error:
            train.main(flags(place, whole, *more))
        assert re.search(message, str(error.value), re.DOTALL), (more, str(error.value))
    assert checkpoints.steps_of(whole)[-1] == STEPS
    with pytest.raises(RunError, match="has no checkpoint of step 5; it has"):
        checkpoints.parse_run(f"{whole}@5")


def test_what_is_missing_is_named(place, tmp_path) -> None:
    cases = [
        ([], r"--output .*--bundle .*--data.path"),
        (["--config", "nothing.py"], "nothing.py does not exist"),
        (flags(place, tmp_path / "a", "--init", str(tmp_path)), "has no checkpoint"),
        (flags(place, tmp_path / "a", "--mesh", "fsdp=3"), "multiply to 3"),
        (
            flags(place, tmp_path / "a", "--data.holdout", "99"),
            "leaves nothing of the 6.*holdout 4",
        ),
        (flags(place, tmp_path / "a", "--num-processes", "2"), "need --coordinator-address"),
        (flags(place, tmp_path / "a", "--wandb", "project"), r"pip install .*\[wandb\]"),
        (
            flags(place, tmp_path / "a", "--bundle", "framepack_i2v", "--validation.every", "2"),
            "parameters of vae are missing",
        ),
    ]
    for args, message in cases:
        with pytest.raises(SystemExit) as error:
            train.main(args)
        assert re.search(message, str(error.value), re.DOTALL), (args, str(error.value))
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_a_run_begins_from_another(place, whole, capsys) -> None:
    """In a new order of data, from its averaged parameters."""
    output = place / "second"
    train.main(
        flags(place, output, "--init", f"{whole}@9", "--steps", "1", "--data.seed", "4",
              "--no-export", "--optimizer.learning-rate", "0")
    )  # fmt: skip
    assert f"starts from {whole} at step 9" in capsys.readouterr().out
    shape = jax.ShapeDtypeStruct((1, 32, 4 * 32), np.float32)
    leaf = {"single": {"mlp_in": {"kernel": shape}}}
    old = checkpoints.restore_params(whole, 9, leaf, "ema")["single"]["mlp_in"]["kernel"]
    new = checkpoints.restore_params(output, 1, leaf, "params")["single"]["mlp_in"]["kernel"]
    np.testing.assert_array_equal(old, new)
    # By way of any number of runs, which may be gone by now.
    assert [checkpoints.read_record(run)["began"] for run in (whole, output)] == ["scratch"] * 2


def test_what_another_run_does_not_have_is_named(place, whole, tmp_path) -> None:
    """Before anything is read; and of a record that promises what its checkpoint lacks."""
    cases = {
        ("--trainable", "context"): "trainable = 'all' there, 'context' here",
        ("--trainable", "lora"): "trainable = 'all' there, 'lora' here",
    }
    for more, message in cases.items():
        with pytest.raises(SystemExit, match=message):
            train.main(flags(place, tmp_path / "a", "--init", str(whole), *more))
    wanted = {"head": {"out": {"lora_a": jax.ShapeDtypeStruct((1, 2), np.float32)}}}
    with pytest.raises(RunError, match=r"lacks 1 of 1 arrays, as head/out/lora_a"):
        checkpoints.restore_params(whole, STEPS, wanted, "params")


def test_a_damaged_checkpoint_is_gone_on_without(place, whole, tmp_path) -> None:
    output = tmp_path / "damaged"
    shutil.copytree(whole, output)
    newest = output / "checkpoints" / str(STEPS)
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"")
    process = start(place, output, "--steps", str(STEPS + 1))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err, err[-3000:]
    assert "move it away, and run the same command again to resume from step 9" in err
    shutil.rmtree(newest)
    finish(start(place, output))
    same(output, whole)


def test_interrupted_before_the_first_step_it_says_so(place, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow_matching_task, "open_task", interrupted)
    with pytest.raises(SystemExit) as left:
        train.main(flags(place, tmp_path / "a"))
    assert left.value.code == common.INTERRUPTED
    assert "run the same command again to resume" in capsys.readouterr().err


def test_a_bundle_is_replaced_when_told_to(place, whole, tmp_path) -> None:
    """The average by default, of a run that keeps one; the bundle says which it has."""
    target = tmp_path / "made"
    export_run.main([str(whole), "--output", str(target)])
    named = bundle.read_manifest(target).roles["transformer"].source["name"]
    assert named.endswith(f"at step {STEPS}, moving average")
    with pytest.raises(SystemExit, match="already is a bundle; choose another --output, or"):
        export_run.main([str(whole), "--output", str(target)])
    more = ["--weights", "last", "--overwrite"]
    export_run.main([f"{whole}@9", "--output", str(target), *more])
    named = bundle.read_manifest(target).roles["transformer"].source["name"]
    assert named.endswith("at step 9")


def test_the_documented_commands_divide_their_batches() -> None:
    """What docs and configurations tell people to type, on as many devices as they say."""
    told = []
    for text in (ROOT / "docs" / "many-devices.md", *(ROOT / "configs").glob("*.py")):
        lines = re.sub(r"\s*\\?\n\s+", " ", text.read_text()).splitlines()
        told += [line for line in lines if "train.py --config" in line and "--mesh" in line]
    assert len(told) >= 4
    for line in told:
        (file,) = re.findall(r"--config (\S+)", line)
        (mesh,) = re.findall(r"--mesh ([\w=,]+)", line)
        given = re.findall(r"--batch (\d+)", line)
        cfg = read_config(ROOT / file, TrainConfig)
        batch = int(given[0]) if given else cfg.batch
        sizes = sharding.parse_mesh(mesh)
        shape = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
        check_batch(batch, cfg.grad_accum_steps, SimpleNamespace(shape=shape))


def check_lora_files(folder: Path, run: Path) -> None:
    """Both say the same of the network, and how they came about."""
    _, cfg = bundle.role_config(bundle.read_manifest(bundle.resolve("random")), "transformer")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["lora.safetensors", "lora_original.safetensors"]
    found = [conversion_lora.read(folder / name, cfg) for name in names]
    changes = [
        {path: np.tensordot(f.a, f.b, 1) * f.scale[0] for path, f in read.lora.items()}
        for read in found
    ]
    assert changes[0].keys() == changes[1].keys() and found[1].naming == "Tencent's"
    for path, change in changes[0].items():
        np.testing.assert_allclose(changes[1][path], change, atol=1e-6, err_msg=path)
    for name in names:
        about = conversion_lora.about(folder / name)
        assert about["modelspec.architecture"] == "framepack/lora"
        assert about["modelspec.title"] == run.name and about["ss_steps"] == "2"
        assert about["ss_sd_model_name"] == "configs/tiny_bundle.py, untrained"
        assert (about["framepack.rank"], about["framepack.alpha"]) == ("2", "4")
        assert "rank 2 and alpha 4" in about["modelspec.description"]
        ranks = {len(x) for key, x in load_file(folder / name).items() if "lora_A" in key}
        with safe_open(folder / name, "np") as file:
            header = file.metadata()
        # Alpha is multiplied into the factors.
        said = str(*ranks) if len(ranks) == 1 else "Dynamic"
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == (said, said)
        assert about["framepack.schedule"] in about["modelspec.description"]


def check_velocities(run: Path, dataset: Path) -> None:
    """The velocity of a batch by the parameters as they are trained, and by the bundle with the
    LoRA file of the run."""
    record = checkpoints.read_record(run)
    cfg = export.read_config(record["config"])
    manifest = bundle.read_manifest(bundle.resolve("random"))
    model = state.model_of(cfg, manifest)
    abstract, _ = state.abstract_params(cfg, model)
    factors = checkpoints.restore_params(run, cfg.steps, abstract, "params")
    base = FramePack.load(bundle.resolve("random"), dtype=cfg.dtype)
    adapted = base.with_lora(conversion_lora.read(Path(lora.file_of(run)), model.cfg).lora)
    scaled = scale_factors(factors, state.factor_scale(cfg))
    trained = merge_params(scaled, base.transformer.params)
    batch = next(loader.open_loader(DataConfig(str(dataset)), packing.parse(cfg.schedule), 2))
    noise = np.random.default_rng(0).standard_normal(batch.target.shape).astype(np.float32)
    given = batch.conditions
    conditions = model.spec.conditions(
        given.text, given.text_valid, given.pooled, given.image, np.full(2, 1, np.float32)
    )
    velocity = jax.jit(functools.partial(model.spec.velocity, model.cfg))
    ours, theirs, before = (
        velocity(params, noise, np.full(2, 0.5, np.float32), batch.context, conditions)
        for params in (trained, adapted.transformer.params, base.transformer.params)
    )
    assert relative_error(np.asarray(theirs), np.asarray(ours)) < 1e-6
    assert relative_error(np.asarray(before), np.asarray(ours)) > 1e-4


def test_adapters_train_and_sample(place, tmp_path, capsys) -> None:
    """--trainable lora from the weights of a bundle, exported as a file that sample.py takes."""
    output = tmp_path / "lora"
    config = CONFIG.replace('init="scratch"', 'init="bundle"')
    config = "\n".join(line for line in config.splitlines() if "network=" not in line)
    (tmp_path / "config.py").write_text(config)
    train.main([
        "--config", str(tmp_path / "config.py"), "--data.path", str(place / "dataset"),
        "--output", str(output), "--trainable", "lora", "--steps", "2", "--ema", "0",
    ])  # fmt: skip
    file = output / "bundle" / "lora.safetensors"
    out = capsys.readouterr().out
    assert f"sample.py --lora {file}" in out
    assert "in adapters of rank 2, alpha 4, beside" in out and "warning" not in out
    check_lora_files(file.parent, output)
    check_velocities(output, place / "dataset")
    for command, other in ((sample, ["--prompt", "waves"]), (train, flags(place, output))):
        with pytest.raises(SystemExit, match=rf"holds a LoRA .*--lora {file}.*--init RUN"):
            command.main([*other, "--bundle", str(output / "bundle")])
    with pytest.raises(SystemExit, match=r"is a training run and no bundle; .*for --lora"):
        sample.main(["--bundle", str(output)])
    cli.main([
        "export",
        str(tmp_path / "kohya.safetensors"), "--key-format", "kohya",
        "--lora", str(output), "--bundle", str(bundle.resolve("random")),
    ])  # fmt: skip
    assert (tmp_path / "kohya.safetensors").exists()
    sample.main([
        "--bundle", "random", "--prompt", "waves", "--schedule", "f1k1_x_g2_f1k1f2k2f16k4_td",
        "--lora", str(output),
        "--sections", "1", "--steps", "1", "--height", "32", "--width", "48", "--latents-only",
        "--output", str(tmp_path / "video"),
    ])  # fmt: skip
    size = sum(f.stat().st_size for f in (output / "checkpoints").rglob("*") if f.is_file())
    random = bundle.resolve("random")
    whole_network = bundle.stored_bytes(random, bundle.read_manifest(random), "transformer")
    assert size < 4 * whole_network  # bfloat16; adapters and two moments in float32


def test_losses_that_stay_not_finite_end_a_run(place, tmp_path) -> None:
    with pytest.raises(SystemExit) as error:
        train.main(
            flags(place, tmp_path / "run", "--optimizer.learning-rate", "1e38",
                  "--max-nonfinite-steps", "2", "--optimizer.warmup-steps", "0",
                  "--optimizer.clip-norm", "0")
        )  # fmt: skip
    message = str(error.value)
    assert "was not finite for 2 steps" in message and "video_" in message
    assert "last checkpoint" in message


def test_a_log_cut_in_a_line_is_mended(tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = Jsonl(tmp_path, 2)
    log.write(3, {"loss": 1.0})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_run_keeps_its_place_on_weights_and_biases(tmp_path, monkeypatch) -> None:
    """With a stand-in that notes how it is called."""
    begun = []
    stand_in = SimpleNamespace(init=lambda **options: begun.append(options))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for folder in (tmp_path / "a" / "mine", tmp_path / "a" / "mine", tmp_path / "b" / "mine"):
        WandB(folder, "project", {"seed": 0})
    first, again, other = begun
    assert first == again
    assert first["name"] == other["name"] == "mine" and first["id"] != other["id"]
    assert first["resume"] == "allow"


def test_configs_are_what_they_say() -> None:
    """Every configuration in configs/ that trains is valid, and its docstring has a command."""
    found = 0
    for file in sorted((ROOT / "configs").glob("*.py")):
        text = file.read_text()
        if "training.config" not in text:
            continue
        config = read_config(file, VaeTrainConfig if "training.vae" in text else TrainConfig)
        assert f"configs/{file.name}" in file.read_text()
        assert dataclasses.asdict(config)["steps"] > 0
        found += 1
    assert found == 7
