"""Training in an object store, and on a disk that cannot rename folders: make test-storage."""

import os
import random
import time

import pytest
from etils import epath

from framepack_jax import bundle
from framepack_jax.cli import export_run, train
from framepack_jax.training import checkpoints, log_file
from framepack_jax.utils import storage
from framepack_jax.utils.heartbeat import VARIABLE, read_heartbeat
from tests.fixtures.hosts import ended
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_runs import (
    STEPS,
    close,
    finish,
    flags,
    log_of,
    same,
    start,
    state_of,
    two,
)

pytestmark = pytest.mark.storage
SIZES = {(32, 48): (7, 9, 5, 5, 7, 3)}


@pytest.fixture(params=["bucket", "mount"])
def store(request) -> epath.Path:
    """A place where folders cannot be renamed."""
    return epath.Path(request.getfixturevalue(request.param))


def test_killed_at_random_points_a_run_is_that_of_a_disk(place, whole, store, monkeypatch) -> None:
    """Also its bundle, its log, and the dataset that it reads."""
    write_dataset(store / "dataset", SIZES)
    output, beats = store / "run", place / f"beats-{time.monotonic_ns()}.json"
    monkeypatch.setenv(VARIABLE, str(beats))
    data = "--data.path", str(store / "dataset")
    mount = None if "://" in str(store) else store
    draw = random.Random(0)
    for _ in range(3):
        process, steps = start(place, output, *data, mount=mount), draw.randint(2, 4)
        first = read_heartbeat(beats) or 0
        until = time.monotonic() + 120
        while (read_heartbeat(beats) or 0) < first + steps and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(draw.random())
        process.kill()
        process.wait()
    finish(start(place, output, *data, mount=mount))
    same(output, whole)
    assert (output / log_file.LOG).exists() and not (output / log_file.PARTS / "0").exists()
    leaves = [
        dict(bundle.read_leaves(run / "bundle", manifest, "transformer", leaf_names))
        for run in (output, whole)
        for manifest in [bundle.read_manifest(run / "bundle")]
        for leaf_names in [list(bundle.stored_dtypes(run / "bundle", manifest, "transformer"))]
    ]
    assert leaves[0].keys() == leaves[1].keys()
    assert all((leaves[0][name] == leaves[1][name]).all() for name in leaves[0])


def test_two_processes_train_in_a_bucket_and_one_goes_on(place, whole, bucket) -> None:
    output = epath.Path(bucket) / "two"
    started = two(place, output, "--mesh", "fsdp=2", "--steps", "6", "--no-export")
    for code, _, err in ended(started):
        assert code == 0, err[-3000:]
    assert checkpoints.steps_of(output) == [3, 6]
    finish(start(place, output))
    close(output, whole)


def test_a_run_in_a_bucket_is_exported_and_trained_on(place, bucket, capsys) -> None:
    """Adapters become LoRA files there; --init names the run."""
    output = f"{bucket}/lora"
    lora = ("--init", "bundle", "--trainable", "lora", "--steps", "2", "--ema", "0")
    config = (place / "config.py").read_text().replace("network={", "network={} and {")
    (place / "lora.py").write_text(config)
    given = flags(place, output, *lora, "--config", str(place / "lora.py"))
    train.main(given[2:])
    folder = epath.Path(output)
    names = {file.name for file in (folder / "bundle").iterdir()}
    assert names == {"lora.safetensors", "lora_original.safetensors"}
    export_run.main([f"{output}@2", "--output", f"{bucket}/one.safetensors"])
    assert (epath.Path(bucket) / "one.safetensors").exists()
    more = flags(place, f"{bucket}/more", *lora, "--config", str(place / "lora.py"))
    train.main([*more[2:], "--init", f"{output}@2"])
    assert f"starts from {output} at step 2" in capsys.readouterr().out


def test_a_damaged_checkpoint_in_a_store_is_moved_aside(place, whole, store) -> None:
    """The run resumes from the one before."""
    output = store / "damaged"
    storage.copy_tree(whole / "checkpoints", output / "checkpoints")
    (output / "run.json").write_text((whole / "run.json").read_text())
    state = output / "checkpoints" / str(STEPS) / "state"
    for file in (state / "ocdbt.process_0" / "d").iterdir():
        file.write_text("damaged")
    mount = None if "://" in str(store) else store
    said = finish(start(place, output, "--no-export", mount=mount))
    assert "is moved to" in said and (output / "damaged" / str(STEPS)).exists()
    assert checkpoints.steps_of(output)[-1] == STEPS
    for found, expected in zip(state_of(output), state_of(whole), strict=True):
        assert (found == expected).all()
    assert sorted(log_of(output)) == list(range(10, STEPS + 1))


def test_a_bucket_that_does_not_exist_is_one_line(place, object_store, capsys) -> None:
    with pytest.raises(SystemExit) as ended_with:
        train.main(flags(place, "gs://no-such-bucket/run"))
    text = f"{ended_with.value.code} {capsys.readouterr().err}"
    assert "error: " in text and "no-such-bucket" in text and os.linesep not in text.strip()
