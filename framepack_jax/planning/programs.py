"""Compile a program for a machine, and read its memory per chip from the compiler."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from framepack_jax.parallel import device_grid, sharding, xla_flags
from framepack_jax.planning import hlo
from framepack_jax.planning.hlo import Traffic
from framepack_jax.utils.messages import first_line

GB = 1e9
# By default, a TPU's compiler refuses a program that exceeds the memory of a chip, without saying
# what takes it.
OVERSIZED = {"xla_tpu_no_crash_on_oom": "true"}


@dataclasses.dataclass(frozen=True)
class Program:
    """Memory of a compiled program on each chip, in bytes.

    `weights` is the part of its arguments that are weights, `held` the memory of other arrays that
    stay on the chip, and `advice` states how to reduce the memory.
    """

    name: str
    advice: str
    weights: int
    arguments: int
    temporaries: int
    outputs: int
    collectives: dict[str, Traffic]
    kernels: dict[str, int]
    """Number of runs of hand-written kernels, by name."""
    compile_seconds: float
    held: int = 0
    runs: int = 1
    """Number of runs in a denoising step."""
    reduced: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes that all-reduce and reduce-scatter move, by type of element."""
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Flags of the compiler, beside those of the environment."""

    def total(self, resident: int) -> int:
        """Bytes including the weights of all networks, `resident`."""
        own = self.arguments + self.temporaries + self.outputs + self.held
        return own + max(0, resident - self.weights)

    def __str__(self) -> str:
        held = f", {self.held / GB:.2f} GB held" if self.held else ""
        return (
            f"{self.name:<16} {self.arguments / GB:.2f} GB arguments (weights and inputs),"
            f" {self.temporaries / GB:.2f} GB temporaries, {self.outputs / GB:.2f} GB results"
            f"{held}; compiled in {self.compile_seconds:.1f} s"
        )


class RefusedError(ValueError):
    """The compiler does not compile a program."""


def compile_program(
    name: str,
    advice: str,
    weights: Any,
    lower: Callable[[], jax.stages.Lowered],
    devices: Mesh,
    training: bool = False,
) -> Program:
    """Trace and compile a program that takes these weights, with the flags that commands set.

    A program that needs more memory than a chip has is compiled too, unless the compiler refuses
    it. Raises RefusedError.
    """
    began = time.monotonic()
    # The flags concern exchanges between devices.
    options: dict[str, Any] = {}
    device = devices.devices.flat[0]
    if devices.size > 1:
        options |= xla_flags.compiler_options(device, training)
    oversized = OVERSIZED if device.platform == "tpu" else {}
    try:
        with jax.set_mesh(devices):
            compiled = lower().compile(compiler_options=options | oversized)
    except jax.errors.JaxRuntimeError as error:
        raise RefusedError(
            f"the compiler for {device.device_kind} refuses {name} ({first_line(error)}), most"
            f" likely for want of memory; {advice}"
        ) from error
    seconds = time.monotonic() - began
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    if memory is None:
        raise ValueError(f"the compiler for {device} reports no memory of {name}")
    nodes = device_grid.domain_numbers(list(devices.devices.flat))
    found = list(hlo.find_collectives(text, nodes))
    return Program(
        name=name,
        advice=advice,
        weights=sharding.placed_bytes(weights),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=hlo.total_by(found, lambda each: each.kind),
        kernels=hlo.kernels(text),
        compile_seconds=seconds,
        reduced=hlo.reductions(found),
        flags=options,
    )
