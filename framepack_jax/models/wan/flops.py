"""FLOPs of Wan's transformer, counted from its config.

A compiler's own count takes the body of a loop once, however often it runs.
"""

import math

from framepack_jax import packing
from framepack_jax.models.packed_video import PATCH, attention_pairs
from framepack_jax.models.wan.config import WanConfig


def forward_flops(
    cfg: WanConfig,
    schedule: packing.Schedule,
    rows: int,
    columns: int,
    text: int,
    image: int,
) -> int:
    """FLOPs of all matrix products of one forward pass, for one sample.

    rows and columns are those of the latents; `text` are tokens of the prompt, with padding;
    `image` is 0. Counted from the config, without what an implementation adds.
    """
    width = cfg.width
    context = packing.context_tokens(schedule, rows, columns)
    target = packing.target_tokens(schedule, rows, columns)
    length = sum(tokens for _, tokens in context) + target
    reading = target if cfg.prompt_to_target else length

    def products(tokens: int, *shapes: tuple[int, int]) -> int:
        return 2 * tokens * sum(a * b for a, b in shapes)

    square = (width, width)
    block = products(length, (width, 3 * width), square, (width, cfg.mlp_dim), (cfg.mlp_dim, width))
    block += products(reading, square, square) + products(text, (width, 2 * width))
    pairs = attention_pairs(cfg, length, target, schedule.window)
    block += 4 * width * (pairs + reading * text)

    kernels = [(packing.embedding_kernel(segment.kernel)[0], n) for segment, n in context]
    embed = sum(
        products(tokens, (math.prod(packing.kernel_shape(kernel)) * cfg.in_channels, width))
        for kernel, tokens in [*kernels, (PATCH, target)]
    )
    embed += products(text, (cfg.text_dim, width), square)
    times = 1 + cfg.clean_context
    embed += products(times, (cfg.time_dim, width), square, (width, 6 * width))
    return embed + cfg.layers * block + products(target, (width, 4 * cfg.out_channels))
