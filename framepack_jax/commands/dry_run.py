"""Will it fit? The real sampling step, compiled for a machine that is not there.

The compiler of that machine says what memory the step needs on each chip, and which collectives it
makes. FLOPs are counted from the config and the floor is arithmetic on vendor figures: no time here
is measured, but that of compiling.
"""

import dataclasses
import functools
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from framepack_jax import bundle, packing, sharding, topology
from framepack_jax.conditioning import MAX_PROMPT_TOKENS
from framepack_jax.diffusion import flow, sampler, solver, solver_table
from framepack_jax.models.flops import forward_flops
from framepack_jax.packing import Timeline
from framepack_jax.pipeline import FramePack, Settings
from framepack_jax.request import Layout
from framepack_jax.topology import Machine

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a step needs on each chip of a machine; bytes, FLOPs of all chips together."""

    machine: Machine
    mesh: dict[str, int]
    parameters: int
    arguments: int
    temporaries: int
    outputs: int
    flops: int
    collectives: dict[str, tuple[int, int]]
    """Kind -> (how often in a step, bytes that each chip gets by it)."""
    compile_seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs

    @property
    def fits(self) -> bool:
        return self.total <= self.machine.chip.memory

    @property
    def floor_seconds(self) -> float:
        """A step at the vendor's peak, on all chips."""
        return self.flops / (self.machine.chip.flops * self.machine.count)

    @property
    def link_seconds(self) -> float:
        """Modelled: the bytes of all collectives over the links of one chip, none overlapped."""
        return sum(size for _, size in self.collectives.values()) / self.machine.chip.links

    def __str__(self) -> str:
        chip, gb = self.machine.chip, 1e9
        verdict = self._verdict()
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        lines = [
            f"{self.machine}: {self.machine.count} chips of {chip.memory / gb:.1f} GB"
            + (f", divided over {mesh}" if mesh else ""),
            f"parameters       {self.parameters:,}",
            f"memory a chip    {self.arguments / gb:.2f} GB arguments (weights and inputs),"
            f" {self.temporaries / gb:.2f} GB temporaries, {self.outputs / gb:.2f} GB results",
            f"in all           {self.total / gb:.2f} of {chip.memory / gb:.1f} GB: {verdict}",
            f"FLOPs a step     {self.flops:.3e}, counted from the config",
            f"floor            {self.floor_seconds:.3f} s a step at the vendor's"
            f" {chip.flops / 1e12:.0f} TFLOP/s a chip",
        ]
        for kind, (count, size) in self.collectives.items():
            lines.append(f"{kind:<16} {count} a step, {size / gb:.3f} GB a chip")
        if self.collectives:
            lines.append(
                f"links            {self.link_seconds:.3f} s a step, modelled: those bytes at"
                f" {chip.links / gb:.0f} GB/s, none behind computing"
            )
        lines.append(f"compiled in      {self.compile_seconds:.1f} s")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.fits:
            return "fits"
        over = (self.total - self.machine.chip.memory) / 1e9
        return (
            f"does not fit, {over:.1f} GB too much; more chips help (weights are divided over"
            " them), or a smaller --batch, --height and --width"
        )


