"""Packed video as tokens, alike for all families: patch embeddings, RoPE, and checks of both.

The transformer reads [coarse context .. fine context][target], each part under the patch embedding
of its kernel. A family's config has `width`, `in_channels`, `heads`, `context_kernels`,
`rope_axes`, `rope_theta` and `causal` (`PackedConfig`).
Source: FramePack (arXiv 2504.12626, section 3.2).

Shapes: B batch, T F latent frames, H W latent rows and columns, C channels, L tokens, D width.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax.sharding import AbstractMesh, Mesh

from framepack_jax.models import lora_layers
from framepack_jax.models.master_weights import cast_others
from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params
from framepack_jax.ops.causal_frames import TargetFrames
from framepack_jax.ops.rope import Table, rope_table
from framepack_jax.packing import (
    TAIL_POOL,
    PackedContext,
    Schedule,
    embedding_kernel,
    kernel_shape,
    tail_of,
)

PATCH = "k1"


class PackedConfig(Protocol):
    """Sizes that packed video needs of a transformer.

    `context_kernels` names the patch embeddings for context; a base model has none. If `causal`, no
    token reads a later frame of the target (`ops.causal_frames`).
    """

    @property
    def width(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def context_kernels(self) -> tuple[str, ...]: ...
    @property
    def rope_axes(self) -> tuple[int, int, int]: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def causal(self) -> bool: ...


class EmbedVideo(nn.Module):
    """Patchify context groups and target: (B, L, D), the target's tokens last."""

    cfg: PackedConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: PackedContext) -> jax.Array:
        cfg = self.cfg
        embedders = {k: ContextEmbed(cfg, name=f"context_{k}") for k in cfg.context_kernels}
        groups = [
            embedders[embedding_kernel(kernel)[0]](latents, kernel)
            for latents, kernel in zip(context.latents, context.kernels, strict=True)
        ]
        target = nn.Dense(cfg.width, name="patch")(_patches(x, PATCH))
        return jnp.concatenate([*groups, target], axis=1)


class ContextEmbed(nn.Module):
    """Patch embedding of context latents (B, F, H, W, C) by one kernel; ragged edges are padded."""

    cfg: PackedConfig

    @nn.compact
    def __call__(self, latents: jax.Array | np.ndarray, kernel: str) -> jax.Array:
        kernel, pool = embedding_kernel(kernel)
        if pool > 1:
            latents = reduce(
                _pad(latents, (pool, pool, pool)),
                "b (t pt) (h ph) (w pw) c -> b t h w c", "mean", pt=pool, ph=pool, pw=pool,
            )  # fmt: skip
        width, size = self.cfg.width, math.prod(kernel_shape(kernel)) * self.cfg.in_channels
        weights = self.param("kernel", nn.initializers.lecun_normal(), (size, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        return _patches(latents, kernel) @ weights + bias[None, None, :]


def rope_tables(cfg: PackedConfig, shape: tuple[int, ...], context: PackedContext) -> Table:
    """RoPE tables of all image tokens, of a target (B, T, H, W, C) of this shape and its context.

    The table of a context token is the mean over the positions that its kernel covers. Context and
    target may have different sizes; each counts rows and columns of its own.
    """
    tables = []

    def add(indices: jax.Array | np.ndarray, shape: tuple[int, ...], kernel: str) -> None:
        kt, kh, kw = kernel_shape(kernel)
        place = shape[2] // 2, shape[3] // 2, cfg.rope_axes, cfg.rope_theta
        pool = (kt, kh / 2, kw / 2)
        match tail_of(kernel):
            case "tc":
                tables.append(rope_table(indices[:, :1], *place, pool, counts=indices[:, 1:]))
            case "ta":
                tables.append(rope_table(indices, *place, (kt, kh, kw), cell=TAIL_POOL // 2))
            case _:
                tables.append(rope_table(indices, *place, pool))

    groups = list(zip(context.indices, context.latents, context.kernels, strict=True))
    for indices, latents, kernel in groups:
        # A tail may be pooled; the last group is none, and has all rows and columns.
        size = groups[-1][1].shape if tail_of(kernel) else latents.shape
        add(indices, size, kernel)
    add(context.target_indices, shape, PATCH)
    cos, sin = (jnp.concatenate(parts, axis=1) for parts in zip(*tables, strict=True))
    return cos, sin


def target_length(shape: tuple[int, ...]) -> int:
    """Return the number of tokens of a target (B, T, H, W, C)."""
    return shape[1] * (shape[2] // 2) * (shape[3] // 2)


def causal_frames(cfg: PackedConfig, shape: tuple[int, ...], length: int) -> TargetFrames | None:
    """Return the place of a target (B, T, H, W, C), the last of `length` tokens, if attention is
    causal in its frames; else None."""
    target = target_length(shape)
    frames = TargetFrames(length - target, shape[1], target // shape[1])
    return frames if cfg.causal else None


def attention_pairs(cfg: PackedConfig, length: int, target: int, frames: int) -> int:
    """Count the pairs of a query and a key that it reads, of `length` tokens, of which `target`
    belong to that many frames of the target."""
    if not cfg.causal:
        return length**2
    return length * (length - target) + target * (target + target // frames) // 2


def check_size(shape: tuple[int, ...]) -> None:
    """Raise ValueError if the patches do not divide a target (B, T, H, W, C)."""
    if shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"latents of {shape[2]} x {shape[3]} cells: both must be even")


def cast_embedders(params: Params, dtype: Any) -> Params:
    """Return the embeddings' parameters as the computation in `dtype` reads them."""
    # The embedding of context is no Dense layer, so its low-rank factors are merged.
    return {
        name: cast_params(lora_layers.merge_kernel(leaves), dtype)
        if name.startswith("context_")
        else cast_others(leaves, dtype)
        for name, leaves in params.items()
    }


def _patches(x: jax.Array | np.ndarray, kernel: str) -> jax.Array:
    """(B, T, H, W, C) -> (B, L, kt * kh * kw * C), padded to the kernel by replication."""
    kt, kh, kw = kernel_shape(kernel)
    return rearrange(
        _pad(x, (kt, kh, kw)),
        "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=kt, ph=kh, pw=kw,
    )  # fmt: skip


def _pad(x: jax.Array | np.ndarray, multiple: tuple[int, int, int]) -> jax.Array:
    ragged = [(0, -n % k) for n, k in zip(x.shape[1:4], multiple, strict=True)]
    return jnp.pad(x, [(0, 0), *ragged, (0, 0)], mode="edge")


def context_kernels(schedule: Schedule) -> tuple[str, ...]:
    """Return the kernels of a schedule that need patch embeddings of their own, smallest first."""
    kernels = {embedding_kernel(segment.kernel)[0] for segment in schedule.segments}
    return tuple(sorted(kernels, key=lambda kernel: math.prod(kernel_shape(kernel))))


def check_kernels(cfg: PackedConfig, kernels: Iterable[str]) -> None:
    """Raise ValueError if the network has no embedding for a context kernel."""
    for kernel in kernels:
        if embedding_kernel(kernel)[0] not in cfg.context_kernels:
            there = ", ".join(cfg.context_kernels) or "no kernel"
            raise ValueError(
                f"the schedule uses patch kernel {kernel}, but the network embeds context with"
                f" {there}; choose another schedule or convert a base model with --from-base"
            )


def check_mesh(cfg: PackedConfig, mesh: Mesh | AbstractMesh | Mapping[str, int]) -> None:
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
