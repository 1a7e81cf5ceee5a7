"""One training step, the same for every task."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from framepack_jax.training.state import Params, TrainState, apply_gradients, ema_decay, shardings
from framepack_jax.training.task import Batch, Frozen, StepMetrics, Task

# The learning rate, and the limit of the gradient's norm, as the compiled step takes them.
RATE = LIMIT = jax.ShapeDtypeStruct((), np.float32)


def train_step(
    task: Task,
    state: TrainState[jax.Array],
    frozen: Frozen,
    batch: Batch,
    rate: jax.Array,
    limit: jax.Array | None = None,
) -> tuple[TrainState[jax.Array], StepMetrics]:
    """Update the trained parameters once, with the learning rate `rate`, unless the norm of the
    gradient exceeds `limit`. `task` is static."""
    key = task.key(state.step)

    def loss(trained: Params, part: Batch) -> tuple[jax.Array, Any]:
        losses, figures = task.loss(task.merge(trained, frozen), part, key)
        return jnp.mean(losses), (losses, figures)

    def gradient(part: Batch) -> tuple[Params, Any]:
        (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(state.params, part)
        return grads, seen

    grads, (losses, figures) = accumulate(gradient, batch, task.grad_accum_steps)
    mean = jnp.mean(losses)
    decay = ema_decay(task.cfg, state.updates)
    new, norm = apply_gradients(state, grads, mean, task.tx, decay, rate, limit)
    skipped = new.skipped != state.skipped
    return new, StepMetrics(mean, norm, skipped, new.skipped_in_a_row, figures)


def accumulate(
    gradient: Callable[[Batch], tuple[Params, Any]], batch: Batch, parts: int
) -> tuple[Params, Any]:
    """Return the mean gradient of equal parts of a batch, taken one after another, and what was
    seen of each sample, (B,)."""
    if parts == 1:
        return gradient(batch)
    # Each part takes samples of every device.
    divided = jax.tree.map(lambda x: rearrange(x, "(b n) ... -> n b ...", n=parts), batch)

    def add(total: Params, part: Batch) -> tuple[Params, Any]:
        grads, seen = gradient(part)
        return jax.tree.map(jnp.add, total, grads), seen

    first = jax.tree.map(lambda x: x[0], divided)
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), jax.eval_shape(gradient, first)[0])
    total, seen = jax.lax.scan(add, zeros, divided)
    grads = jax.tree.map(lambda g: g / parts, total)
    return grads, jax.tree.map(lambda x: rearrange(x, "n b -> (b n)"), seen)


def jit_train_step(task: Task) -> Any:
    """Return the jitted step of (state, frozen, batch, learning rate, limit of the gradient's norm
    or None); it donates the state."""
    replicated = NamedSharding(task.mesh, PartitionSpec())
    return jax.jit(
        functools.partial(train_step, task),
        donate_argnums=0,
        out_shardings=(shardings(task.abstract), replicated),
    )
