"""Solvers by name."""

from collections.abc import Callable

import numpy as np

from framepack_jax.diffusion import solver, unipc

SOLVERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "unipc": unipc.table,
    "unipc-bh2": lambda sigmas: unipc.table(sigmas, variant="bh2"),
    "euler": solver.euler,
}


def solver_table(name: str, sigmas: np.ndarray) -> np.ndarray:
    """Return coefficients (steps, 9) float64 of the solver called `name`, for `solver.step`.

    Raises ValueError if there is no such solver.
    """
    if name not in SOLVERS:
        raise ValueError(f"sampler {name!r} is unknown; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name](sigmas)
