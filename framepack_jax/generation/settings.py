"""Settings of the sampler for all sections of a video."""

import dataclasses

import numpy as np

from framepack_jax.diffusion import SOLVERS
from framepack_jax.diffusion.step_cache import StepCacheConfig

MAX_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings for denoising a section. The defaults are those of the release.

    `distilled_guidance` is the scale that a guidance-distilled network takes as an input.
    `cfg_scale` is that of classifier-free guidance (1: no second pass, no negative prompt), and
    `cfg_rescale` in [0, 1] corrects the contrast that it adds.
    `step_cache` leaves the transformer's blocks out at steps where they would change little.
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
