"""What is measured: a section in the middle of a video of a bundle, on a mesh of this machine."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle, packing
from framepack_jax.bench.memory import check_fits
from framepack_jax.bench.timing import filled
from framepack_jax.diffusion import sampler, solver
from framepack_jax.generation.encoding import Inputs
from framepack_jax.generation.layout import Layout, make_layout
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.generation.request import Request
from framepack_jax.packing import Section, Timeline
from framepack_jax.parallel import sharding
from framepack_jax.planning.sampling import StepWork, abstract_params

# The sections at both ends of a video read and decode other numbers of frames.
SECTIONS, MIDDLE = 3, 1
# Latents have about this standard deviation, weights that of `timing.filled`.
SPREAD = 1.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """A section of a video of a bundle; `pipe` has no weights.

    A batch has one video for each device along `data` of the mesh. With `random`, weights are
    random numbers in the shapes of the bundle.
    """

    name: str
    path: epath.PathLike
    manifest: bundle.Manifest
    pipe: FramePack
    mesh: Mesh
    layout: Layout
    settings: Settings
    random: bool

    @property
    def batch(self) -> int:
        """Number of videos."""
        return self.mesh.shape["data"]

    @property
    def number(self) -> int:
        """Number of the section in order of generation, from 0."""
        return min(MIDDLE, len(self.layout.plan) - 1)

    @property
    def section(self) -> Section:
        return self.layout.plan[self.number]

    @property
    def steps(self) -> int:
        """Denoising steps of the section, in all stages."""
        return sum(self.settings.stage_steps(self.pipe.sampling, self.number))

    @property
    def video_seconds(self) -> float:
        """Seconds of video that a section adds to each video of the batch."""
        return self.pipe.geometry.new_frames / self.pipe.sampling.fps

    def weights(self, role: str) -> Any:
        """Read or make the weights of a role on the mesh. Raises NoRoom, BundleError."""
        spec, cfg = bundle.role_config(self.manifest, role)
        dtype = "float32" if role == "vae" else self.pipe.dtype
        shapes = abstract_params(spec, cfg, dtype, self.mesh)
        check_fits(f"the weights of {role}", sharding.placed_bytes(shapes))
        if self.random:
            return filled(shapes)
        return bundle.load_params(
            self.path, self.manifest, role, dtype=jnp.dtype(dtype), mesh=self.mesh
        )

    def step_work(self) -> StepWork:
        """Return a denoising step of the section: shapes of its inputs, and FLOPs."""
        roles = bundle.sampling_roles(self.manifest)
        configs = {role: bundle.role_config(self.manifest, role)[1] for role in roles}
        return StepWork(
            self.pipe, configs, self.manifest.text_tokens, self.layout, self.settings, self.batch,
            self.mesh,
        )  # fmt: skip

    def step_inputs(self) -> tuple[sampler.SectionInputs, sampler.At, solver.State]:
        """Return random inputs of a step: arrays replicated over the mesh, and the numbers of the
        step on the host, as the sampler passes them."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            self.step_work().inputs(),
        )
        inputs, at, state = filled(shapes, SPREAD)
        return inputs, jax.device_get(at), state

    def inputs(self) -> Inputs:
        """Return random conditions, as from the encoders."""
        given, _, _ = self.step_inputs()
        conditions, negative = jax.device_get((given.conditions, given.negative))
        return Inputs([conditions], negative, {}, self.pipe.frame_size(self.layout, self.batch))

    def timeline(self, done: bool) -> Timeline:
        """Return random latents of the video, all known except, unless `done`, the section's."""
        batch, *frame = self.pipe.frame_size(self.layout, self.batch)
        length = packing.length(self.layout.plan)
        rng = np.random.default_rng(0)
        timeline = Timeline.of(rng.normal(0, SPREAD, (batch, length, *frame)).astype(np.float32))
        timeline.known[list(self.section.targets)] = done
        return timeline


def open_workload(
    name: str,
    size: tuple[int, int] | None = None,
    mesh: str | None = None,
    random: bool = False,
    steps: int | None = None,
) -> Workload:
    """Open a bundle to measure, without its weights.

    Args:
        name: Built-in bundle, or the folder of one.
        size: Height and width in pixels; default: that of a video from text.
        mesh: Sizes of mesh axes, as fsdp=4,context=2; default: one video over all local devices.
        random: Use random weights in its shapes. Bundles that come as sizes alone always do.
        steps: Denoising steps of each stage of a section; default: those of the bundle.

    Raises ValueError, BundleError.
    """
    path = bundle.resolve(name)
    manifest = bundle.read_manifest(path)
    random = random or name in bundle.SIZE_ONLY
    if not random:
        bundle.check_present(path, ("transformer", "vae"))
    _, cfg = bundle.denoiser_config(manifest)
    devices = jax.local_devices()
    sizes = sharding.parse_mesh(mesh) if mesh else sharding.default_sizes(len(devices), cfg.heads)
    grid = sharding.make_mesh(**sizes, devices=devices)
    pipe = FramePack.open(path, mesh=grid)
    height, width = size or (None, None)
    sections = SECTIONS if packing.history_ages(pipe.schedule) else 1
    layout = make_layout(pipe.geometry, Request(""), sections=sections, height=height, width=width)
    settings = Settings.of(pipe.sampling)
    if steps is not None:
        settings = dataclasses.replace(settings, steps=steps)
    return Workload(name, path, manifest, pipe, grid, layout, settings, random)
