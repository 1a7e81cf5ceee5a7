"""Will it fit? The real programs of sampling, compiled for a machine that is not there.

The compiler of that machine says what memory a program needs on each chip, and which collectives
it makes. Weights that it does not take lie beside it: the sampler keeps all networks on the
devices. FLOPs are counted from the config and the floor is arithmetic on vendor figures: no time
here is measured, but that of compiling.
"""

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle, packing
from framepack_jax.conditioning import MAX_PROMPT_TOKENS
from framepack_jax.diffusion import flow, sampler, solver, solver_table
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.generation.request import Layout
from framepack_jax.models.hunyuan.vae import Tiling
from framepack_jax.models.spec import NetworkSpec
from framepack_jax.packing import Timeline
from framepack_jax.parallel import hardware, sharding
from framepack_jax.parallel.hardware import Machine
from framepack_jax.planning.hlo import Traffic, collectives, kernels

GB = 1e9
# The share of a GPU that JAX takes, unless told otherwise by an environment variable, and what
# leaves enough to the driver.
GPU_SHARE, LARGE_GPU_SHARE = 0.75, 0.95


STEP_RELIEF = (
    "--offload full or more chips help (weights and tokens are divided over them), or a smaller"
    " --batch, --height and --width"
)


class Weights(NamedTuple):
    """A network: its number of parameters, and the bytes of them that a chip holds."""

    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program needs on each chip, in bytes.

    `weights` are those among its arguments, `held` is what lies beside it besides weights, and
    `relief` says what makes it smaller.
    """

    name: str
    relief: str
    weights: int
    arguments: int
    temporaries: int
    outputs: int
    collectives: dict[str, Traffic]
    kernels: dict[str, int]
    """How often hand-written kernels run, by name."""
    compile_seconds: float
    held: int = 0
    runs: int = 1
    """How often a denoising step runs it."""

    def total(self, resident: int) -> int:
        """With all networks, `resident` bytes."""
        own = self.arguments + self.temporaries + self.outputs + self.held
        return own + max(0, resident - self.weights)

    def __str__(self) -> str:
        held = f", {self.held / GB:.2f} GB held" if self.held else ""
        return (
            f"{self.name:<16} {self.arguments / GB:.2f} GB arguments (weights and inputs),"
            f" {self.temporaries / GB:.2f} GB temporaries, {self.outputs / GB:.2f} GB results"
            f"{held}; compiled in {self.compile_seconds:.1f} s"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run needs on each chip of a machine; bytes, FLOPs of all chips together.

    `programs` begin with the denoising step, or with those that it consists of. A section has
    `steps` of them and gives `frames`. `hosted` are the bytes of weights in host memory that a chip
    gets in every step.
    """

    machine: Machine
    mesh: dict[str, int]
    networks: dict[str, Weights]
    programs: tuple[Program, ...]
    flops: int
    steps: int
    frames: int
    hosted: int = 0

    @property
    def step(self) -> Program:
        """A step, where it is one program."""
        return self.programs[0]

    @property
    def collectives(self) -> dict[str, Traffic]:
        """Of a step."""
        total: dict[str, Traffic] = {}
        for program in self.programs:
            for kind, traffic in program.collectives.items():
                more = (program.runs * n for n in traffic)
                total[kind] = Traffic(*map(sum, zip(total.get(kind, Traffic()), more, strict=True)))
        return {kind: traffic for kind, traffic in total.items() if traffic.count}

    @property
    def kernels(self) -> dict[str, int]:
        """How often hand-written kernels run in a step, by name."""
        total = Counter[str]()
        for program in self.programs:
            total.update({name: program.runs * n for name, n in program.kernels.items()})
        return dict(+total)

    @property
    def resident(self) -> int:
        """Weights of all networks on a chip."""
        return sum(network.bytes for network in self.networks.values())

    @property
    def largest(self) -> Program:
        return max(self.programs, key=lambda program: program.total(self.resident))

    @property
    def total(self) -> int:
        return self.largest.total(self.resident)

    @property
    def fits(self) -> bool:
        return self.total <= self.machine.chip.memory

    @property
    def floor_seconds(self) -> float:
        """A step at the vendor's peak, on all chips."""
        return self.flops / (self.machine.chip.flops * self.machine.count)

    @property
    def link_seconds(self) -> float | None:
        """Modelled: the bytes of a step's collectives over the links of one chip, and those from
        other nodes over its share of the network, none overlapped. None where there is no figure.
        """
        far = sum(traffic.far for traffic in self.collectives.values())
        near = sum(traffic.bytes for traffic in self.collectives.values()) - far
        if far and self.machine.chip.network is None:
            return None
        seconds = near / self.machine.links if near else 0.0
        return seconds + (far / self.machine.chip.network if far else 0.0)

    @property
    def step_seconds(self) -> float | None:
        """Modelled: the floor and then the links."""
        return None if self.link_seconds is None else self.floor_seconds + self.link_seconds

    def __str__(self) -> str:
        chip = self.machine.chip
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        networks = ", ".join(f"{n} {w.bytes / GB:.2f}" for n, w in self.networks.items())
        lines = [
            f"{self.machine}: {self.machine.count} chips of {chip.memory / GB:.1f} GB"
            + (f", divided over {mesh}" if mesh else ""),
            f"parameters       {self.networks['transformer'].parameters:,} of the transformer",
            f"weights a chip   {self.resident / GB:.2f} GB: {networks}",
            *map(str, self.programs),
            f"in all           {self.total / GB:.2f} of {chip.memory / GB:.1f} GB a chip, in"
            f" {self.largest.name} with {self._there()}: {self._verdict()}",
            f"FLOPs a step     {self.flops:.3e}, counted from the config",
            f"floor            {self.floor_seconds:.3f} s a step at the vendor's"
            f" {chip.flops / 1e12:.0f} TFLOP/s a chip",
        ]
        if self.hosted:
            lines.append(f"host memory      {self.hosted / GB:.2f} GB of blocks a chip and step")
        return "\n".join([*lines, *traffic_lines(self), *self._modelled()])

    def _modelled(self) -> list[str]:
        if not self.collectives:
            return []
        if self.link_seconds is None:
            return [
                f"links            not modelled: no vendor joins nodes of {self.machine.chip.name}"
            ]
        chip, step = self.machine.chip, self.step_seconds
        far = any(traffic.far for traffic in self.collectives.values())
        network = f", {chip.network / GB:.0f} GB/s between nodes" if far else ""
        return [
            f"links            {self.link_seconds:.3f} s a step, modelled: those bytes at"
            f" {self.machine.links / GB:.0f} GB/s{network}, none behind computing",
            f"denoising        {step:.3f} s a step, {step * self.steps:.1f} s a section of"
            f" {self.steps} steps, {step * self.steps / self.frames:.3f} s a frame, modelled: floor"
            " and links",
        ]

    def _there(self) -> str:
        return "the weights that stay and two blocks" if self.hosted else "all weights"

    def _verdict(self) -> str:
        if self.fits:
            decoded = any(not program.runs for program in self.programs)
            decoding = "" if decoded else "; decoding was not compiled"
            return f"fits{large_share(self.machine.chip, self.total)}{decoding}"
        over = (self.total - self.machine.chip.memory) / GB
        advice = self.largest.relief
        if self.resident > self.machine.chip.memory:
            advice = (
                "the weights alone are more; give --offload full, or divide them over"
                f" {self._more_chips()}"
            )
        return f"does not fit, {over:.1f} GB too much; {advice}"

    def _more_chips(self) -> str:
        """What would divide the weights enough: chips of this machine that hold the same weights
        as others, or a machine with more."""
        chip, count = self.machine.chip, self.machine.count
        whole = self.resident * self.mesh.get("fsdp", 1) * self.mesh.get("tensor", 1)
        # Weights divide by powers of two only (`sharding.default_sizes`).
        fsdp = count & -count
        if whole <= fsdp * chip.memory:
            rest = f",context={count // fsdp}" if count > fsdp else ""
            return f"more chips: --mesh fsdp={fsdp}{rest}"
        least = max(4, count + 1, math.ceil(whole / chip.memory))
        chips = 1 << (least - 1).bit_length()
        return f"a machine of more chips, as {hardware.parse(f'{chip.name}-{chips * chip.cores}')}"


