"""Measure sampling, and the growth of its cost from section to section.

    python benchmarks/sampling.py [--sections 20] [--steps 8] [--json FILE]

Measures the whole command with its run folders: `sample.run` makes a video of each schedule in a
process of its own, with probes at the calls that write files. Sampling the same latents without
decoding, and decoding alone, give the times of the two parts. The pieces of a denoising step are
timed alone at the end. The transformer of the bundle `random` costs next to nothing, so everything
else shows.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro

from framepack_jax import bundle, packing, video
from framepack_jax.cli import sample
from framepack_jax.diffusion import sampler
from framepack_jax.generation.layout import Layout, fit_images, make_layout
from framepack_jax.generation.pipeline import FramePack, Inputs, Settings
from framepack_jax.generation.request import Request
from framepack_jax.jobs import sampling, spec
from framepack_jax.jobs.progress import Progress
from framepack_jax.jobs.run_dir import RunDir

ROOT = Path(__file__).parent.parent
COMPILED = "/jax/core/compile/backend_compile_duration"
PARTS = ("denoising", "decoding")
# Sections at the beginning and at the end of a run whose medians are compared.
ENDS = 5
# The first sections differ from all others in what they decode and join; so does the last.
SETTLED = 3
# Steps of a network that does nothing, and rounds of everything that is timed alone.
IDLE_STEPS, ROUNDS = 100, 5


@dataclasses.dataclass(frozen=True)
class SamplingBenchmark:
    """Measure the sampling of videos: time, compilations, host overhead, memory.

    Times are wall-clock seconds, but for `processor`. A quiet machine is assumed.
    """

    bundle: str = "random"
    """Folder made by convert_weights.py, or "random"."""
    schedule: tuple[str, ...] = (packing.RELEASED_INVERTED, packing.RELEASED_F1)
    """Packing schedules, one run each."""
    sections: int = 20
    """Sections of each run, at least 5: the first three and the last are not like the others."""
    steps: int = 8
    """Denoising steps a section."""
    height: int = 64
    """Height in pixels."""
    width: int = 80
    """Width in pixels."""
    image: Path = ROOT / "examples" / "astronaut.jpg"
    """First frame."""
    fresh: bool = True
    """Make each run in a process of its own. Without, peak memory is that of all runs so far, and
    is not compared with that of a short run."""
    json: Path | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        least = SETTLED + 2
        if self.sections < least:
            raise ValueError(f"sections = {self.sections}: expected at least {least}")


def main(args: list[str] | None = None) -> None:
    """Parse flags, measure, print."""
    try:
        config = tyro.cli(SamplingBenchmark, prog="benchmarks/sampling.py", args=args)
        results = run(config)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    if config.json is not None:
        config.json.write_text(json.dumps(results, indent=1))
    print(f"{config.bundle}, {config.height} x {config.width} pixels, {config.steps} steps")
    for result in results["runs"]:
        print(f"\n{table(result)}")


def run(config: SamplingBenchmark) -> dict[str, Any]:
    """Measure every schedule. Returns {"config": flags, "runs": [figures of `measure`]}."""
    one = _in_a_process if config.fresh else measure
    runs = [one(config, schedule) for schedule in config.schedule]
    flags = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    return {"config": flags, "runs": runs}


def _in_a_process(config: SamplingBenchmark, schedule: str) -> dict[str, Any]:
    """The figures of `measure`, and peak memory also of a run of two sections."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        same = ["bundle", "sections", "steps", "height", "width", "image"]
        flags = [f for name in same for f in (f"--{name}", str(getattr(config, name)))]
        command = [__file__, *flags, "--schedule", schedule, "--no-fresh", "--json", str(figures)]
        _run_python(command)
        result = json.loads(figures.read_text())["runs"][0]
        short = Path(folder) / "short"
        shorter = dataclasses.replace(config, sections=2)
        command = [f for name in same for f in (f"--{name}", str(getattr(shorter, name)))]
        command += ["--schedule", schedule, "--output", str(short)]
        _run_python([str(ROOT / "sample.py"), *command])
        result["memory"] |= _memory(short)
    return result


