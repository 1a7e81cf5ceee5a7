"""Compile the training step for every shape of batch before the first step."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from framepack_jax.parallel import multihost
from framepack_jax.training import metrics
from framepack_jax.training.task import Cost, Frozen, Task
from framepack_jax.training.train_step import LIMIT, RATE, jit_train_step
from framepack_jax.utils.progress import Bar

# Shapes of a batch.
Shapes = tuple[tuple[int, ...], ...]
Programs = dict[Shapes, tuple[Any, Cost | None]]
MAX_AT_ONCE = 4


def compile_steps(task: Task, frozen: Frozen, say: Callable[[str], None]) -> Programs:
    """Compile the step for every shape of batch, several at a time; returns
    {shapes of a batch: (compiled step, cost of a sample)}.

    Raises ValueError in all processes if they would not compile the same programs.
    """
    step, abstract_frozen = jit_train_step(task), jax.tree.map(_abstract, frozen)
    kinds, limit = task.batches(), LIMIT if task.cfg.skip_spikes.factor else None
    say(
        f"compiling    {len(kinds)} program{'s' * (len(kinds) > 1)} of the step, one for each"
        " bucket and window, before the first step"
    )
    with jax.set_mesh(task.mesh), task.precision():
        lowered = [step.lower(task.abstract, abstract_frozen, b, RATE, limit) for b, _ in kinds]
    by_shapes = {shapes_of(b): low for (b, _), low in zip(kinds, lowered, strict=True)}
    multihost.assert_same_facts(_program_facts, by_shapes)

    def compiled(program: Any) -> Any:
        with jax.set_mesh(task.mesh), task.precision():
            return program.compile()

    with ThreadPoolExecutor(min(len(kinds), MAX_AT_ONCE)) as pool:
        done = Bar(
            pool.map(compiled, lowered), total=len(kinds), desc="compiling", unit="program",
            disable=metrics.is_quiet() or len(kinds) == 1,
        )  # fmt: skip
        return {
            shapes_of(batch): (program, cost)
            for (batch, cost), program in zip(kinds, done, strict=True)
        }


def shapes_of(batch: Any) -> Shapes:
    """Return the shapes of a batch, the key of its compiled program."""
    return tuple(x.shape for x in jax.tree.leaves(batch))


def _program_facts(lowered: dict[Shapes, Any]) -> dict[str, str]:
    """Return a hash of each program."""
    texts = {shapes: program.as_text() for shapes, program in lowered.items()}
    return {
        f"program of a batch of {shapes}": hashlib.sha256(text.encode()).hexdigest()[:16]
        for shapes, text in texts.items()
    }


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
