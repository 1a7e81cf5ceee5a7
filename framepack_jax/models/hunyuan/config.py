"""Sizes of HunyuanVideo's networks, and checks against them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from jax.sharding import AbstractMesh, Mesh

from framepack_jax.models.sizes import Layers, Positive, Size
from framepack_jax.packing import Schedule, kernel_shape

STACKS = {"refiner": "refiner_layers", "double": "double_layers", "single": "single_layers"}
OFFLOADABLE = ("double", "single")
Stride = tuple[int, int, int]

PATCH = "k1"
# k16 has no weights of its own: its latents are pooled to half size and embedded by k8.
POOLED_KERNELS = {"k16": "k8"}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network.

    `context_kernels` names the patch embeddings for context. A base HunyuanVideo model has none,
    and no image projection (`image_dim` None).
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


def embedding_kernel(kernel: str) -> str:
    """Return the kernel whose patch embedding serves a context kernel."""
    return POOLED_KERNELS.get(kernel, kernel)


def context_kernels(schedule: Schedule) -> tuple[str, ...]:
    """Return the kernels of a schedule that need patch embeddings of their own, smallest first."""
    kernels = {embedding_kernel(segment.kernel) for segment in schedule.segments}
    return tuple(sorted(kernels, key=lambda kernel: math.prod(kernel_shape(kernel))))


def check_kernels(cfg: TransformerConfig, kernels: Iterable[str]) -> None:
    """Raise ValueError if the network has no embedding for a context kernel."""
    for kernel in kernels:
        if embedding_kernel(kernel) not in cfg.context_kernels:
            there = ", ".join(cfg.context_kernels) or "no kernel"
            raise ValueError(
                f"the schedule uses patch kernel {kernel}, but the network embeds context with"
                f" {there}; choose another schedule or convert a base model with --from-base"
            )


def check_mesh(cfg: TransformerConfig, mesh: Mesh | AbstractMesh | Mapping[str, int]) -> None:
    """Raise ValueError if a mesh, or sizes of its axes, does not divide the attention heads.

    `tensor` must divide the heads, and `context` the heads of one `tensor` shard.
    """
    sizes = mesh if isinstance(mesh, Mapping) else mesh.shape
    wanted = {name: sizes.get(name, 1) for name in ("tensor", "context")}
    heads = cfg.heads
    for name, size in wanted.items():
        if heads % size:
            fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"a mesh with tensor={wanted['tensor']} and context={wanted['context']} does not"
                f" divide the {cfg.heads} attention heads; {name} must be one of {fits}: put the"
                " other devices on fsdp or data"
            )
        heads //= size
