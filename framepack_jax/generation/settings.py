"""Settings of the sampler for all sections of a video."""

import dataclasses

import numpy as np

from framepack_jax.diffusion import SOLVERS
from framepack_jax.diffusion.step_cache import StepCacheConfig

MAX_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the sampler. The defaults are those of the release.

    Args:
        steps: Denoising steps for each section.
        sampler: Solver, one of `diffusion.SOLVERS`.
        distilled_guidance: Scale that a guidance-distilled network takes as an input.
        cfg_scale: Scale of classifier-free guidance; 1 needs no second pass and no negative prompt.
        cfg_rescale: Correction in [0, 1] of the contrast that a high scale adds.
        step_cache: Cache that skips transformer blocks at steps where they would change little.

    Raises ValueError if a setting is out of range.
    """

    steps: int = 25
    sampler: str = "unipc"
    distilled_guidance: float = 10.0
    cfg_scale: float = 1.0
    cfg_rescale: float = 0.0
    step_cache: StepCacheConfig | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps = {self.steps}: expected at least 1, at most {MAX_STEPS}")
        if self.sampler not in SOLVERS:
            raise ValueError(f"sampler {self.sampler!r}: expected one of {', '.join(SOLVERS)}")
        if not 0 <= self.cfg_rescale <= 1:
            raise ValueError(f"cfg_rescale = {self.cfg_rescale}: expected a number from 0 to 1")
        for name in ("distilled_guidance", "cfg_scale"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)}: expected a finite number")


DEFAULT_SETTINGS = Settings()
