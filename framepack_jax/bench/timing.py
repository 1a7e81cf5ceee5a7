"""Time functions of arrays, count the memory of programs, and make random arrays to compute with.

Rounds are timed after a warm-up and wait for their results, so compilation and asynchronous
dispatch are not part of a time.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROUNDS, MIN_SECONDS = 3, 0.25
# Seconds of rounds after which no other begins.
LONG = 10.0
BF16 = jnp.bfloat16


class Timing(NamedTuple):
    """Median seconds of a call, seconds of the first call, which compiles, and the result."""

    seconds: float
    first: float
    out: Any


def measured(function: Callable[..., Any], *args: Any) -> Timing:
    """Time a function; each round times as many calls in a row as take `MIN_SECONDS`."""
    began = time.monotonic()
    jax.block_until_ready(function(*args))
    first = time.monotonic() - began
    began = time.monotonic()
    out = jax.block_until_ready(function(*args))
    seconds = [time.monotonic() - began]
    if (calls := math.ceil(MIN_SECONDS / max(1e-6, seconds[0]))) > 1:
        # One short call says little.
        seconds = []
    while len(seconds) < ROUNDS and calls * sum(seconds) < LONG:
        began = time.monotonic()
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        seconds.append((time.monotonic() - began) / calls)
    return Timing(statistics.median(seconds), first, out)


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Return (median seconds of a call, its result); each round times many calls in a row."""
    timing = measured(function, *args)
    return timing.seconds, timing.out


def program_bytes(compiled: Any) -> int:
    """Return the device bytes of a compiled program: arguments, results, temporaries."""
    size = compiled.memory_analysis()
    parts = size.argument_size_in_bytes, size.output_size_in_bytes, size.temp_size_in_bytes
    return sum(parts) - size.alias_size_in_bytes


def peak_memory() -> int:
    """Return the peak bytes of the allocator of a local device, the largest of all; 0 if devices
    do not report them."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(each.get("peak_bytes_in_use", 0) for each in stats)


def normal(seed: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    """Return random numbers; zeros would compute faster than real data."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, dtype))()


def filled(tree: Any, scale: float = 0.02) -> Any:
    """Fill abstract arrays: one block of random numbers repeated, True, or 0."""
    block = normal(0, 2**20 + 3, dtype=jnp.float32) * scale

    def leaf(block: jax.Array, x: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.full(x.shape, x.dtype == bool, x.dtype)
        return jnp.resize(block.astype(x.dtype), x.shape)

    where = jax.tree.map(lambda x: getattr(x, "sharding", None), tree)
    make = jax.jit(
        lambda block: jax.tree.map(functools.partial(leaf, block), tree), out_shardings=where
    )
    return make(block)
