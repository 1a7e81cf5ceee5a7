"""How a network is sampled: its noise levels, solver and stages, as it was trained or distilled."""

import dataclasses
import math
from typing import Annotated, Literal, NamedTuple

import numpy as np

from framepack_jax.diffusion import flow, pyramid, solver, unipc
from framepack_jax.diffusion.solver_tables import solver_table
from framepack_jax.utils.fields import Range

# A solver by the signal-to-noise ratio cannot start without any signal.
NO_SIGNAL = 2.0**-20
Share = Annotated[float, Range(above=0, at_most=1)]


class Levels(NamedTuple):
    """Noise levels of one stage: sigmas (steps + 1,), falling to 0, and the times (steps,) in
    [0, 1] that the network is told, None for the same."""

    sigmas: np.ndarray
    times: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is sampled.

    Args:
        solver: Solver of a step. "free" takes the one of the settings; "renoise" adds the noise
            that a stage started from to each prediction, for distilled networks (DMD).
        highest, lowest: The noise levels before the shift fall from the one towards the other,
            which would be that of one more step.
        shift: Shift of the noise levels: by the number of tokens, "fixed" by `shift_factor`, none.
        shift_factor: Factor s of the shift s t / (1 + (s - 1) t), if it is fixed.
        max_shift: Upper bound of the exponent of a shift by tokens, or None.
        exponential: Shift by tokens by e^mu, else by mu itself.
        stages: Stages of growing resolution, see `pyramid`.
        gamma: Correlation of the noise between stages.
        whole_times: Tell the network times in whole thousandths.
        zero_star: Scale the negative prediction by its projection (CFG-Zero*).
        zero_steps: First steps of the first stage whose velocity is taken as zero, with guidance.
        double_first: Take twice the steps in the first section.
    """

    solver: Literal["free", "unipc-flow", "euler", "renoise"] = "free"
    highest: Share = 1.0
    lowest: float = 0.0
    shift: Literal["tokens", "fixed", "none"] = "tokens"
    shift_factor: float = 1.0
    max_shift: float | None = flow.MAX_MU
    exponential: bool = True
    stages: int = 1
    gamma: Share = 1 / 3
    whole_times: bool = False
    zero_star: bool = False
    zero_steps: int = 0
    double_first: bool = False

    def table(self, levels: Levels, name: str) -> np.ndarray:
        """Return the coefficients of the solver for these levels; `name` is the user's choice,
        where the recipe leaves it free."""
        match self.solver:
            case "free":
                return solver_table(name, levels.sigmas)
            case "unipc-flow":
                return unipc.flow_table(levels.sigmas)
            case "renoise":
                return solver.renoise(levels.sigmas)
            case "euler":
                return solver.euler(levels.sigmas)

    def levels(self, steps: int, tokens: int, stage: int = 0) -> Levels:
        """Return the noise levels of a stage that starts from latents of so many tokens.

        Raises ValueError if there is no step.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; a sampler needs at least 1")
        exponent = self._exponent(tokens)
        if self.stages == 1:
            sigmas = np.linspace(self.highest, self.lowest, steps + 1)
            sigmas[-1] = 0.0
            sigmas = flow.shift(sigmas, exponent) if exponent else sigmas
            if self.solver == "unipc-flow":
                sigmas = np.minimum(sigmas, 1 - NO_SIGNAL)
            times = sigmas[:-1] if self.whole_times else None
        else:
            part = pyramid.stages(self.stages, self.gamma)[stage]
            # A step of DMD ends at the noise level of the next, so the last has no point.
            points = steps + (self.solver == "renoise")
            sigmas = np.append(np.linspace(0.999, 0.999 / pyramid.LEVELS, points)[:steps], 0.0)
            times = np.linspace(part.first, part.last, points)[:steps]
            if exponent:
                sigmas = flow.shift(sigmas, exponent)
                times = part.last + sigmas[:-1] * (part.first - part.last)
        if self.whole_times and times is not None:
            times = np.floor(1000 * times) / 1000
        return Levels(sigmas, times)

    def _exponent(self, tokens: int) -> float:
        """Return mu of the shift e^mu t / (1 + (e^mu - 1) t)."""
        if self.shift == "none":
            return 0.0
        if self.shift == "fixed":
            return math.log(self.shift_factor)
        mu = flow.linear_mu(tokens)
        mu = mu if self.max_shift is None else min(mu, self.max_shift)
        return mu if self.exponential else math.log(mu)
