"""One sampling step for every solver: a row of numbers, and the linear combination it means.

The solvers here are linear in the states and x0 predictions they have seen, with coefficients that
depend on the sigmas alone. So a solver is a table worked out once on the host in float64, and the
device runs one small step that is the same for all steps, sections and solvers.

Step i holds x_i, which the network has just turned into the prediction m0; the corrected state
`base` of step i-1; and the predictions m1, m2, m3 of steps i-1, i-2, i-3. A row of COLUMNS numbers

    a b0 b1 b2 b3 | c d0 d1 d2

takes them to

    corrected x_i     = a base + b0 m0 + b1 m1 + b2 m2 + b3 m3
    predicted x_{i+1} = c corrected + d0 m0 + d1 m1 + d2 m2

A solver that adds the starting noise again has a tenth number, the weight of x_0 in x_{i+1}.

The last row goes to sigma 0, where every solver returns m0, so the network is never asked there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HISTORY = 3
CORRECTOR = slice(0, 5)
PREDICTOR = slice(5, 9)
COLUMNS = 9


class State(NamedTuple):
    """State between two steps; all arrays have the shape of the noise."""

    x: jax.Array
    """Input of the network at the next step; after the last step, the sample."""
    base: jax.Array
    """The corrected state of the step before."""
    history: tuple[jax.Array, ...]
    """x0 predictions, latest first; zeros where there was no step yet."""
    noise: jax.Array | None = None
    """The start, for a solver that adds it again."""


def start(noise: jax.Array, again: bool = False) -> State:
    """Return the state before the first step, in float32 (float64 noise stays float64); `again` for
    a solver that adds the noise again."""
    noise = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    return State(noise, noise, (jnp.zeros_like(noise),) * HISTORY, noise if again else None)


def step(state: State, x0: jax.Array, row: jax.Array) -> State:
    """Take a step with the prediction x0 at `state.x`; row (9,) or (10,) is a row of a solver's
    table."""
    x0 = x0.astype(state.x.dtype)
    row = jnp.asarray(row, state.x.dtype)
    known = (x0, *state.history)
    corrected = _combine(row[CORRECTOR], (state.base, *known))
    x = _combine(row[PREDICTOR], (corrected, *known[:HISTORY]))
    if state.noise is not None:
        x += row[COLUMNS] * state.noise
    return State(x, corrected, known[:HISTORY], state.noise)


def empty_table(steps: int) -> np.ndarray:
    """Return a table (steps, 9) float64 whose first row corrects nothing and last row ends."""
    table = np.zeros((steps, COLUMNS))
    table[0, CORRECTOR] = [1, 0, 0, 0, 0]
    table[-1, PREDICTOR] = [0, 1, 0, 0]
    return table


def euler(sigmas: np.ndarray) -> np.ndarray:
    """Return the table (steps, 9) float64 of Euler's method; sigmas (steps + 1,) end in 0.

    x_{i+1} = r x_i + (1 - r) m0 with r = sigma_{i+1} / sigma_i. The corrector only makes the same
    move from the state before.
    """
    sigmas = np.asarray(sigmas, np.float64)
    ratios = sigmas[1:] / sigmas[:-1]
    table = empty_table(len(ratios))
    for i, ratio in enumerate(ratios[:-1]):
        table[i, PREDICTOR] = [ratio, 1 - ratio, 0, 0]
        table[i + 1, CORRECTOR] = [ratio, 0, 1 - ratio, 0, 0]
    return table


def renoise(sigmas: np.ndarray) -> np.ndarray:
    """Return the table (steps, 10) float64 that goes to each next noise level by adding the start
    to the prediction, x_{i+1} = (1 - sigma_{i+1}) m0 + sigma_{i+1} x_0: the sampler of networks
    distilled by DMD (arXiv 2311.18828)."""
    table = np.zeros((len(sigmas) - 1, COLUMNS + 1))
    table[:, 0] = 1
    table[:, PREDICTOR.start + 1] = 1 - np.asarray(sigmas[1:], np.float64)
    table[:, COLUMNS] = sigmas[1:]
    return table


def _combine(weights: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Return the weighted sum of equal-shaped arrays."""
    return sum(weight * array for weight, array in zip(weights, arrays, strict=True))
