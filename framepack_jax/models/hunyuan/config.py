"""Sizes of HunyuanVideo's networks."""

import dataclasses

from framepack_jax.models.sizes import Layers, Positive, Size

STACKS = {"refiner": "refiner_layers", "double": "double_layers", "single": "single_layers"}
OFFLOADABLE = ("double", "single")
Stride = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network.

    `context_kernels` names the patch embeddings for context. A base HunyuanVideo model has none,
    and no image projection (`image_dim` None). If `causal`, no token reads a later frame of the
    target.
    """

    in_channels: Size = 16
    out_channels: Size = 16
    heads: Size = 24
    head_dim: Size = 128
    double_layers: Layers = 20
    single_layers: Layers = 40
    refiner_layers: Layers = 2
    mlp_ratio: Positive = 4.0
    text_dim: Size = 4096
    pooled_dim: Size = 768
    image_dim: Size | None = 1152
    guidance: bool = True
    rope_axes: tuple[Size, Size, Size] = (16, 56, 56)
    rope_theta: Positive = 256.0
    context_kernels: tuple[str, ...] = ("k1", "k2", "k4")
    causal: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the network; `channels` has one entry for each resolution, finest first."""

    in_channels: Size = 3
    out_channels: Size = 3
    latent_channels: Size = 16
    channels: tuple[Size, ...] = (128, 256, 512, 512)
    layers_per_block: Layers = 2
    norm_groups: Size = 32
    space_compression: Size = 8
    time_compression: Size = 4

    def __post_init__(self) -> None:
        limits = {
            "space_compression": 2 ** len(self.channels),
            "time_compression": 2 ** (len(self.channels) - 1),
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if value.bit_count() != 1 or value > limit:
                raise ValueError(
                    f"VAE {name} is {value}; {len(self.channels)} blocks (`channels`) can do"
                    f" powers of two up to {limit}"
                )

    @property
    def strides(self) -> tuple[Stride, ...]:
        """Return the (time, height, width) stride of each block of the encoder, and of the decoder
        in its own order: space in the first blocks, time in the last but one."""
        last = len(self.channels) - 1
        in_space = self.space_compression.bit_length() - 1
        in_time = self.time_compression.bit_length() - 1
        return tuple(
            (1 + (last - in_time <= i < last), *(1 + (i < in_space),) * 2) for i in range(last + 1)
        )
