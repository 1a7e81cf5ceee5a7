"""Steps whose update is skipped: the loss or gradient is not finite, or the gradient is a spike.

The compiled step decides, by a limit on the norm of the gradient. The limit of step n follows from
the norms of steps up to n - 2, as a host reads the norm of step n - 1 while step n runs. So no host
waits for its device, and all hosts have the same limit. Checkpoints store the norms.
"""

import collections
import itertools
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from framepack_jax.parallel.multihost import is_primary
from framepack_jax.training.config import RunConfig
from framepack_jax.training.task import StepMetrics
from framepack_jax.utils.progress import Bar

MAX_CLIPS = 8


class TooManySkips(FloatingPointError):
    """The updates of too many steps in a row were skipped."""


class Skips:
    """Compute the limit of each step; count, print and explain the steps that are skipped.

    `step` is the newest step, `count` the number of skipped steps so far, `norms` are those of the
    newest steps, in order. `figures` are the newest step's, for the log.
    """

    def __init__(
        self, cfg: RunConfig, step: int = 0, count: int = 0, norms: Iterable[float] = ()
    ) -> None:
        self.most, self.spikes = cfg.max_skipped_steps, cfg.skip_spikes
        self.step, self.count = step, count
        # One more than the window, as the newest may not be used yet.
        self.norms = collections.deque(norms, maxlen=self.spikes.window + 1)
        self.figures: dict[str, float] = {}

    def limit(self, step: int) -> np.float32 | None:
        """Return the limit of a step, one or two after the newest; infinite before there are enough
        norms, None if spikes are not skipped."""
        if not self.spikes.factor:
            return None
        usable = max(0, len(self.norms) - (self.step == step - 1))
        recent = np.array([*itertools.islice(self.norms, usable)][-self.spikes.window :])
        finite = recent[np.isfinite(recent)]
        if len(recent) < self.spikes.window or not len(finite):
            return np.float32(np.inf)
        return np.float32(self.spikes.factor * np.median(finite))

    def note(self, step: int, metrics: StepMetrics, clips: Sequence[str]) -> None:
        """Take the metrics (numpy) of the step after the newest, whose batch has these clips.

        Raises TooManySkips."""
        limit = self.limit(step)
        if metrics.skipped:
            self._note_skipped(step, metrics, limit, clips)
        self.step = step
        if limit is not None:
            self.norms.append(float(metrics.grad_norm))
            self.figures = {"skipped_total": float(self.count)}
            self.figures |= {"grad_norm_limit": float(limit)} if np.isfinite(limit) else {}

    def _note_skipped(
        self, step: int, metrics: StepMetrics, limit: np.float32 | None, clips: Sequence[str]
    ) -> None:
        """Print that a step was skipped, or raise TooManySkips."""
        self.count += 1
        why = "the loss or gradient was not finite"
        if limit is not None and np.isfinite([metrics.loss, metrics.grad_norm]).all():
            median = f"{self.spikes.factor:g} times the median of {self.spikes.window} steps"
            why = (
                f"the norm of the gradient was {metrics.grad_norm:.3g}, more than {limit:.3g},"
                f" {median} (--skip-spikes)"
            )
        names = f"; the batch had clips {', '.join(clips[:MAX_CLIPS])}" if clips else ""
        row = int(metrics.skipped_in_a_row)
        if row >= self.most:
            raise TooManySkips(
                f"step {step}: {why}{names}. The updates of {row} steps in a row were skipped, as"
                f" many as --max-skipped-steps {self.most}"
            )
        if is_primary():
            text = f"step {step}: {why}{names}; the update is skipped ({self.count} so far)"
            Bar.write(f"warning: {text}", file=sys.stderr)
