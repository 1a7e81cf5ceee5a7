"""Records of training runs, of every format version."""

import json

import pytest

from framepack_jax.training import checkpoints, export
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import NoiseSchedule, TrainConfig


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
        bundle="random", batch=4, grad_accum_steps=2, max_nonfinite_steps=3,
        noise_schedule=NoiseSchedule("uniform", shift=0.5),
    )  # fmt: skip


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    record = {"config": checkpoints.as_record(TrainConfig(batch=4)), "began": "bundle"}
    checkpoints.write_record(tmp_path, record)
    assert checkpoints.read_record(tmp_path) == record


def test_a_record_of_a_later_version_is_named(tmp_path) -> None:
    checkpoints.write_record(tmp_path, {"format": checkpoints.FORMAT + 1, "config": {}})
    with pytest.raises(RunError, match=rf"run.json has format {checkpoints.FORMAT + 1}"):
        checkpoints.read_record(tmp_path)