def dry_run(
    pipe: FramePack,
    path: epath.PathLike,
    layout: Layout,
    settings: Settings,
    machine: Machine,
    mesh: dict[str, int] | None = None,
    batch: int = 1,
) -> Report:
    """Compile a denoising step of a layout for a machine.

    `path` is that of the pipe's bundle; `mesh` says how chips are divided, by default all over
    `fsdp`.

    Raises ValueError where the compiler is missing or the mesh does not divide.
    """
    model, cfg, _ = pipe.transformer
    manifest = bundle.read_manifest(path)
    configs = {role: bundle.role_config(manifest, role)[1] for role in bundle.ROLES}
    sizes = mesh or {"fsdp": machine.count}
    devices = sharding.make_mesh(**sizes, devices=topology.compile_devices(machine))
    params = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(pipe.dtype)), params)
    specs = sharding.resolve(model.SHARDINGS, params)
    shardings = sharding.shard(params, specs, devices)
    weights = jax.tree.map(_placed, params, shardings)
    whole = functools.partial(_placed, sharding=NamedSharding(devices, PartitionSpec()))
    inputs, at, state = jax.tree.map(whole, _inputs(pipe, configs, layout, settings, batch))
    kind = settings.step_cache and settings.step_cache.kind
    fixed = model, cfg, pipe.dtype, kind
    began = time.monotonic()
    with jax.set_mesh(devices):
        start = functools.partial(sampler.start_caches, *fixed)
        cached = jax.eval_shape(start, weights, inputs, state.x)
        compiled = sampler.step.lower(*fixed, weights, inputs, at, state, cached).compile()
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    rows, columns = state.x.shape[2:4]
    image = (configs["image_encoder"].image_size // configs["image_encoder"].patch_size) ** 2
    flops = forward_flops(cfg, pipe.schedule, rows, columns, MAX_PROMPT_TOKENS, image)
    return Report(
        machine=machine,
        mesh=sizes,
        parameters=sum(math.prod(p.shape) for p in jax.tree.leaves(params)),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=flops * batch * (1 + (settings.cfg != 1)),
        collectives=collectives(compiled.as_text()),
        compile_seconds=seconds,
    )


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _inputs(
    pipe: FramePack, configs: dict[str, Any], layout: Layout, settings: Settings, batch: int
) -> tuple[sampler.SectionInputs, sampler.At, solver.State]:
    """Shapes of all that a step takes besides the weights."""
    compression = pipe.vae.cfg.space_compression
    frame = (*(side // compression for side in layout.canvas), pipe.vae.cfg.latent_channels)
    section = layout.plan[-1]
    timeline = Timeline(layout.length, frame)
    timeline.known[:] = True
    context = packing.read_context(section, timeline)
    vision, text = configs["image_encoder"], configs["text_encoder"]
    shape = jax.ShapeDtypeStruct
    dtype, tokens = jnp.dtype(pipe.dtype), (vision.image_size // vision.patch_size) ** 2
    conditions = pipe.transformer.model.Conditions(
        shape((batch, MAX_PROMPT_TOKENS, text.width), dtype),
        shape((batch, MAX_PROMPT_TOKENS), jnp.bool_),
        shape((batch, configs["text_encoder_2"].width), dtype),
        shape((batch, tokens, vision.width), dtype),
        shape((batch,), jnp.float32),
    )
    context = jax.tree.map(lambda x: shape((batch, *x.shape[1:]), x.dtype), context)
    x = shape((batch, len(section.targets), *frame), jnp.float32)
    scalar = shape((), jnp.float32)
    cached = settings.step_cache is not None
    inputs = sampler.SectionInputs(
        context, conditions, conditions if settings.cfg != 1 else None,
        x, shape(x.shape[:2], jnp.bool_), scalar, scalar, scalar if cached else None,
    )  # fmt: skip
    row = shape(solver_table(settings.sampler, flow.sigmas(2, 1.0))[0].shape, jnp.float32)
    at = sampler.At(scalar, row, shape((), jnp.bool_) if cached else None)
    return inputs, at, jax.eval_shape(solver.start, x)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Collectives of a compiled program by kind: how often they run, and the bytes that a device
    gets by them. Those in the body of a loop count as often as the loop runs."""
    bodies = dict(_computations(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)
    times = Counter({entry[1]: 1} if entry else {})
    found: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    # Callers come after what they call, so that going backwards every count is final when used.
    for name in reversed(bodies):
        for line in bodies[name]:
            for callee, often in _calls(line, bodies):
                times[callee] += times[name] * often
            kind, size = _collective(line)
            # One that is spread over several steps is written down in each, under one channel.
            channel = re.search(r"channel_id=(\d+)", line)
            if not kind or not times[name] or (channel and channel[0] in seen):
                continue
            seen |= {channel[0]} if channel else set()
            count, total = found.get(kind, (0, 0))
            found[kind] = count + times[name], total + times[name] * size
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each computation of an HLO module."""
    name, lines = None, []
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, lines = match[1], []
        elif line.startswith("}") and name:
            yield name, lines
            name = None
        elif name:
            lines.append(line)


def _calls(line: str, bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation, how often) that an instruction runs."""
    for kind, callee in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
        yield callee, _trips(line, bodies) if kind in ("body", "condition") else 1
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        for callee in group.split(","):
            yield callee.strip().lstrip("%"), 1


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """How often a loop runs: as its line says, else up to the number its condition compares with,
    which is the largest there is in it."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    return max((int(n) for x in lines for n in re.findall(r"constant\((\d+)\)", x)), default=1)


def _collective(line: str) -> tuple[str | None, int]:
    """(kind, bytes of its result) of an instruction; (None, 0) of any other."""
    match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
    if not match:
        return None, 0
    arrays = [
        ITEM_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(","))
        for kind, dims in re.findall(r"(\w+)\[([\d,]+)\]", match[1])
    ]
    # The result of an asynchronous start holds the operands before the results, and some scalars.
    return match[2], sum(arrays[len(arrays) // 2 :] if "-start(" in line else arrays)