def traffic_lines(made: Program | Report) -> list[str]:
    """Lines on the kernels and collectives of a step."""
    lines = [f"attention        {n} a step by {name}" for name, n in made.kernels.items()]
    for kind, traffic in made.collectives.items():
        far = f", {traffic.far / GB:.3f} of it from other nodes" if traffic.far else ""
        lines.append(f"{kind:<16} {traffic.count} a step, {traffic.bytes / GB:.3f} GB a chip{far}")
    return lines


def dry_run(
    pipe: FramePack,
    path: epath.PathLike,
    layout: Layout,
    settings: Settings,
    machine: Machine,
    mesh: dict[str, int] | None = None,
    batch: int = 1,
    decode: bool = False,
    streamed: bool = False,
) -> Report:
    """Compile a denoising step of a layout for a machine, and the VAE's decoder if asked to, which
    takes minutes at full size. `streamed`, no block of the transformer stays on the chips, and no
    encoder.

    `path` is that of the pipe's bundle; `mesh` says how chips are divided, by default as
    `sharding.default_sizes` does. Raises ValueError where the compiler is missing, where the mesh
    does not divide, and where its `data` does not divide the batch: chips would repeat work.
    """
    manifest = bundle.read_manifest(path)
    kinds = {role: bundle.role_config(manifest, role) for role in bundle.ROLES}
    configs = {role: cfg for role, (_, cfg) in kinds.items()}
    spec, cfg, _ = pipe.transformer
    sizes = mesh or sharding.default_sizes(machine.count, cfg.heads)
    devices = sharding.make_mesh(**sizes, devices=hardware.compile_devices(machine))
    spec.check_mesh(cfg, devices)
    _check_batch(batch, devices.shape["data"])
    params = {
        role: _abstract(*kinds[role], "float32" if role == "vae" else pipe.dtype, devices)
        for role in bundle.ROLES
    }
    weights = params["transformer"]
    programs = _step(pipe, weights, configs, layout, settings, batch, devices, streamed)
    if decode:
        programs.append(_decode(pipe, params["vae"], layout, batch, devices))
    rows, columns = (side // pipe.vae.cfg.space_compression for side in layout.canvas)
    tokens = image_tokens(configs["image_encoder"])
    flops = spec.forward_flops(cfg, pipe.schedule, rows, columns, MAX_PROMPT_TOKENS, tokens)
    networks = {
        role: Weights(sum(math.prod(p.shape) for p in jax.tree.leaves(tree)), placed_bytes(tree))
        for role, tree in params.items()
    }
    hosted = 0
    if streamed:
        # Of the blocks there are two, the one that runs and the next.
        hosted = placed_bytes([weights[part] for part in spec.offloadable])
        two = 2 * max(block.weights for block in programs[: len(spec.offloadable)])
        networks = {role: networks[role] for role in ("transformer", "vae")}
        there = networks["transformer"].bytes - hosted + two
        networks["transformer"] = networks["transformer"]._replace(bytes=there)
    return Report(
        machine=machine,
        mesh=dict(devices.shape),
        networks=networks,
        hosted=hosted,
        programs=tuple(programs),
        flops=flops * batch * (1 + (settings.cfg_scale != 1)),
        steps=settings.steps,
        frames=len(layout.plan[-1].targets) * pipe.vae.cfg.time_compression,
    )


def large_share(chip: hardware.Chip, needed: int) -> str:
    """What to set where a GPU has the memory, but JAX would not take it; else nothing."""
    share = needed / chip.memory
    if chip.platform != "cuda" or share <= GPU_SHARE:
        return ""
    setting = max(LARGE_GPU_SHARE, math.ceil(100 * share) / 100)
    return (
        f" with XLA_PYTHON_CLIENT_MEM_FRACTION={setting} set, for JAX takes {GPU_SHARE:.0%} of a"
        " GPU by default"
    )


def _check_batch(batch: int, data: int) -> None:
    if batch % data:
        raise ValueError(
            f"batch = {batch} on data={data}: chips would repeat work, as data divides whole videos"
            f" only; give --batch {-(-batch // data) * data}, or use fsdp and context"
        )


def _abstract(spec: NetworkSpec, cfg: Any, dtype: str, devices: Mesh) -> Any:
    """Parameters of a network as they lie on the devices, without any."""
    params = spec.abstract_params(cfg)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), params)
    shardings = sharding.shard(params, sharding.resolve(spec.sharding_rules, params), devices)
    return jax.tree.map(_placed, params, shardings)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def placed_bytes(params: Any) -> int:
    """Bytes on one device of abstract arrays that say where they lie."""
    return sharding.device_bytes(params, jax.tree.map(lambda leaf: leaf.sharding, params))


