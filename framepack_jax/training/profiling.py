"""Trace some steps of a run with JAX's profiler."""

import tempfile
from pathlib import Path

import jax
from etils import epath

from framepack_jax.training.config import profile_steps
from framepack_jax.utils import storage
from framepack_jax.utils.paths import is_remote

FOLDER = "profile"


class Profile:
    """Write a trace of steps START to STOP to RUN/profile, for TensorBoard or Perfetto. Every
    process traces its own devices."""

    def __init__(self, run: epath.PathLike, steps: str | None) -> None:
        self.target = epath.Path(run) / FOLDER
        self.steps = profile_steps(steps) if steps else (0, 0)
        self.folder: Path | None = None

    def before(self, step: int) -> None:
        """Start the trace before its first step."""
        first, last = self.steps
        if self.folder is None and first <= step <= last:
            self.folder = Path(tempfile.mkdtemp()) if is_remote(self.target) else Path(self.target)
            jax.profiler.start_trace(self.folder)

    def after(self, step: int, result: object) -> None:
        """End the trace after its last step, whose result is waited for."""
        if self.folder is not None and step >= self.steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that is under way."""
        if self.folder is None:
            return
        jax.profiler.stop_trace()
        if is_remote(self.target):
            storage.copy_tree(self.folder, self.target)
        self.folder, self.steps = None, (0, 0)
