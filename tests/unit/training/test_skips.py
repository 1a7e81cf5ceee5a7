"""The limit on the norm of the gradient, and the count of skipped steps."""

import json

import numpy as np
import pytest

from framepack_jax.training.config import SpikeConfig, TrainConfig
from framepack_jax.training.skips import Skips, TooManySkips
from framepack_jax.training.task import StepMetrics

CFG = TrainConfig(skip_spikes=SpikeConfig(factor=4.0, window=3), max_skipped_steps=3)


def read(skips: Skips, step: int, norm: float, row: int = 0, clips=(), loss: float = 1.0) -> None:
    norm, row = np.float32(norm), np.int32(row)
    skips.note(step, StepMetrics(np.float32(loss), norm, row > 0, row, {}), clips)


def test_a_limit_is_of_the_steps_up_to_two_before() -> None:
    """Whether or not the step before has been read."""
    skips, norms = Skips(CFG), [1.0, 2.0, 9.0, np.nan, 3.0, 5.0]
    limits = [skips.limit(1), skips.limit(2)]
    for step, norm in enumerate(norms, 1):
        early = skips.limit(step + 1) if step > 1 else None
        read(skips, step, norm)
        assert early is None or early == skips.limit(step + 1)
        limits.append(skips.limit(step + 2))
    assert limits[:4] == [np.inf] * 4
    # Medians of (1, 2, 9), (2, 9), (9, 3) and (3, 5).
    assert limits[4:] == [8.0, 22.0, 24.0, 16.0]
    assert all(limit.dtype == np.float32 for limit in limits)
    # Like a resumed run after each of the steps.
    for step in range(1, len(norms) + 1):
        written = json.loads(json.dumps([np.float32(norm).item() for norm in norms[:step]]))
        for known in (written, written[-4:]):
            resumed = Skips(CFG, step, norms=known)
            assert [resumed.limit(step + 1), resumed.limit(step + 2)] == limits[step : step + 2]


def test_where_no_norm_is_finite_there_is_no_limit() -> None:
    assert Skips(CFG, 4, norms=[np.nan, np.inf, np.nan, 1.0]).limit(5) == np.inf
    assert Skips(TrainConfig()).limit(5) is None
    off = Skips(TrainConfig())
    read(off, 1, 3.0)
    assert not off.norms and not off.figures


def test_skipped_steps_are_counted_named_and_end_a_run(capsys) -> None:
    skips = Skips(CFG, 8, count=5, norms=[1.0, 2.0, 1.0, 1.0])
    read(skips, 9, 7.0, row=1, clips=["a", "b"])
    assert skips.figures == {"skipped_total": 6.0, "grad_norm_limit": 4.0}
    read(skips, 10, 7.0, row=2, loss=np.inf)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: step 9: the norm of the gradient was 7, more than 4, 4 times the median of 3"
        " steps (--skip-spikes); the batch had clips a, b; the update is skipped (6 so far)",
        "warning: step 10: the loss or gradient was not finite; the update is skipped (7 so far)",
    ]
    with pytest.raises(TooManySkips, match=r"3 steps in a row .* --max-skipped-steps 3"):
        read(skips, 11, 7.0, row=3)
