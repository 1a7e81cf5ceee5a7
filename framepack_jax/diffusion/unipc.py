"""UniPC for flow matching: the coefficients of its predictor and corrector.

Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models", arXiv 2302.04867, in its data-prediction form.

Along the path, with lambda = -log sigma, h = lambda_t - lambda_s and tau = (lambda - lambda_s) / h,
the step from s to t is exactly

    x_t = (sigma_t / sigma_s) x_s + h integral_0^1 e^{h (tau - 1)} x0(tau) dtau .

For x0(tau) = m0 + c_1 tau + c_2 tau^2 + ... the integral is g_0 m0 + g_1 c_1 + g_2 c_2 + ... with

    g_0 = 1 - e^{-h} = 1 - sigma_t / sigma_s,    g_n = 1 - (n / h) g_{n-1} .

Predictions at other times r_k give the divided differences (m_k - m0) / r_k = sum_n c_n r_k^{n-1},
and the weights w of these solve sum_k w_k r_k^{n-1} = g_n: the paper's rho_k, times B(h). B(h)
itself matters only where the paper takes rho = 1/2 in place of solving, with one difference: in the
predictor of order 2 (r < 0, the step before) and the corrector of order 1 (r = 1, the new point).
"""

from collections.abc import Sequence

import numpy as np

from framepack_jax.diffusion.solver import CORRECTOR, PREDICTOR, empty_table

MAX_ORDER = 3
VARIANTS = {"bh1": lambda h: h, "bh2": lambda h: -np.expm1(-h)}
"""|B(h)|; its sign in the paper's data prediction is minus."""


def table(sigmas: np.ndarray, variant: str = "bh1") -> np.ndarray:
    """Coefficients (steps, 9) float64 for `solver.step`; sigmas (steps + 1,) fall and end in 0.

    The move from sigma_{i-1} to sigma_i has order min(i, 3, steps - 1), as predictor and then as
    corrector; it is not lowered towards the end. Raises ValueError for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"UniPC variant {variant!r} is unknown; choose one of {sorted(VARIANTS)}")
    steps = len(sigmas) - 1
    lambdas = -np.log(np.asarray(sigmas[:-1], np.float64))
    orders = [min(i, MAX_ORDER, steps - 1) for i in range(1, steps)]
    return _table(lambdas, np.ones(steps), orders, variant)


def flow_table(sigmas: np.ndarray) -> np.ndarray:
    """Coefficients (steps, 9) like those of `table`, for the path x = (1 - sigma) x0 + sigma noise.

    This is UniPC of order 2 and variant bh2 with lambda = log((1 - sigma) / sigma), the logarithm
    of the signal-to-noise ratio, as diffusers' UniPCMultistepScheduler and HeliosScheduler have it.
    sigmas (steps + 1,) are below 1 and end in 0.
    """
    steps = len(sigmas) - 1
    sigmas = np.asarray(sigmas[:-1], np.float64)
    orders = [min(i, 2) for i in range(1, steps)]
    return _table(np.log(1 - sigmas) - np.log(sigmas), 1 - sigmas, orders, "bh2")


def _table(
    lambdas: np.ndarray, signals: np.ndarray, orders: Sequence[int], variant: str
) -> np.ndarray:
    """Coefficients of moves between x / signal, of these orders."""
    steps = len(lambdas)
    out = empty_table(steps)
    for i, order in enumerate(orders, start=1):
        h = lambdas[i] - lambdas[i - 1]
        past = (lambdas[i - order : i - 1][::-1] - lambdas[i - 1]) / h
        size = VARIANTS[variant](h)
        scale = np.array([signals[i] / signals[i - 1], *[signals[i]] * (order + 1)])
        predictor = _move(h, past, size if order == 2 else None)
        out[i - 1, PREDICTOR][: order + 1] = scale[: order + 1] * predictor
        corrector = scale * _move(h, np.append(past, 1.0), size if order == 1 else None)
        linear, m1, *older, m0 = corrector
        out[i, CORRECTOR][: order + 2] = [linear, m0, m1, *older]
    return out


def _move(h: float, times: np.ndarray, halved: float | None) -> np.ndarray:
    """Coefficients of x_s, of the prediction at s, and of those at `times` (in units of h from s).

    `halved` is |B(h)| where rho = 1/2 replaces the solution.
    """
    integrals = _integrals(h, len(times))
    if halved is None:
        weights = np.linalg.solve(np.vander(times, increasing=True).T, integrals[1:])
    else:
        weights = np.array([halved / 2])
    others = weights / times
    return np.array([np.exp(-h), integrals[0] - others.sum(), *others])


def _integrals(h: float, count: int) -> np.ndarray:
    """g_0 ... g_count."""
    out = [-np.expm1(-h)]
    for n in range(1, count + 1):
        out.append(1 - n / h * out[-1])
    return np.array(out)
