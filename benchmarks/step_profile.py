"""Profile a program: a trace, and a table of the time by module and by kind of work.

    python -m benchmarks.step_profile [--program denoise] [--scale toy] [--trace FOLDER]

Runs one of the programs of `benchmarks.gpu`, at the released model's shapes with random weights,
under JAX's profiler, and adds up the time of its instructions by module and by kind of work. The
trace opens in Perfetto or XProf.

(Not `profile.py`: Python searches the folder of a script first, and torch imports the standard
module of that name.)
"""

import collections
import contextlib
import dataclasses
import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro
from jax.profiler import ProfileData

from benchmarks import bench, gpu, operations
from framepack_jax.bench.timing import BF16, normal
from framepack_jax.bench.training import training_program
from framepack_jax.models.hunyuan import transformer, vae
from framepack_jax.parallel import sharding

# Parts that take less of the time are one row together.
SMALL = 0.005
UNNAMED = operations.Operation("without a name", ())


class Program(NamedTuple):
    """A compiled program, and a function that runs it and waits for the result."""

    compiled: Any
    run: Callable[[], Any]


class Profile(NamedTuple):
    """Seconds of one run: wall clock without the profiler, and instructions by operation.

    Instructions that run side by side are all counted, so that their sum may be more than `wall`.
    """

    wall: float
    by_operation: dict[operations.Operation, float]


@dataclasses.dataclass(frozen=True)
class ProfileBenchmark:
    """Trace a program and print its time by module and kind of work."""

    program: Literal["denoise", "decode", "encode", "train"] = "denoise"
    """A denoising step; 17 frames through the VAE; a step of LoRA training."""
    scale: Literal["full", "toy"] = "full"
    """Shapes of the released model, or small ones for a try on a CPU."""
    runs: int = 3
    """Runs that are traced."""
    trace: Path | None = None
    """Folder to keep the trace in."""

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ValueError(f"--runs {self.runs}: expected at least 1")


def main(args: list[str] | None = None) -> Profile:
    """Parse flags, trace, print."""
    try:
        config = tyro.cli(ProfileBenchmark, prog="benchmarks.step_profile", args=args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    scale = {"full": bench.FULL, "toy": bench.TOY}[config.scale]
    with contextlib.ExitStack() as stack:
        program = PROGRAMS[config.program](scale, stack)
        folder = config.trace or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = measure(program, folder, config.runs)
    print(f"{config.program} on {jax.local_devices()[0].device_kind}, jax {jax.__version__}\n")
    print(table(found))
    return found


def denoise(scale: bench.Scale, _: contextlib.ExitStack) -> Program:
    """Build a forward pass of the transformer in bfloat16."""
    args = bench.denoiser_inputs(scale)
    return _program(functools.partial(transformer.velocity, scale.dit, dtype=BF16), *args)


def decode(scale: bench.Scale, _: contextlib.ExitStack) -> Program:
    """Build the VAE's decoder of 5 latent frames in bfloat16."""
    rows, columns = (side // 8 for side in scale.pixels)
    latents = normal(1, 1, 5, rows, columns, scale.vae.latent_channels)
    return _program(functools.partial(vae.decode, scale.vae), _vae(scale), latents)


def encode(scale: bench.Scale, _: contextlib.ExitStack) -> Program:
    """Build the VAE's encoder of 17 frames in bfloat16."""
    frames = normal(1, 1, 17, *scale.pixels, 3)
    return _program(functools.partial(vae.encode, scale.vae), _vae(scale), frames)


def train(scale: bench.Scale, stack: contextlib.ExitStack) -> Program:
    """Build a step of LoRA training."""
    devices = sharding.make_mesh(devices=jax.local_devices()[:1])
    stack.enter_context(jax.set_mesh(devices))
    training = gpu.lora_training(scale, 1, "attention")
    program = training_program(*training, devices, scale.pixels)
    return Program(program.compiled, program.run)


PROGRAMS = {"denoise": denoise, "decode": decode, "encode": encode, "train": train}


def _vae(scale: bench.Scale) -> Any:
    return jax.tree.map(jax.numpy.asarray, vae.init(scale.vae, jax.random.key(0)))


def _program(function: Callable[..., Any], *args: Any) -> Program:
    compiled = jax.jit(function).lower(*args).compile()
    return Program(compiled, lambda: jax.block_until_ready(compiled(*args)))


def measure(program: Program, folder: Path, runs: int) -> Profile:
    """Run a program some times without the profiler, and then with it, which writes to `folder`."""
    program.run()
    began = time.monotonic()
    for _ in range(runs):
        program.run()
    wall = (time.monotonic() - began) / runs
    with jax.profiler.trace(str(folder)):
        for _ in range(runs):
            program.run()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    known = operations.operations(program.compiled.as_text())
    seconds: collections.Counter[operations.Operation] = collections.Counter()
    for name, duration in instructions(ProfileData.from_file(str(newest))):
        if (operation := known.get(name, UNNAMED)) is not None:
            seconds[operation] += duration / runs
    return Profile(wall, dict(seconds))


def instructions(trace: ProfileData) -> Iterator[tuple[str, float]]:
    """Yield (name of an instruction, seconds) of everything that one device ran."""
    devices = [plane for plane in trace.planes if re.match(r"/device:(GPU|TPU):", plane.name)]
    if not devices:
        # A CPU's are among all else that the host does.
        for plane in trace.planes:
            for line in plane.lines if plane.name == "/host:CPU" else ():
                for event in line.events:
                    if name := dict(event.stats).get("hlo_op"):
                        yield name, event.duration_ns / 1e9
        return
    lines = list(devices[0].lines)
    # On GPUs every stream has its kernels.
    named = [line for line in lines if line.name == "XLA Ops"]
    for line in named or [line for line in lines if line.name.startswith("Stream")]:
        for event in line.events:
            name = dict(event.stats).get("hlo_op") or event.name
            yield re.sub(r"^%| =.*", "", str(name)), event.duration_ns / 1e9


def table(profile: Profile) -> str:
    """Markdown: milliseconds by kind of work, then by module and kind. (Some of what a compiler
    rewrites, as products on CPUs, loses its name.)"""
    total = sum(profile.by_operation.values())
    kinds: collections.Counter[str] = collections.Counter()
    parts: collections.Counter[tuple[str, str]] = collections.Counter()
    for operation, seconds in profile.by_operation.items():
        kinds[operation.kind] += seconds
        parts["/".join(operation.path) or "(not named)", operation.kind] += seconds
    small = [part for part, seconds in parts.items() if seconds < SMALL * total]
    rest = sum(parts.pop(part) for part in small)

    def row(*names: str, seconds: float) -> str:
        cells = *names, f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}"
        return f"| {' | '.join(cells)} |"

    lines = [
        f"{1e3 * profile.wall:.3f} ms a run; instructions {1e3 * total:.3f} ms in the trace\n",
        "| work | ms | share |",
        "|---|--:|--:|",
        *(row(kind, seconds=seconds) for kind, seconds in kinds.most_common()),
        "",
        "| module | work | ms | share |",
        "|---|---|--:|--:|",
        *(row(*part, seconds=seconds) for part, seconds in parts.most_common()),
    ]
    if small:
        lines.append(row(f"{len(small)} smaller", "", seconds=rest))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
