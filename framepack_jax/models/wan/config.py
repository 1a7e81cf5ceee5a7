"""Sizes of Wan's transformer, with or without packed history."""

import dataclasses
from typing import Literal

from framepack_jax.models.sizes import Layers, Positive, Size

STACKS = {"blocks": "layers"}
OFFLOADABLE = ("blocks",)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes and switches of the network.

    `context_kernels` names the patch embeddings for context: none for Wan, all three for Helios.
    With `clean_context` the blocks modulate context as at noise level 0, else as the target. With
    `prompt_to_target` only the target's tokens read the prompt. `context_key_scale` learns a factor
    from 1 to 10 for the keys of context, for all heads or each. If `causal`, no token reads a later
    frame of the target.
    """

    in_channels: Size = 16
    out_channels: Size = 16
    heads: Size = 40
    head_dim: Size = 128
    layers: Layers = 40
    mlp_dim: Size = 13824
    text_dim: Size = 4096
    time_dim: Size = 256
    norm_eps: Positive = 1e-6
    rope_axes: tuple[Size, Size, Size] = (44, 42, 42)
    rope_theta: Positive = 10000.0
    context_kernels: tuple[str, ...] = ()
    clean_context: bool = False
    prompt_to_target: bool = False
    context_key_scale: Literal["none", "all", "each"] = "none"
    causal: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim
