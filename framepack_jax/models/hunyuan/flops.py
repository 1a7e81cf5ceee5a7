"""FLOPs of the packed transformer, counted from its config.

A compiler's own count takes the body of a loop once, however often it runs.
"""

import math

from framepack_jax import packing
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.packed_video import PATCH, attention_pairs


def forward_flops(
    cfg: TransformerConfig,
    schedule: packing.Schedule,
    rows: int,
    columns: int,
    text: int,
    image: int,
) -> int:
    """FLOPs of all matrix products of one forward pass, for one sample.

    rows and columns are those of the latents; `text` and `image` are tokens, masked ones included.
    Counted from the config, without what an implementation adds (padding of attention's queries).
    """
    width = cfg.width
    context = packing.context_tokens(schedule, rows, columns)
    target = packing.target_tokens(schedule, rows, columns)
    length = _packed_tokens(schedule, rows, columns) + image + text

    def products(tokens: int, *shapes: tuple[int, int]) -> int:
        return 2 * tokens * sum(a * b for a, b in shapes)

    mlp = int(cfg.mlp_ratio * width)
    wide = (width, 3 * width), (width, width), (width, mlp), (mlp, width)
    refiner_shapes = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
    refiner = products(text, *refiner_shapes) + products(1, (width, 2 * width))
    double = products(length, *wide) + 2 * products(1, (width, 6 * width))
    single = products(length, *wide) + products(1, (width, 3 * width))

    kernels = [(packing.embedding_kernel(segment.kernel)[0], n) for segment, n in context]
    embed = sum(
        products(tokens, (math.prod(packing.kernel_shape(kernel)) * cfg.in_channels, width))
        for kernel, tokens in [*kernels, (PATCH, target)]
    )
    vectors = [256] * (2 + cfg.guidance) + [cfg.pooled_dim, cfg.text_dim]
    embed += sum(products(1, (size, width), (width, width)) for size in vectors)
    embed += products(text, (cfg.text_dim, width))
    if cfg.image_dim is not None:
        embed += products(image, (cfg.image_dim, 3 * width), (3 * width, width))
    head = products(1, (width, 2 * width)) + products(target, (width, 4 * cfg.out_channels))
    layers = (cfg.refiner_layers, refiner), (cfg.double_layers, double), (cfg.single_layers, single)
    attention = attention_flops(cfg, schedule, rows, columns, text, image)
    return embed + sum(count * layer for count, layer in layers) + attention + head


def attention_flops(
    cfg: TransformerConfig,
    schedule: packing.Schedule,
    rows: int,
    columns: int,
    text: int,
    image: int,
) -> int:
    """Return the part of `forward_flops` in attention."""
    length = _packed_tokens(schedule, rows, columns) + image + text
    target = packing.target_tokens(schedule, rows, columns)
    pairs = attention_pairs(cfg, length, target, schedule.window)
    layers = cfg.double_layers + cfg.single_layers
    return 4 * cfg.width * (layers * pairs + cfg.refiner_layers * text**2)


def _packed_tokens(schedule: packing.Schedule, rows: int, columns: int) -> int:
    """Return the number of tokens of context and target."""
    context = packing.context_tokens(schedule, rows, columns)
    return sum(tokens for _, tokens in context) + packing.target_tokens(schedule, rows, columns)