def image_tokens(vision: Any) -> int:
    """Tokens that an image encoder makes of an image."""
    return (vision.image_size // vision.patch_size) ** 2


def _step(
    pipe: FramePack,
    weights: Any,
    configs: dict[str, Any],
    layout: Layout,
    settings: Settings,
    batch: int,
    devices: Mesh,
    streamed: bool,
) -> list[Program]:
    """The denoising step; where blocks are streamed, the programs that it consists of."""
    spec, cfg, _ = pipe.transformer
    whole = functools.partial(_placed, sharding=NamedSharding(devices, PartitionSpec()))
    inputs, at, state = jax.tree.map(whole, _inputs(pipe, configs, layout, settings, batch))
    if streamed:
        sigma = whole(jax.ShapeDtypeStruct((batch,), jnp.float32))
        given = state.x, sigma, inputs.context, inputs.conditions, jnp.dtype(pipe.dtype)
        with jax.set_mesh(devices):
            parts = spec.offload_programs(cfg, weights, *given)
        passes = 1 + (settings.cfg_scale != 1)
        return [_part(pipe, part, passes, devices) for part in parts]
    kind = settings.step_cache and settings.step_cache.kind
    fixed = spec, cfg, pipe.dtype, kind
    # Zeros, on this machine: outside of the mesh, whose devices hold nothing.
    cached = jax.tree.map(whole, sampler.start_caches(*fixed, weights, inputs, state.x))

    def lower() -> jax.stages.Lowered:
        return sampler.step.lower(*fixed, weights, inputs, at, state, cached)

    return [compiled_program("step", STEP_RELIEF, weights, lower, devices)]


def _part(pipe: FramePack, part: Any, passes: int, devices: Mesh) -> Program:
    """A program of a step that passes the network so often."""

    def lower() -> jax.stages.Lowered:
        with sampler.precision(pipe.dtype):
            return part.lower()

    program = compiled_program(part.name, STEP_RELIEF, part.weights, lower, devices)
    return dataclasses.replace(program, runs=passes * part.runs)


def _decode(pipe: FramePack, weights: Any, layout: Layout, batch: int, devices: Mesh) -> Program:
    """The VAE's decoder for the largest tile of a section's clip.

    Held beside it are the tiles that are done, and on one chip the clip before, of which a part
    waits to be cross-faded.
    """
    spec, cfg, _ = pipe.vae
    length = max(last - first for first, last in (section.decode for section in layout.plan))
    clip = (length, *(side // cfg.space_compression for side in layout.canvas))
    frames, side = pipe.tiling.frames, pipe.tiling.size
    # Tiles in time share a latent with the next.
    most = (
        frames and frames // cfg.time_compression + 1,
        *(side and side // cfg.space_compression,) * 2,
    )
    tile = [min(length, limit or length) for length, limit in zip(clip, most, strict=True)]
    whole = NamedSharding(devices, PartitionSpec())

    def latents(shape: Sequence[int]) -> jax.ShapeDtypeStruct:
        shape = (batch, *shape, cfg.latent_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)

    decode = functools.partial(spec.decode, cfg, tiling=Tiling(frames=None))
    relief = (
        "--vae-tile 256 decodes it in squares" if side is None else "a smaller --vae-tile helps"
    )

    def lower() -> jax.stages.Lowered:
        with sampler.precision(pipe.dtype):
            return jax.jit(decode).lower(weights, latents(tile))

    program = compiled_program("decoding", relief, weights["decoder"], lower, devices)
    sizes = [
        4 * math.prod(jax.eval_shape(decode, weights, latents(shape)).shape)
        for shape in (clip, tile)
    ]
    done = program.outputs * sizes[0] // sizes[1]
    return dataclasses.replace(program, held=done + sizes[0], runs=0)


def compiled_program(
    name: str, relief: str, weights: Any, lower: Callable[[], jax.stages.Lowered], devices: Mesh
) -> Program:
    """Trace and compile a program that takes these weights."""
    began = time.monotonic()
    with jax.set_mesh(devices):
        compiled = lower().compile()
    seconds = time.monotonic() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # TPUs of a slice reach each other by links, whatever host they are on.
    nodes = [0 if d.platform == "tpu" else d.process_index for d in devices.devices.flat]
    return Program(
        name=name,
        relief=relief,
        weights=placed_bytes(weights),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=collectives(text, nodes),
        kernels=kernels(text),
        compile_seconds=seconds,
    )


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
    dtype, tokens = jnp.dtype(pipe.dtype), image_tokens(vision)
    conditions = pipe.transformer.spec.conditions(
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
        context, conditions, conditions if settings.cfg_scale != 1 else None,
        x, shape(x.shape[:2], jnp.bool_), scalar, scalar, scalar if cached else None,
    )  # fmt: skip
    row = shape(solver_table(settings.sampler, flow.sigmas(2, 1.0))[0].shape, jnp.float32)
    at = sampler.At(scalar, row, shape((), jnp.bool_) if cached else None)
    return inputs, at, jax.eval_shape(solver.start, x)
