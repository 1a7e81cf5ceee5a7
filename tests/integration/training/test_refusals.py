"""Refusals of the training command, and runs that start from other runs."""

import re

import jax
import numpy as np
import pytest

from framepack_jax.cli import common, train
from framepack_jax.training import checkpoints
from framepack_jax.training.checkpoints import RunError
from tests.fixtures.training_runs import STEPS, flags


def test_what_cannot_be_gone_on_with_is_refused(place, whole, capsys) -> None:
    cases = {
        ("--batch", "8"): "batch = 4 then, 8 now.*--init RUN@STEP",
        ("--seed", "7"): "seed = 0 then, 7 now",
        ("--optimizer.name", "adafactor"): "optimizer.name = 'adamw' then",
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


def test_losses_that_stay_not_finite_end_a_run(place, tmp_path) -> None:
    with pytest.raises(SystemExit) as error:
        train.main(
            flags(place, tmp_path / "run", "--optimizer.learning-rate", "1e38",
                  "--max-skipped-steps", "2", "--optimizer.warmup-steps", "0",
                  "--optimizer.clip-norm", "0")
        )  # fmt: skip
    message = str(error.value)
    assert "was not finite" in message and "video_" in message
    assert "The updates of 2 steps in a row were skipped" in message
    assert "last checkpoint" in message
    # Another start would take the same steps.
    assert error.value.code == common.HOPELESS
