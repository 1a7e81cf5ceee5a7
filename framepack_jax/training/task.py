"""The interface between the trainer and what it trains."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from framepack_jax.training.config import RunConfig
from framepack_jax.training.state import Params, TrainState

# Trees that only the task itself looks into.
Batch = Any
Frozen = Any
Networks = Any
Figures = Mapping[str, jax.Array]
Record = dict[str, Any]
# (step, trained parameters, frozen parameters, check) -> figures for the log; also writes videos.
# It calls `check`, which raises once the run is told to stop, as often on every host.
Validator = Callable[[int, Params, Frozen, Callable[[], None]], dict[str, float]]


class StepMetrics(NamedTuple):
    """Metrics of one step.

    `loss` is the mean loss, `grad_norm` the norm of the gradient before clipping, `skipped` whether
    the update was skipped, `skipped_in_a_row` the number of such steps up to this one, `figures`
    what the loss of the task returns beside it.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    figures: Figures


class Cost(NamedTuple):
    """FLOPs of a forward pass and tokens of one sample; FLOPs of forward passes without a gradient,
    as a mean over steps: of predicted history, of a teacher and its student's target."""

    flops: int
    tokens: int
    more_flops: float = 0.0


class Loader(Protocol):
    """An endless stream of batches with a position that can be saved."""

    def __iter__(self) -> Iterator[Any]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """A loss with its parameters and its data.

    `abstract` is the state of a run as `jax.ShapeDtypeStruct`s with shardings. `blank` makes a
    batch without data for the number of steps since the data failed, or is None on one host.
    `flops_factor` is the cost of a step in forward passes.
    """

    @property
    def cfg(self) -> RunConfig: ...

    @property
    def mesh(self) -> Mesh: ...

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs: ...

    @property
    def abstract(self) -> TrainState[jax.ShapeDtypeStruct]: ...

    @property
    def loader(self) -> Loader: ...

    @property
    def blank(self) -> Callable[[int], Any] | None: ...

    @property
    def max_bad_records(self) -> int: ...

    @property
    def grad_accum_steps(self) -> int: ...

    @property
    def flops_factor(self) -> int: ...

    # The loss.

    def key(self, step: jax.Array) -> jax.Array:
        """Return the random key of a step."""

    def merge(self, trained: Params, frozen: Frozen) -> Networks:
        """Return the parameters of the networks that the loss takes."""

    def loss(
        self, params: Networks, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (losses, whose mean is minimised; figures for the log)."""

    def figures(self, steps: Sequence[StepMetrics]) -> dict[str, float]:
        """Summarise the figures of some steps for the log."""

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Set the precision of matrix products while programs are compiled."""

    # The parameters.

    def init_state(self) -> tuple[TrainState[jax.Array], Frozen, str]:
        """Return (state before the first step, frozen parameters, where they come from)."""

    def load_frozen(self) -> Frozen:
        """Return the frozen parameters of a run that is resumed."""

    # The run.

    def record(self, previous: Record | None) -> Record:
        """Return what run.json says; `previous` is the record of a run that is resumed.

        Raises RunError if this run cannot continue the previous one or start from --init."""

    def check_data(self) -> None:
        """Raise DatasetError if the data cannot make batches."""

    def batches(self) -> Sequence[tuple[Batch, Cost | None]]:
        """Return an abstract batch of each shape that the loader yields, and a sample's cost."""

    def describe(self, step: int) -> Iterator[str]:
        """Yield the lines that are printed before the steps after `step`."""

    def validates_after(self, step: int) -> bool:
        """Return True if a validation follows step `step`."""

    def validator(self, frozen: Frozen) -> Validator | None:
        """Read the held-out data; returns None if there is no validation."""

    def clip_ids(self, clips: np.ndarray) -> list[str]:
        """Return the names of the clips of a batch, for an error message."""
