"""Write checkpoints in the background, and tell all hosts why one could not be written."""

import threading
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from framepack_jax.parallel import multihost
from framepack_jax.training import checksums
from framepack_jax.training.checkpoints import CHECKSUMS
from framepack_jax.training.state import TrainState
from framepack_jax.utils.messages import first_line
from framepack_jax.utils.write_errors import explain_write_error


class CheckpointWriter:
    """Write the checkpoints of a run, one after the other.

    All processes call `save` and `wait` together. If a process cannot write its part, the others
    wait --checkpoints.wait-seconds for it. Then `failed` is true in all, and the next `save` or
    `wait` raises the error of that process in all.
    """

    def __init__(self, manager: ocp.CheckpointManager) -> None:
        self.manager = manager
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, step: int, state: TrainState[jax.Array], data: dict[str, Any]) -> None:
        """Start to write a checkpoint. Raises OSError, also if the one before could not be
        written."""
        self.wait()
        if step in self.manager.all_steps():
            return
        data = data | {CHECKSUMS: checksums.checksums(state)}
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
                ),
            )
        except Exception as error:  # each store has errors of its own
            self._error = error
            raise self._not_written(error) from error
        self._thread = threading.Thread(target=self._follow, name="checkpoint", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        """Wait for the write in the background, and keep its error."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:  # each store has errors of its own
            self._error = error

    def failed(self) -> bool:
        """Return whether a checkpoint could not be written, as far as this process knows."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until all checkpoints are written. Raises OSError if one could not be written."""
        if self._thread is not None:
            self._thread.join()
        try:
            multihost.on_all_hosts(self._check)
        except jax.errors.JaxRuntimeError:
            # Another process is gone: tell what this one knows.
            self._check()
            raise

    def _check(self) -> None:
        if self._error is not None:
            raise self._not_written(self._error) from self._error

    def _not_written(self, error: Exception) -> OSError:
        """Return what to tell of an error of this process, or of a wait for another in vain."""
        folder, cause = self.manager.directory, _cause(error)
        newest = _newest(folder)
        if isinstance(cause, TimeoutError):
            return TimeoutError(
                f"a checkpoint in {folder} could not be written: a process has not written its part"
                f" in --checkpoints.wait-seconds; {newest}. See the output of the other processes"
                " and check the storage, then run the same command again to resume"
            )
        return OSError(
            f"a checkpoint in {folder} could not be written"
            f" {explain_write_error(cause, multihost.here())}, then run the same command again to"
            f" resume; {newest}"
        )

    def close(self) -> None:
        """Wait for the last checkpoint, and close the manager."""
        if self._thread is not None:
            self._thread.join()
        # The manager raises errors again.
        if not self.failed():
            self.manager.close()


def _newest(folder: epath.Path) -> str:
    """Tell which checkpoint a run has."""
    try:
        steps = ocp.path.step.checkpoint_steps(folder)
    except Exception as error:  # each store has errors of its own
        return f"the folder cannot be listed ({first_line(error)})"
    return f"the newest complete checkpoint is step {max(steps)}" if steps else "none is complete"


def _cause(error: Exception) -> BaseException:
    """Return the error of this process, which comes before that of waiting for others in vain."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return error.__context__ or error
    return error
