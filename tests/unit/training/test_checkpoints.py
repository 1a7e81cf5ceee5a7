"""Records of training runs, of every format version."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from framepack_jax.training import checkpoints, export
from framepack_jax.training.best import read_best, write_best
from framepack_jax.training.checkpoint_writer import CheckpointWriter
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import CheckpointConfig, NoiseSchedule, TrainConfig


def _writer(run, *args) -> CheckpointWriter:
    return CheckpointWriter(checkpoints.manager(run, *args))


def test_a_record_of_format_1_opens(tmp_path) -> None:
    """Fields that were renamed since have their new names."""
    config = {
        "bundle": "random", "batch": 4, "accumulate": 2, "max_bad_steps": 3,
        "times": {"distribution": "uniform", "mean": 0.0, "std": 1.0, "shift": 0.5},
    }  # fmt: skip
    old = {"config": config, "fingerprint": {}, "weights": None, "began": "scratch"}
    (tmp_path / checkpoints.RECORD).write_text(json.dumps(old))
    record = checkpoints.read_record(tmp_path)
    assert record.keys() == old.keys()
    found = export.read_config(record["config"])
    assert found == TrainConfig(
        bundle="random", batch=4, grad_accum_steps=2, max_skipped_steps=3,
        noise_schedule=NoiseSchedule("uniform", mu=0.5, stratified=False), ema_warmup=False,
    )  # fmt: skip


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    record = {"config": checkpoints.as_record(TrainConfig(batch=4)), "began": "bundle"}
    checkpoints.write_record(tmp_path, record)
    assert checkpoints.read_record(tmp_path) == record


def test_a_record_of_a_later_version_is_named(tmp_path) -> None:
    checkpoints.write_record(tmp_path, {"format": checkpoints.FORMAT + 1, "config": {}})
    with pytest.raises(RunError, match=rf"run.json has format {checkpoints.FORMAT + 1}"):
        checkpoints.read_record(tmp_path)


@pytest.mark.parametrize("place", ["mount", "bucket"])
def test_checkpoints_where_folders_cannot_be_renamed(place, request) -> None:
    """They are marked as complete by a file; those of a killed run have none."""
    run = epath.Path(request.getfixturevalue(place)) / "run"
    state = {"x": jnp.arange(6.0), "y": {"z": jnp.ones((2, 3))}}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with contextlib.closing(_writer(run, CheckpointConfig(keep=2))) as writer:
        for step in (1, 2, 3):
            writer.save(step, state, {"at": step})
        writer.wait()
    assert checkpoints.steps_of(run) == [2, 3]
    killed, metadata = run / checkpoints.FOLDER / "4", "_CHECKPOINT_METADATA"
    killed.mkdir()
    (killed / metadata).write_text('{"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": null}')
    assert checkpoints.steps_of(run) == [2, 3]
    with contextlib.closing(checkpoints.manager(run, CheckpointConfig())) as manager:
        found, data = checkpoints.restore(manager, 3, abstract)
    assert not killed.exists()
    assert data == {"at": 3}
    jax.tree.map(np.testing.assert_array_equal, found, state)
    params = checkpoints.restore_params(run, 2, {"z": abstract["y"]["z"]}, "y")
    np.testing.assert_array_equal(params["z"], state["y"]["z"])


def _flipped(data: bytes) -> bytes:
    """Eight bits in the second half, where arrays are."""
    found = bytearray(data)
    for place in np.random.default_rng(0).integers(len(data) // 2, len(data) - 999, 8):
        found[place] ^= 16
    return bytes(found)


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "flipped": _flipped,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_moved_aside(tmp_path, how) -> None:
    """The largest file of the newest, with the arrays; the one before is restored."""
    x = jax.random.normal(jax.random.key(0), (4, 5000))
    with contextlib.closing(_writer(tmp_path, CheckpointConfig())) as writer:
        for step in (1, 2):
            writer.save(step, {"x": x + step}, {"at": step})
    files = (tmp_path / checkpoints.FOLDER / "2").rglob("*")
    largest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    assert largest.stat().st_size > 50_000
    largest.write_bytes(DAMAGES[how](largest.read_bytes()))
    abstract = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
    with contextlib.closing(checkpoints.manager(tmp_path, CheckpointConfig())) as manager:
        step, found, data, (said,) = checkpoints.restore_newest(manager, abstract)
    assert step == 1 and data == {"at": 1}
    np.testing.assert_array_equal(found["x"], x + 1)
    assert "checkpoint 2 in " in said and f"moved to {tmp_path}/damaged/2" in said
    assert checkpoints.steps_of(tmp_path) == [1]


def test_the_best_checkpoint_is_kept_and_has_a_name(tmp_path) -> None:
    """Beside the newest, also after the run was opened again."""
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.5, 6: 0.5, 7: 0.7, 8: 0.9}
    for steps in ((1, 2, 3, 4), (5, 6, 7, 8)):
        best = read_best(tmp_path, checkpoints.steps_of(tmp_path))
        with contextlib.closing(_writer(tmp_path, CheckpointConfig(keep=1), best)) as writer:
            for step in steps:
                writer.save(step, {"x": jnp.ones(3)}, {})
                if best.note(step, {"validation/loss": losses[step]}):
                    write_best(tmp_path, best)
                writer.wait()
        kept = 2 if steps[-1] == 4 else 6
        assert checkpoints.steps_of(tmp_path) == [kept, steps[-1]]
        assert checkpoints.parse_run(f"{tmp_path}@best") == (str(tmp_path), kept)
    (tmp_path / "best.json").unlink()
    with pytest.raises(RunError, match="keeps no best checkpoint; train with"):
        checkpoints.parse_run(f"{tmp_path}@best")