def _run_python(command: Sequence[str]) -> None:
    # A run of its own compiles for itself, as the one it is compared with.
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=env
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def measure(config: SamplingBenchmark, schedule: str) -> dict[str, Any]:
    """Return all figures of one schedule, ready for JSON.

    Compiled programs are forgotten first. `seconds` has a list a part, from section 2 on; `memory`
    has bytes by the number of sections, `device_bytes` those of all arrays after each section.
    """
    jax.clear_caches()
    with tempfile.TemporaryDirectory() as folder:
        long, again, alone = (Path(folder) / name for name in ("long", "again", "alone"))
        sections = config.sections
        first = _watch(sample.run, _flags(config, schedule, sections, long))
        programs = sampler.step._cache_size()
        second = _watch(sample.run, _flags(config, schedule, SETTLED, again))
        denoised = _watch(sample.run, _flags(config, schedule, sections, alone, latents_only=True))
        decoded = _watch(sampling.decode, alone, spec.ComputeOptions())
        record = RunDir.open(long).record
        memory = _memory(long)
    seconds = _seconds(first, denoised, decoded)
    in_run = 1e3 * statistics.median(seconds["denoising"]) / config.steps
    return {
        "schedule": schedule,
        "order": record["order"],
        "seconds": seconds,
        "growth": {name: _growth(values) for name, values in seconds.items()},
        "settled": {name: _settled(seconds[name]) for name in ("all", *PARTS)},
        "compilations": {"step": programs, **_compilations(first)},
        "first_frames": {
            "section": first.first_frames[0],
            "with_compilation": first.first_frames[1],
            "without": second.first_frames[1],
            "loading": record["timings"]["load_seconds"],
        },
        "memory": memory,
        "device_bytes": first.device_bytes,
        "step": {"in_run_ms": in_run, **_step(config, schedule)},
    }


def _flags(
    config: SamplingBenchmark,
    schedule: str,
    sections: int,
    output: Path,
    latents_only: bool = False,
) -> sample.Sample:
    return sample.Sample(
        output=output,
        job=spec.JobOptions(latents_only=latents_only),
        input=spec.Inputs(image=config.image),
        size=spec.VideoSize(sections=sections, height=config.height, width=config.width),
        denoising=spec.Denoising(steps=config.steps),
        model=spec.ModelOptions(bundle=config.bundle, schedule=schedule),
    )


def _memory(folder: Path) -> dict[str, dict[str, int]]:
    """Peak memory of the process that made a run, and what it has saved of latents, in bytes."""
    record = RunDir.open(folder).record
    saved = sum(file.stat().st_size for file in (folder / "latents").iterdir())
    peak = record["timings"]["peak_memory_bytes"]
    return {str(record["sections"]): {"peak": peak, "saved_latents": saved}}


@dataclasses.dataclass
class Log:
    """Record of a run: (begin, end) of its calls by name, in seconds since it began; the
    section and time at which the first frames were there; the section and name of all programs
    that were compiled; when the latents of each section are saved, bytes of all arrays on devices
    and the processor time of all threads. Sections count from 1."""

    calls: dict[str, list[tuple[float, float]]]
    first_frames: tuple[int, float] | None = None
    compiled: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    device_bytes: list[int] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)


# The calls that write files, and the one after each step: bars and live preview.
PROBED = {"save_section": RunDir, "add_span": RunDir, "join": RunDir, "step": Progress}


def _watch(command: Callable[..., object], *args: object) -> Log:
    """Run a command with probes at its calls; its output is dropped."""
    log = Log({name: [] for name in PROBED})
    began = time.perf_counter()

    def probed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def probe(*args: Any) -> None:
            start = time.perf_counter() - began
            method(*args)
            log.calls[name].append((start, time.perf_counter() - began))
            if name == "save_section":
                log.processor.append(time.process_time())
                log.device_bytes.append(sum(array.nbytes for array in jax.live_arrays()))
            elif name == "add_span" and log.first_frames is None and len(args[-1]):
                log.first_frames = len(log.calls[name]), log.calls[name][-1][1]

        return probe

    def compiled(event: str, _: float, **about: Any) -> None:
        if event == COMPILED:
            log.compiled.append((len(log.calls["add_span"]) + 1, about["fun_name"]))

    with contextlib.ExitStack() as stack:
        for name, place in PROBED.items():
            stack.enter_context(mock.patch.object(place, name, probed(name, getattr(place, name))))
        jax.monitoring.register_event_duration_secs_listener(compiled)
        stack.callback(jax.monitoring.unregister_event_duration_listener, compiled)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        command(*args)
    return log


