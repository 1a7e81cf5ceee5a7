"""Sizes, inputs and rows of figures that the benchmarks of one GPU share.

Source of the sizes: the released model, at 608 x 640 pixels with window 9.
"""

import dataclasses
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax import packing
from framepack_jax.bench.timing import BF16, filled, normal, peak_memory, program_bytes, timed
from framepack_jax.conditioning import MAX_PROMPT_TOKENS
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig, VaeConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.flops import attention_flops, forward_flops
from framepack_jax.parallel.chips import chip_of

IMAGE_TOKENS = 729
SCHEDULE = packing.parse(packing.RELEASED_INVERTED)
# Of attention with its gradient, in forward passes: the backward kernel has two products for each
# of the forward one, and computes the scores again.
ATTENTION_COST = 3.5

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes to measure at.

    `convs` are (frames, height, width, input channels, output channels). `lengths` are (tokens,
    valid tokens) at which attention kernels are known to fail.
    """

    dit: TransformerConfig
    vae: VaeConfig
    pixels: tuple[int, int]
    square: int
    tokens: int
    lengths: tuple[tuple[int, int], ...]
    convs: tuple[tuple[int, int, int, int, int], ...]
    streamed_layers: int
    largest_batch: int
    remats: tuple[str, ...]


FULL = Scale(
    dit=TransformerConfig(),
    vae=VaeConfig(),
    pixels=(608, 640),
    square=8192,
    tokens=18752,
    lengths=((1101, 2), (1101, 1101), (1216, 1087), (1345, 1200), (2048, 2047)),
    convs=(
        (17, 608, 640, 128, 128), (17, 304, 320, 256, 256), (17, 608, 640, 256, 128),
        (9, 152, 160, 512, 512), (5, 76, 80, 512, 512), (17, 608, 640, 128, 3),
    ),
    streamed_layers=16,
    largest_batch=16,
    remats=("attention", "dots", "full"),
)  # fmt: skip
TOY = Scale(
    dit=TransformerConfig(
        heads=2, head_dim=32, double_layers=1, single_layers=2, refiner_layers=1,
        rope_axes=(8, 12, 12),
    ),
    vae=VaeConfig(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4),
    pixels=(64, 80),
    square=64,
    tokens=128,
    lengths=((77, 2),),
    convs=((5, 16, 16, 8, 8),),
    streamed_layers=2,
    largest_batch=1,
    remats=("attention",),
)  # fmt: skip


class Bench:
    """Collect rows of figures; print and save each at once."""

    def __init__(self, scale: Scale, rows: list[Row], keep: Callable[[], Any]) -> None:
        self.scale, self.rows, self.keep = scale, rows, keep
        self._peak = 0

    def add(self, name: str, *, seconds: float, flops: float = 0, moved: float = 0, **more) -> None:
        """Add a timed row.

        `flops` and `moved` bytes become rates. For a network, which gives its `work` by kind, the
        row also has the share of the chip's peak rate (MFU).
        """
        row: Row = {"name": name, "ms": 1e3 * seconds}
        if flops:
            row["tflop_s"] = flops / seconds / 1e12
            if "work" in more and (chip := chip_of(jax.local_devices()[0])):
                row["mfu"] = flops / seconds / chip.flops
        if moved:
            row["gb_s"] = moved / seconds / 1e9
        self._keep(row | more)

    def say(self, name: str, **figures: Any) -> None:
        """Add a row without a time."""
        self._keep({"name": name, **figures})

    def _keep(self, row: Row) -> None:
        # What the allocator has counted is of all rows before. (torch's rows have their own.)
        if (peak := peak_memory()) > self._peak:
            self._peak = peak
            row.setdefault("peak_bytes", peak)
        self.rows.append(row)
        self.keep()
        print(", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)

    def fail(self, name: str, error: Exception) -> None:
        """Add a row that gives the error instead of figures."""
        print(traceback.format_exc(limit=3), flush=True)
        self._peak = peak_memory()
        self.rows.append({"name": name, "error": f"{type(error).__name__}: {error}"[:400]})
        self.keep()

    def time(self, name: str, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Compile and time a function of arrays. A failure becomes a row."""
        try:
            began = time.monotonic()
            compiled = jax.jit(function).lower(*args).compile()
            more["compile_s"] = time.monotonic() - began
            more["program_bytes"] = program_bytes(compiled)
        except Exception as error:
            self.fail(name, error)
            return None
        return self.clock(name, compiled, *args, **more)

    def clock(self, name: str, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Time a function without compiling it. A failure becomes a row."""
        try:
            seconds, out = timed(function, *args)
        except Exception as error:
            self.fail(name, error)
            return None
        self.add(name, seconds=seconds, **more)
        return out


def relative_error(x: Any, reference: Any) -> float:
    """Return |x - reference| / |reference| in float32; NaN if either has a NaN."""
    x, reference = (np.asarray(jax.device_get(a), np.float32) for a in (x, reference))
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def denoiser_inputs(scale: Scale, batch: int = 1, weights: bool = True) -> tuple[Any, ...]:
    """Return (params, x, sigma, context, conditions) in bfloat16; params only with `weights`."""
    dit = scale.dit
    frame = (*(side // 8 for side in scale.pixels), dit.in_channels)
    section = packing.plan(SCHEDULE, 1)[0]
    timeline = packing.Timeline(packing.length([section]), frame)
    timeline.known[:] = True
    context = jax.tree.map(jnp.asarray, packing.read_context(section, timeline))
    context = context.replace(
        latents=tuple(normal(i, batch, *x.shape[1:]) for i, x in enumerate(context.latents))
    )
    params = None
    if weights:
        params = jax.eval_shape(lambda: transformer.init(dit, jax.random.key(0)))
        params = filled(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, BF16), params))
    valid = jnp.broadcast_to(jnp.arange(MAX_PROMPT_TOKENS) < 100, (batch, MAX_PROMPT_TOKENS))
    conditions = Conditions(
        normal(5, batch, MAX_PROMPT_TOKENS, dit.text_dim), valid,
        normal(6, batch, dit.pooled_dim), normal(7, batch, IMAGE_TOKENS, dit.image_dim),
        jnp.full(batch, 10.0),
    )  # fmt: skip
    x = normal(8, batch, len(section.targets), *frame, dtype=jnp.float32)
    return params, x, jnp.full(batch, 0.7), context, conditions


def step_flops(scale: Scale) -> int:
    """Return the FLOPs of a forward pass."""
    rows, columns = (side // 8 for side in scale.pixels)
    return forward_flops(scale.dit, SCHEDULE, rows, columns, MAX_PROMPT_TOKENS, IMAGE_TOKENS)


def step_work(scale: Scale) -> dict[str, int]:
    """Return the FLOPs of a forward pass by kind; attention and other products differ in rate."""
    rows, columns = (side // 8 for side in scale.pixels)
    attention = attention_flops(scale.dit, SCHEDULE, rows, columns, MAX_PROMPT_TOKENS, IMAGE_TOKENS)
    return {"attention": attention, "products": step_flops(scale) - attention}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
