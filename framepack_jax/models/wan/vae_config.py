"""Sizes of Wan 2.1's autoencoder, and the statistics of its latents."""

import dataclasses

import numpy as np

from framepack_jax.models.sizes import Layers, Size

# Mean and standard deviation of each latent channel of the released autoencoder.
# Source: `latents_mean` and `latents_std` of Wan 2.1's VAE.
RELEASED_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
RELEASED_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
# Colours of normalised latents, fitted for previews: weights and bias. Source: the factors of
# ComfyUI's latent format "Wan21".
PREVIEW = (
    np.array(
        [[-0.1299, -0.1692, 0.2932], [0.0671, 0.0406, 0.0442], [0.3568, 0.2548, 0.1747],
         [0.0372, 0.2344, 0.1420], [0.0313, 0.0189, -0.0328], [0.0296, -0.0956, -0.0665],
         [-0.3477, -0.4059, -0.2925], [0.0166, 0.1902, 0.1975], [-0.0412, 0.0267, -0.1364],
         [-0.1293, 0.0740, 0.1636], [0.0680, 0.3019, 0.1128], [0.0032, 0.0581, 0.0639],
         [-0.1251, 0.0927, 0.1699], [0.0060, -0.0633, 0.0005], [0.3477, 0.2275, 0.2950],
         [0.1984, 0.0913, 0.1861]],
        np.float32,
    ),
    np.array([-0.1835, -0.0868, -0.3360], np.float32),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WanVaeConfig:
    """Sizes of the network.

    `multipliers` has one entry for each resolution, finest first: its channels are `width` times
    that. `halves_time` says for each step from one resolution to the next whether the encoder
    halves time too; all steps halve height and width.
    """

    in_channels: Size = 3
    out_channels: Size = 3
    latent_channels: Size = 16
    width: Size = 96
    multipliers: tuple[Size, ...] = (1, 2, 4, 4)
    layers_per_block: Layers = 2
    halves_time: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        steps = len(self.multipliers) - 1
        if len(self.halves_time) != steps:
            raise ValueError(
                f"Wan VAE: halves_time has {len(self.halves_time)} entries; {steps + 1} multipliers"
                f" need {max(steps, 0)}"
            )
        if odd := [channels for channels in self.channels[1:] if channels % 2]:
            raise ValueError(
                f"Wan VAE: width {self.width} times multipliers {self.multipliers} gives"
                f" {odd[0]} channels; upsampling halves them, so they must be even"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Return the channels of each resolution, finest first."""
        return tuple(self.width * factor for factor in self.multipliers)

    @property
    def space_compression(self) -> int:
        return 2 ** len(self.halves_time)

    @property
    def time_compression(self) -> int:
        return 2 ** sum(self.halves_time)