def _seconds(log: Log, denoised: Log, decoded: Log) -> dict[str, list[float]]:
    """Seconds of sections 2, 3, ... of a run, of one that only denoises the same, and of one that
    only decodes the same. `files`, `joining` among them, and `preview` are in the run itself, where
    the device has other work meanwhile. `processor` is that of all threads, which other work on the
    machine changes little."""

    def between(ends: Sequence[tuple[float, float]]) -> list[float]:
        return [later - earlier for (_, earlier), (_, later) in itertools.pairwise(ends)]

    calls = log.calls
    spans = calls["add_span"]
    seconds = {
        "all": between(spans),
        "denoising": between(denoised.calls["save_section"]),
        "decoding": between(decoded.calls["add_span"]),
    }
    kinds = {"files": ("save_section", "add_span"), "joining": ("join",), "preview": ("step",)}
    for name, of in kinds.items():
        seconds[name] = [
            sum(b - a for call in of for a, b in calls[call] if begin <= a and b <= end)
            for (_, begin), (_, end) in itertools.pairwise(spans)
        ]
    processor = [end - begin for begin, end in itertools.pairwise(log.processor)]
    return seconds | {"processor": processor}


def _settled(values: Sequence[float]) -> float:
    """The sum of sections in which nothing is compiled; the values begin with section 2."""
    return sum(values[SETTLED - 1 : -1])


def _growth(values: Sequence[float]) -> float:
    """Return the median of the last sections divided by that of the first."""
    return statistics.median(values[-ENDS:]) / statistics.median(values[:ENDS])


def _compilations(log: Log) -> dict[str, Any]:
    """Number of programs compiled, and the names of those in settled sections and in the last."""
    last = len(log.calls["add_span"])
    return {
        "all": len(log.compiled),
        "settled": [name for section, name in log.compiled if SETTLED < section < last],
        "last": [name for section, name in log.compiled if section == last],
    }


class Idle:
    """A network that computes nothing, so that a step is the work of the host alone."""

    patch = "k1"

    @staticmethod
    def velocity(cfg: Any, params: Any, x: jax.Array, *_: Any) -> jax.Array:
        """Return zeros like x."""
        return jnp.zeros_like(x)


