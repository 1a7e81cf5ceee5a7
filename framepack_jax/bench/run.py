"""Measure the parts of a bench one after another; a part that fails does not stop the others."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from framepack_jax.bench import sampling, training
from framepack_jax.bench.memory import NoRoom, is_full
from framepack_jax.bench.report import Outcome
from framepack_jax.bench.result import Result
from framepack_jax.bench.workload import Workload
from framepack_jax.utils.messages import first_line

FAILURES = (NoRoom, ValueError, jax.errors.JaxRuntimeError)
# The role whose weights a part reads.
ROLES = {"step": "transformer", "section": "transformer", "decode": "vae"}
MEASURES: dict[str, Callable[[Workload, Any], Result]] = {
    "step": sampling.measure_step,
    "section": sampling.measure_section,
    "decode": sampling.measure_decode,
}


def measure(
    work: Workload,
    parts: Sequence[str],
    trainable: training.Trainable = "lora",
    mesh: str | None = None,
) -> Iterator[tuple[str, Outcome]]:
    """Yield the figures of each part, or why there are none.

    Weights stay on the device as long as following parts read them. `mesh` are the sizes of the
    axes for training; default: those of `framepack train`.
    """
    held: dict[str, Any] = {}
    for part in parts:
        role = ROLES.get(part, "")
        for other in held.keys() - {role}:
            del held[other]
        try:
            if part == "train":
                setup = training.training_setup(work, trainable, mesh)
                outcome: Outcome = training.measure_training(work, *setup)
            else:
                if role not in held:
                    held[role] = work.weights(role)
                outcome = MEASURES[part](work, held[role])
        except FAILURES as error:
            problem = "does not fit in memory" if is_full(error) else "failed"
            outcome = f"{problem}: {first_line(error)}"
        yield part, outcome
