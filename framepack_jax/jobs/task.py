"""A video to sample: its run folder, layout, settings and inputs."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from framepack_jax.generation.layout import Layout
from framepack_jax.generation.pipeline import Settings
from framepack_jax.generation.request import Request
from framepack_jax.jobs.run_dir import RunDir

# Fields of a record that depend on the machine that continues the run.
MACHINE_FIELDS = ("offload", "decode_tile")
# A request, and the frames of an extended video that no section changes, if any.
Inputs = tuple[Request, Iterator[np.ndarray] | None]


@dataclasses.dataclass(eq=False)
class Task:
    """A video to sample.

    `read` returns the inputs of a new run; a resumed run has its `request` in the folder. `seen` is
    the record that the folder held. If another process has changed it since, `refresh` returns the
    remaining task, or None if that process has finished the run. `on_progress` is called after each
    step with the sampled fraction of the video; it may raise KeyboardInterrupt to stop. `steering`
    returns the prompts that were given since the run began, oldest first; the last leads the next
    section and those after it.
    """

    run: RunDir
    layout: Layout
    settings: Settings
    read: Callable[[], Inputs] | None = None
    request: Request | None = None
    seen: str | None = None
    refresh: Callable[[], "Task | None"] | None = None
    on_progress: Callable[[float], None] | None = None
    steering: Callable[[], Sequence[str]] | None = None

    @property
    def group(self) -> tuple[Layout, Settings, float]:
        """Values that tasks of one batch share."""
        return self.layout, self.settings, self.run.record["flags"]["prompt_blend"]

    @property
    def key(self) -> Hashable:
        """Hashable key, equal for tasks that may share a batch."""
        return self.group, self.batch_peers

    @property
    def batch_peers(self) -> tuple[str, ...]:
        """Names of the runs in the batch of the finished sections. Resuming is bit-exact only in
        the same batch."""
        return tuple(self.run.record["batch"]) if self.run.has_sections() else ()

    @property
    def prepared(self) -> Request:
        """The request of a task that was started."""
        assert self.request is not None, "the task was not started"
        return self.request

    def replace_with(self, other: "Task") -> None:
        """Become another task of the same folder, except for how this machine decodes."""
        kept = {name: self.run.record[name] for name in MACHINE_FIELDS if name in self.run.record}
        ours = {"on_progress": self.on_progress, "steering": self.steering}
        vars(self).update(vars(other) | ours)
        self.run.record |= kept
