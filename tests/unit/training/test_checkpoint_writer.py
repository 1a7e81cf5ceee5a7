"""A checkpoint that cannot be written is named with its cause, by the next call."""

import contextlib
import re
import socket
import threading

import jax.numpy as jnp
import pytest
from jax.experimental import multihost_utils

from framepack_jax.training import checkpoints
from framepack_jax.training.checkpoint_writer import CheckpointWriter
from framepack_jax.training.config import CheckpointConfig

STATE = {"x": jnp.arange(6.0)}


@pytest.fixture
def writer(tmp_path):
    with contextlib.closing(
        CheckpointWriter(checkpoints.manager(tmp_path, CheckpointConfig()))
    ) as opened:
        yield opened


def test_a_write_that_fails_in_the_background_is_noticed(writer, monkeypatch) -> None:
    """Without a call that waits; a run that saves rarely hears of it between two steps."""
    writer.save(1, STATE, {})
    writer.wait()
    assert not writer.failed()
    began = threading.Event()

    def full(*_: object) -> None:
        assert began.wait(60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.manager, "_finalize_checkpoint", full)
    writer.save(2, STATE, {})
    assert not writer.failed()
    began.set()
    writer._thread.join(60)
    assert writer.failed()
    said = re.escape(
        f"a checkpoint in {writer.manager.directory} could not be written by"
        f" {socket.gethostname()}: no space left ([Errno 28] No space left on device); free space,"
        " then run the same command again to resume; the newest complete checkpoint is step"
    )
    for call in (writer.wait, lambda: writer.save(3, STATE, {})):
        with pytest.raises(OSError, match=said):
            call()


def test_a_save_does_not_ask_for_signals(writer, monkeypatch) -> None:
    """The trainer asks, once a step. With questions of other steps between, processes may stop
    after different steps, or not at all."""
    asked: list[int] = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    for step in (1, 2):
        writer.save(step, STATE, {})
    writer.wait()
    assert not asked


def test_a_folder_that_cannot_be_made_is_named(writer) -> None:
    folder = writer.manager.directory
    folder.rmtree()
    folder.write_text("a file")
    with pytest.raises(OSError, match=f"a checkpoint in {folder} could not be written by"):
        writer.save(1, STATE, {})
        writer.wait()
    assert writer.failed()
