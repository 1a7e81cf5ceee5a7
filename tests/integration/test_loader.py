"""The stream of training samples with several windows and from worker processes."""

import pytest

from framepack_jax.data import fingerprint
from framepack_jax.data.records import DatasetError
from tests.fixtures.loading import INVERTED, bits, take


def test_windows_are_drawn_for_each_batch(dataset) -> None:
    """Evenly, the same however the stream is read; a sample is that of its window's schedule."""
    folder, clips = dataset
    opened, batches = take(folder, 60, windows=(2, 1))
    windows = [batch.target.shape[1] for batch in batches]
    assert set(windows) == {1, 2} and 18 <= windows.count(1) <= 42
    _, plain = take(folder, 60, schedule=INVERTED.replace("_g2_", "_g1_"))
    for batch, alone, window in zip(batches, plain, windows, strict=True):
        if window == 1:
            assert bits(batch) == bits(alone)
        assert batch.meta.sections.tolist() == [
            (len(clips[c].latents) - 1) // window for c in batch.meta.clip
        ]
    _, later = take(
        folder, 5, windows=(2, 1), state=take(folder, 55, windows=(2, 1))[0].get_state()
    )
    assert [bits(b) for b in later] == [bits(b) for b in batches[55:]]
    held = take(folder, 0, windows=(1,), holdout=2)[0].held_out(2, 4)
    assert {batch.target.shape[1] for batch, *_ in held} == {2}
    with pytest.raises(DatasetError, match="a section of 6"):
        take(folder, 0, windows=(1, 6))
    with pytest.raises(DatasetError, match="windows = "):
        fingerprint.check_fingerprint(opened.fingerprint, take(folder, 0)[0].fingerprint)


def test_worker_processes_read_the_same(dataset) -> None:
    folder, _ = dataset
    _, here = take(folder, 3)
    _, there = take(folder, 3, workers=1)
    assert [bits(b) for b in here] == [bits(b) for b in there]