def _step(config: SamplingBenchmark, schedule: str) -> dict[str, Any]:
    """Milliseconds of a denoising step and of its host overhead, and the step's floor.

    `host`: from step to step of the sampler's loop with a network that does nothing. It is handed
    parameters and conditions as ever, but jit does not pass on what it does not read. `in_loop`:
    the same with the real network. `alone`: the compiled step on the arguments of that loop, one
    execution after the other and nothing between.
    """
    parsed = packing.parse(schedule)
    pipe = FramePack.load(bundle.BUILTIN_BUNDLES.get(config.bundle, config.bundle), schedule=parsed)
    layout, inputs = _inputs(pipe, config)
    idle = dataclasses.replace(pipe, transformer=pipe.transformer._replace(spec=Idle))
    host = _loop(idle, layout, inputs, IDLE_STEPS)
    in_loop = _loop(pipe, layout, inputs, max(4, config.steps))
    alone = _alone(pipe, layout, inputs, config.steps)
    rows, columns = (side // pipe.vae.cfg.space_compression for side in layout.canvas)
    conditions = inputs.conditions[0]
    count = pipe.transformer.spec.forward_flops(
        pipe.transformer.cfg, parsed, rows, columns,
        conditions.text.shape[1], conditions.image.shape[1],
    )  # fmt: skip
    rate = matmul_rate(pipe.dtype)
    return {
        "host_ms": 1e3 * host,
        "in_loop_ms": 1e3 * in_loop,
        "alone_ms": 1e3 * alone,
        "flops": count,
        "matmul_flops_a_second": rate,
        "floor_ms": 1e3 * count / rate,
        "times_floor": alone * rate / count,
    }


def _inputs(pipe: FramePack, config: SamplingBenchmark) -> tuple[Layout, Inputs]:
    """Return the inputs of the first section of a run."""
    request = Request("", video.load_image(config.image))
    layout = make_layout(
        pipe.geometry, request, sections=1, height=config.height, width=config.width
    )  # fmt: skip
    request = fit_images(pipe.geometry, request, layout)
    return layout, pipe.encode([request], layout, Settings())


def _loop(pipe: FramePack, layout: Layout, inputs: Inputs, steps: int) -> float:
    """Return the median seconds from step to step while a section is sampled."""

    def times() -> Iterator[float]:
        ends: list[float] = []

        def on_step(*_: Any) -> None:
            ends.append(time.perf_counter())

        next(pipe.sample(layout.plan, inputs, Settings(steps), on_step=on_step))
        # The last two come together: `on_step` is one step late.
        return (later - earlier for earlier, later in itertools.pairwise(ends[:-1]))

    list(times())
    return statistics.median(t for _ in range(ROUNDS) for t in times())


def _alone(pipe: FramePack, layout: Layout, inputs: Inputs, steps: int) -> float:
    """Median seconds a step over some rounds of a section's executions."""
    step, seen = sampler.step, []

    def spy(*args: Any) -> Any:
        seen.append(args)
        return step(*args)

    with mock.patch.object(sampler, "step", spy):
        next(pipe.sample(layout.plan, inputs, Settings(steps)))

    def seconds() -> float:
        *_, state, cached = seen[0]
        began = time.perf_counter()
        for *same, _, _ in seen:
            state, cached, *_ = step(*same, state, cached)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / len(seen)

    return statistics.median(seconds() for _ in range(ROUNDS))


def matmul_rate(dtype: str) -> float:
    """Return the FLOP/s of the fastest of several large matrix products on the default device."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), dtype)
    precision = "float32" if dtype == "float32" else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))

    def seconds() -> float:
        began = time.perf_counter()
        product(a, a).block_until_ready()
        return time.perf_counter() - began

    seconds()
    return 2 * side**3 / min(seconds() for _ in range(4 * ROUNDS))


def table(result: dict[str, Any]) -> str:
    """Format the figures of `measure` with units."""
    seconds, last = result["seconds"], len(result["seconds"]["all"]) + 1
    lines = [
        f"{result['schedule']} ({result['order']}), {last} sections",
        f"  {f'seconds a section, 2..{last}':<34}median   least    most   last / first {ENDS}",
    ]
    labels = {
        "denoising": "latents without frames",
        "decoding": "their frames, afterwards",
        "files": "of all: files",
        "joining": "  of files: joining video.mp4",
        "preview": "of all: bars, preview",
        "processor": "processor time, all threads",
    }
    for name, values in seconds.items():
        times = (statistics.median(values), min(values), max(values))
        numbers = "".join(f"{value:8.3f}" for value in times)
        lines.append(f"    {labels.get(name, name):<30}{numbers}{result['growth'][name]:10.2f}")
    settled = result["settled"]
    parts = sum(settled[name] for name in PARTS)
    lines.append(
        f"  sections in which nothing is compiled: {settled['all']:.2f} s; latents without frames"
        f" {settled['denoising']:.2f} s and their frames afterwards {settled['decoding']:.2f} s,"
        f" together {parts / settled['all']:.2f} of it"
    )
    return "\n".join([*lines, *_counts(result), *_step_lines(result["step"])])


def _counts(result: dict[str, Any]) -> Iterator[str]:
    programs, first = result["compilations"], result["first_frames"]
    settled, last = (" ".join(sorted(set(programs[name]))) for name in ("settled", "last"))
    yield (
        f"  compilations: {programs['step']} of the denoising step, {programs['all']} in all\n"
        f"    after section {SETTLED}, but for the last: {len(programs['settled'])}"
        f"{settled and ' '}{settled}\n"
        f"    in the last: {len(programs['last'])} {last}"
    )
    yield (
        f"  first frames with section {first['section']}: after {first['with_compilation']:.2f} s"
        f" ({first['loading']:.2f} s of it loading); compiled, {first['without']:.2f} s"
    )
    for sections, memory in sorted(result["memory"].items(), key=lambda item: int(item[0])):
        yield (
            f"  peak memory of {sections} sections: {memory['peak'] / 2**20:.0f} MiB; latents"
            f" saved: {memory['saved_latents'] / 2**20:.2f} MiB"
        )
    sizes = result["device_bytes"][SETTLED - 1 : -1]
    yield (
        f"  arrays on devices: {sizes[0] / 2**20:.3f} MiB after section {SETTLED},"
        f" {max(sizes) / 2**20:.3f} MiB at most until the last"
    )


def _step_lines(step: dict[str, float]) -> Iterator[str]:
    yield f"  host overhead a step: {step['host_ms']:.2f} ms (with a network that does nothing)"
    yield (
        f"  a step: {step['alone_ms']:.2f} ms alone, {step['in_loop_ms']:.2f} ms in the loop,"
        f" {step['in_run_ms']:.2f} ms in the run, with bars, preview and context"
    )
    yield (
        f"  its floor: {step['flops'] / 1e9:.3f} GFLOP at"
        f" {step['matmul_flops_a_second'] / 1e9:.0f} GFLOP/s are {step['floor_ms']:.2f} ms;"
        f" alone, it takes {step['times_floor']:.1f} times that"
    )


if __name__ == "__main__":
    main()
