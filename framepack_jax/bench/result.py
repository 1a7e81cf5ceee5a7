"""The figures of a part, and the lower bound of its time from the vendor's figures."""

import dataclasses
from collections.abc import Sequence

import jax

from framepack_jax.parallel.chips import chip_of


@dataclasses.dataclass(frozen=True)
class Result:
    """Measured seconds of a part.

    Args:
        seconds: Median of rounds after a warm-up.
        compile_seconds: Time of compilation, which is not part of `seconds`.
        flops: FLOPs on all devices, counted from the config; 0 if they are not counted.
        moved: Bytes that each device reads at least: its weights.
        memory: Bytes of the program on a device, by the compiler; 0 if it is not one program.
        steps: Number of denoising steps.
        batch: Number of samples of a training step.
    """

    seconds: float
    compile_seconds: float
    flops: int = 0
    moved: int = 0
    memory: int = 0
    steps: int = 0
    batch: int = 0

    def share(self, devices: Sequence[jax.Device]) -> float | None:
        """Return the share of the vendor's peak FLOP/s; None if it is not known."""
        chip = chip_of(devices[0])
        if chip is None or not self.flops:
            return None
        return self.flops / (chip.flops * len(devices) * self.seconds)

    def floor(self, devices: Sequence[jax.Device]) -> float | None:
        """Return the seconds that the work takes at the vendor's peak of bfloat16 products, or of
        the bandwidth if that is longer; None if the chip or the FLOPs are not known."""
        chip = chip_of(devices[0])
        if chip is None or not self.flops:
            return None
        return max(self.flops / (chip.flops * len(devices)), self.moved / chip.bandwidth)
