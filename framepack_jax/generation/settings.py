"""Settings of the sampler for all sections of a video."""

import dataclasses

import numpy as np

from framepack_jax.bundle import Sampling
from framepack_jax.diffusion import SOLVERS
from framepack_jax.diffusion.network import Network
from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.diffusion.section import SectionSettings
from framepack_jax.diffusion.step_cache import StepCacheConfig, check_fit
from framepack_jax.packing import Schedule, history_ages

MAX_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the sampler. The defaults are those of FramePack's release; `of` gives those of a
    bundle.

    Args:
        steps: Denoising steps for each section, or for each stage of a section.
        sampler: Solver, one of `diffusion.SOLVERS`.
        distilled_guidance: Scale that a guidance-distilled network takes as an input.
        cfg_scale: Scale of classifier-free guidance; 1 needs no second pass and no negative prompt.
        cfg_without: What the second pass lacks: "prompt", replaced by the negative prompt, or
            "history" (history guidance).
        cfg_rescale: Correction in [0, 1] of the contrast that a high scale adds.
        history_noise: Noise the history to this factor in [0, 1] of the noise level of each step.
        flow_shift: Factor s of the shift s t / (1 + (s - 1) t) of the noise levels, in place of the
            recipe's, or None.
        step_cache: Cache that skips transformer blocks at steps where they would change little.

    Raises ValueError if a setting is out of range.
    """

    steps: int | tuple[int, ...] = 25
    sampler: str = "unipc"
    distilled_guidance: float = 10.0
    cfg_scale: float = 1.0
    cfg_without: str = "prompt"
    cfg_rescale: float = 0.0
    history_noise: float = 0.0
    flow_shift: float | None = None
    step_cache: StepCacheConfig | None = None

    def __post_init__(self) -> None:
        for steps in self.steps if isinstance(self.steps, tuple) else (self.steps,):
            if not 1 <= steps <= MAX_STEPS:
                raise ValueError(f"steps = {steps}: expected at least 1, at most {MAX_STEPS}")
        if self.sampler not in SOLVERS:
            raise ValueError(f"sampler {self.sampler!r}: expected one of {', '.join(SOLVERS)}")
        if self.cfg_without not in ("prompt", "history"):
            raise ValueError(f"cfg_without {self.cfg_without!r}: expected prompt or history")
        if not 0 <= self.cfg_rescale <= 1:
            raise ValueError(f"cfg_rescale = {self.cfg_rescale}: expected a number from 0 to 1")
        if not 0 <= self.history_noise <= 1:
            raise ValueError(f"history_noise = {self.history_noise}: expected a number from 0 to 1")
        if self.flow_shift is not None and not 0 < self.flow_shift < np.inf:
            raise ValueError(f"flow_shift = {self.flow_shift}: expected a number above 0")
        for name in ("distilled_guidance", "cfg_scale"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)}: expected a finite number")

    @classmethod
    def of(cls, sampling: Sampling) -> "Settings":
        """Return the settings that a bundle was made for."""
        return cls(
            steps=sampling.steps,
            distilled_guidance=sampling.distilled_guidance,
            cfg_scale=sampling.cfg_scale,
            history_noise=sampling.history_noise,
        )

    @property
    def passes(self) -> int:
        """Number of runs of the network in a step."""
        return 1 + (self.cfg_scale != 1)

    @property
    def reads_negative_prompt(self) -> bool:
        """True if the second pass reads a negative prompt."""
        return self.passes == 2 and self.cfg_without == "prompt"

    @property
    def guides_by_history(self) -> bool:
        """True if the second pass reads no history."""
        return self.passes == 2 and self.cfg_without == "history"

    def stage_steps(self, sampling: Sampling, section: int) -> tuple[int, ...]:
        """Return the steps of each stage of a section, counted from 0 in order of generation.

        Raises ValueError if there are not as many numbers as stages.
        """
        recipe = sampling.recipe
        steps = self.steps if isinstance(self.steps, tuple) else (self.steps,) * recipe.stages
        if len(steps) != recipe.stages:
            raise ValueError(f"steps = {steps}: expected {recipe.stages}, one for each stage")
        if section == 0 and recipe.double_first:
            return tuple(2 * count for count in steps)
        return steps

    def recipe(self, sampling: Sampling) -> Recipe:
        """Return the recipe of a bundle with the shift of the settings."""
        if self.flow_shift is None:
            return sampling.recipe
        return dataclasses.replace(sampling.recipe, shift="fixed", shift_factor=self.flow_shift)

    def check(self, network: Network, sampling: Sampling, schedule: Schedule) -> None:
        """Raise ValueError if a network cannot be sampled with these settings and schedule."""
        self.stage_steps(sampling, 0)
        if self.step_cache is not None:
            check_fit(network, self.step_cache.kind)
        if self.history_noise and schedule.codebook is not None:
            raise ValueError(
                f"history_noise = {self.history_noise:g} with schedule {schedule}: +D replaces each"
                " pixel of the history by its nearest entry, and its noise with it; give"
                " --history-noise 0, or a schedule without +D"
            )
        if self.history_noise and not any(
            max(ages, default=-1) >= 0 for ages in history_ages(schedule)
        ):
            raise ValueError(
                f"history_noise = {self.history_noise:g}: schedule {schedule} reads no history;"
                " give --history-noise 0, or a schedule with history"
            )

    def of_section(self, sampling: Sampling, section: int, dtype: str) -> SectionSettings:
        """Return the settings of a section's denoising in a dtype."""
        return SectionSettings(
            self.stage_steps(sampling, section), self.sampler, self.cfg_scale, self.cfg_rescale,
            dtype, self.step_cache,
        )  # fmt: skip
