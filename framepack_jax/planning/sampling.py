"""Dry run of sampling: compile the real programs for a machine that is not present.

The compiler of that machine reports the memory of a program on each chip, and its collectives.
Weights of other networks are added: without offloading, the sampler keeps all networks on the
devices.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle, packing
from framepack_jax.diffusion import sampler, solver
from framepack_jax.diffusion.given_frames import GivenFrames
from framepack_jax.diffusion.history_noise import HistoryNoise
from framepack_jax.generation.layout import Layout
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.models.network_spec import NetworkSpec
from framepack_jax.models.tiling import Tiling
from framepack_jax.packing import Timeline
from framepack_jax.parallel import hardware, sharding
from framepack_jax.parallel.hardware import Machine
from framepack_jax.planning.programs import Program, compile_program
from framepack_jax.planning.report import Report, Weights

STEP_ADVICE = (
    "--offload full or more chips help (weights and tokens are divided over them), or a smaller"
    " --batch, --height and --width"
)


def dry_run(
    pipe: FramePack,
    path: epath.PathLike,
    layout: Layout,
    settings: Settings,
    machine: Machine,
    mesh: dict[str, int] | None = None,
    batch: int = 1,
    decode: bool = False,
    offload: bool = False,
) -> Report:
    """Compile a denoising step of a layout for a machine.

    Args:
        pipe: The pipeline, without weights.
        path: Its bundle.
        layout: The video; one section is enough.
        settings: Settings of the sampler.
        machine: The machine to compile for.
        mesh: Sizes of the mesh axes; default: `sharding.default_sizes`.
        batch: Number of videos in a batch.
        decode: Compile the VAE's decoder too, which takes minutes at full size.
        offload: Keep all blocks of the transformer and the encoders off the chips.

    Raises ValueError if the compiler is missing, if the mesh does not divide the network, or if its
    `data` does not divide the batch, so that chips would repeat work.
    """
    manifest = bundle.read_manifest(path)
    roles = bundle.sampling_roles(manifest)
    networks = {role: bundle.role_config(manifest, role) for role in roles}
    spec, cfg, _ = pipe.transformer
    sizes = mesh or sharding.default_sizes(machine.count, cfg.heads)
    devices = sharding.make_mesh(**sizes, devices=hardware.compile_devices(machine))
    spec.check_mesh(cfg, devices)
    _check_batch(batch, devices.shape["data"])
    params = {
        role: abstract_params(*networks[role], "float32" if role == "vae" else pipe.dtype, devices)
        for role in roles
    }
    configs = {role: config for role, (_, config) in networks.items()}
    work = StepWork(pipe, configs, manifest.text_tokens, layout, settings, batch, devices)
    programs = work.compile_step(params["transformer"], offload)
    weights, hosted = _weights(params), 0
    if offload:
        weights, hosted = _offloaded(weights, params["transformer"], spec.offloadable, programs)
    if decode:
        programs.append(_decode(pipe, params["vae"], layout, batch, devices))
    return Report(
        machine=machine,
        mesh=dict(devices.shape),
        networks=weights,
        hosted=hosted,
        programs=tuple(programs),
        flops=work.flops(),
        steps=sum(settings.stage_steps(pipe.sampling, 1)),
        frames=pipe.geometry.new_frames,
    )


def _weights(params: dict[str, Any]) -> dict[str, Weights]:
    """Count the parameters of the networks, and their bytes on a chip."""
    return {
        role: Weights(
            sum(math.prod(p.shape) for p in jax.tree.leaves(tree)), sharding.placed_bytes(tree)
        )
        for role, tree in params.items()
    }


def _offloaded(
    weights: dict[str, Weights], transformer: Any, stacks: Sequence[str], programs: list[Program]
) -> tuple[dict[str, Weights], int]:
    """Return the weights that stay on a chip with offloading, and the bytes of the others."""
    hosted = sharding.placed_bytes([transformer[part] for part in stacks])
    # Two blocks are on a chip: the running one and the next.
    two = 2 * max(block.weights for block in programs[: len(stacks)])
    network = weights["transformer"]
    network = network._replace(bytes=network.bytes - hosted + two)
    return {"transformer": network, "vae": weights["vae"]}, hosted


def _check_batch(batch: int, data: int) -> None:
    if batch % data:
        raise ValueError(
            f"batch = {batch} on data={data}: chips would repeat work, as data divides whole videos"
            f" only; give --batch {-(-batch // data) * data}, or use fsdp and context"
        )


def abstract_params(spec: NetworkSpec, cfg: Any, dtype: str, devices: Mesh) -> Any:
    """Return the shapes of a network's parameters, with their shardings."""
    params = spec.abstract_params(cfg)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), params)
    shardings = sharding.shard(params, sharding.resolve(spec.sharding_rules, params), devices)
    return jax.tree.map(_placed, params, shardings)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def image_tokens(vision: Any) -> int:
    """Count the tokens that an image encoder gives for an image; none without an encoder."""
    return 0 if vision is None else (vision.image_size // vision.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class StepWork:
    """A section to denoise: videos of a layout on the devices of a machine.

    `configs` are those of the bundle's networks, by role; the transformer reads `text_tokens`.
    """

    pipe: FramePack
    configs: dict[str, Any]
    text_tokens: int
    layout: Layout
    settings: Settings
    batch: int
    devices: Mesh

    def flops(self) -> int:
        """Count the FLOPs of a step of all videos."""
        spec, cfg, _ = self.pipe.transformer
        compression = self.pipe.vae.cfg.space_compression
        rows, columns = (side // compression for side in self.layout.canvas)
        tokens = image_tokens(self.configs.get("image_encoder"))
        schedule = self.pipe.schedule
        flops = spec.forward_flops(cfg, schedule, rows, columns, self.text_tokens, tokens)
        return flops * self.batch * self.settings.passes

    def compile_step(self, weights: Any, offload: bool) -> list[Program]:
        """Compile the denoising step; with offloading, the programs that it consists of."""
        pipe, devices = self.pipe, self.devices
        spec, cfg, _ = pipe.transformer
        whole = functools.partial(_placed, sharding=NamedSharding(devices, PartitionSpec()))
        inputs, at, state = jax.tree.map(whole, self.inputs())
        if offload:
            sigma = whole(jax.ShapeDtypeStruct((self.batch,), jnp.float32))
            given = state.x, sigma, inputs.context, inputs.conditions, jnp.dtype(pipe.dtype)
            with jax.set_mesh(devices):
                parts = spec.offload_programs(cfg, weights, *given)
            return [self._compile_part(part) for part in parts]
        step_cache = self.settings.step_cache
        kind = None if step_cache is None else step_cache.kind
        step = sampler.StepProgram(spec, cfg, pipe.dtype, kind)
        # Zeros on this machine, because the devices of the mesh cannot hold arrays.
        memory = jax.tree.map(whole, sampler.start_memory(step, weights, inputs, state.x))

        def lower() -> jax.stages.Lowered:
            return sampler.step.lower(step, weights, inputs, at, state, memory)

        return [compile_program("step", STEP_ADVICE, weights, lower, devices)]

    def _compile_part(self, part: Any) -> Program:
        """Compile a part of an offloaded step."""

        def lower() -> jax.stages.Lowered:
            with sampler.precision(self.pipe.dtype):
                return part.lower()

        program = compile_program(part.name, STEP_ADVICE, part.weights, lower, self.devices)
        return dataclasses.replace(program, runs=self.settings.passes * part.runs)

    def inputs(self) -> tuple[sampler.SectionInputs, sampler.At, solver.State]:
        """Return the shapes of all inputs of a step except the weights."""
        pipe, configs, layout = self.pipe, self.configs, self.layout
        settings, batch = self.settings, self.batch
        compression = pipe.vae.cfg.space_compression
        frame = (*(side // compression for side in layout.canvas), pipe.vae.cfg.latent_channels)
        section = max(layout.plan, key=lambda section: len(section.targets))
        timeline = Timeline(layout.length, frame)
        timeline.known[:] = True
        context = packing.read_context(section, timeline)
        # Shapes stand for arrays, whose types they do not have.
        shape: Any = jax.ShapeDtypeStruct
        dtype, tokens = jnp.dtype(pipe.dtype), self.text_tokens
        vision, summary = configs.get("image_encoder"), configs.get("text_encoder_2")
        conditions = pipe.transformer.spec.conditions(
            shape((batch, tokens, configs["text_encoder"].width), dtype),
            shape((batch, tokens), jnp.bool_),
            None if summary is None else shape((batch, summary.width), dtype),
            None if vision is None else shape((batch, image_tokens(vision), vision.width), dtype),
            shape((batch,), jnp.float32),
        )
        context = jax.tree.map(lambda x: shape((batch, *x.shape[1:]), x.dtype), context)
        x = shape((batch, len(section.targets), *frame), jnp.float32)
        scalar = shape((), jnp.float32)
        cached = settings.step_cache is not None
        inputs = sampler.SectionInputs(
            context, conditions, conditions if settings.passes == 2 else None,
            GivenFrames(x, shape(x.shape[:2], jnp.bool_)),
            scalar, scalar, scalar if cached else None,
            context if settings.guides_by_history else None,
            self._history_noise(context) if settings.history_noise else None,
        )  # fmt: skip
        recipe, truth = pipe.sampling.recipe, shape((), jnp.bool_)
        levels = recipe.levels(2, 1000, recipe.stages - 1)
        row = recipe.table(levels, settings.sampler)[0]
        at = sampler.At(
            scalar,
            shape(row.shape, jnp.float32),
            truth if cached else None,
            None if levels.times is None else scalar,
            truth if recipe.zero_star and settings.cfg_scale != 1 else None,
        )
        again = len(row) > solver.COLUMNS
        return inputs, at, jax.eval_shape(functools.partial(solver.start, again=again), x)

    def _history_noise(self, context: packing.PackedContext) -> HistoryNoise:
        """Return the shapes of the noise of a context's history."""
        shape: Any = jax.ShapeDtypeStruct
        return HistoryNoise(
            shape((), jnp.float32),
            tuple(shape(x.shape, jnp.float32) for x in context.latents),
            tuple(shape((1, x.shape[1]), jnp.bool_) for x in context.latents),
        )


def _decode(pipe: FramePack, weights: Any, layout: Layout, batch: int, devices: Mesh) -> Program:
    """Compile the VAE's decoder for the largest tile of a section's clip.

    The finished tiles stay in memory, and on one chip also the previous clip, whose end will be
    cross-faded.
    """
    spec, cfg, _ = pipe.vae
    length = max(last - first for section in layout.plan for first, last in section.decode)
    clip = (length, *(side // cfg.space_compression for side in layout.canvas))
    frames, side = pipe.tiling.frames, pipe.tiling.size
    tiling = Tiling(frames=None)
    if spec.exact_chunks:
        frames, tiling = None, dataclasses.replace(pipe.tiling, size=None, stride=None)
    # Temporal tiles share a latent frame with the next tile.
    most = (
        frames and frames // cfg.time_compression + 1,
        *(side and side // cfg.space_compression,) * 2,
    )
    tile = [min(length, limit or length) for length, limit in zip(clip, most, strict=True)]
    whole = NamedSharding(devices, PartitionSpec())

    def latents(shape: Sequence[int]) -> jax.ShapeDtypeStruct:
        shape = (batch, *shape, cfg.latent_channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)

    decode = functools.partial(spec.decode, cfg, tiling=tiling)
    advice = (
        "--vae-tile 256 decodes it in squares" if side is None else "a smaller --vae-tile helps"
    )

    def lower() -> jax.stages.Lowered:
        with sampler.precision(pipe.dtype):
            return jax.jit(decode).lower(weights, latents(tile))

    program = compile_program("decoding", advice, weights["decoder"], lower, devices)
    sizes = [
        4 * math.prod(jax.eval_shape(decode, weights, latents(shape)).shape)
        for shape in (clip, tile)
    ]
    done = program.outputs * sizes[0] // sizes[1]
    return dataclasses.replace(program, held=done + sizes[0], runs=0)
