"""The step of a run with the lowest loss on held-out clips, whose checkpoint is kept.

RUN/best.json    its number and its loss
"""

import json
from collections.abc import Sequence

from etils import epath
from orbax.checkpoint.checkpoint_managers import (
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from framepack_jax.utils.files import atomic_write_text

FILE = "best.json"
# The figure of a validation that is compared.
FIGURE = "validation/loss"


class Best(PreservationPolicy):
    """Keep the checkpoint of the best step so far."""

    def __init__(self, step: int | None = None, loss: float = float("inf")) -> None:
        self.step, self.loss = step, loss

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Return True for the best step only."""
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]

    def note(self, step: int, figures: dict[str, float]) -> bool:
        """Take the figures of a validation; return True if no other step was as good."""
        loss = figures.get(FIGURE, float("inf"))
        if not loss < self.loss:
            return False
        self.step, self.loss = step, loss
        return True


def write_best(run: epath.PathLike, best: Best) -> None:
    """Write the best step of a run."""
    text = json.dumps({"step": best.step, FIGURE: best.loss})
    atomic_write_text(epath.Path(run) / FILE, text + "\n")


def read_best(run: epath.PathLike, steps: Sequence[int]) -> Best:
    """Read the best step of a run, if it is one of those with a checkpoint."""
    file = epath.Path(run) / FILE
    if not file.exists():
        return Best()
    found = json.loads(file.read_text())
    return Best(found["step"], found[FIGURE]) if found["step"] in steps else Best()
