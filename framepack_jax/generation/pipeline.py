"""Generate videos from images and prompts, section by section.

    pipe = FramePack.load("weights/framepack_i2v_hy")
    video = pipe(image, "The girl dances", seconds=5, seed=0)

The timeline holds the latents of given frames: start image, end image, key frames, source video.
For each section of the plan: read its context from the timeline, denoise, write the section to the
timeline, decode its clip, and cross-fade the clip with its neighbours. Returns arrays and writes no
file. Source: arXiv 2504.12626 and the authors' sampler.

Shapes: B batch, T latent frames of the video, w latent window, H W latent rows and columns,
C latent channels, P pixel frames.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from framepack_jax import bundle, packing
from framepack_jax.conditioning import Encoders
from framepack_jax.diffusion import sampler
from framepack_jax.diffusion import section as denoising
from framepack_jax.diffusion.given_frames import GivenFrames
from framepack_jax.generation import decoding, encoding, offload_plan, weights
from framepack_jax.generation.crossfade import Splicer, to_uint8
from framepack_jax.generation.encoding import Inputs
from framepack_jax.generation.geometry import Geometry
from framepack_jax.generation.layout import START_FRAMES, Layout
from framepack_jax.generation.network import Network
from framepack_jax.generation.noise import draw, draw_history
from framepack_jax.generation.options import VideoOptions
from framepack_jax.generation.request import Request, SourceVideo
from framepack_jax.generation.results import DecodedSection, Video, check_finite
from framepack_jax.generation.settings import Settings
from framepack_jax.models import offload
from framepack_jax.models.lora import LoRA
from framepack_jax.models.network_spec import DenoiserSpec, VaeSpec
from framepack_jax.models.tiling import Tiling
from framepack_jax.packing import Range, Section, Timeline
from framepack_jax.packing.buckets import BUCKETS_480P
from framepack_jax.parallel.multihost import fetch

# Called with (section from 0, step from 0, prediction x0 (B, w, H, W, C)).
OnStep = Callable[[int, int, jax.Array], None]
# Called after each transformer block that is not on the device.
OnBlock = Callable[[], None]
# Called with (section from 0, positions, latents (F, H, W, C)).
OnSection = Callable[[int, tuple[int, ...], np.ndarray], None]
DEFAULT_TILING = Tiling()
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class FramePack:
    """Pipeline of a bundle. Build it with `FramePack.load`.

    `encoders` is a function that loads them if they do not stay on the device. `tiling` is that of
    the VAE; `decode_tiling`, if given, replaces it for decoding. `sampling` says how the network is
    sampled. `codebook` (K, C) are the entries of a schedule with `+D`.
    """

    transformer: Network[DenoiserSpec]
    vae: Network[VaeSpec]
    encoders: Encoders | Callable[[], Encoders] | None
    latent_mean: np.ndarray
    latent_std: np.ndarray
    schedule: packing.Schedule
    buckets: tuple[tuple[int, int], ...] = BUCKETS_480P
    dtype: str = "float32"
    tiling: Tiling = DEFAULT_TILING
    mesh: Mesh | None = None
    decode_tiling: Tiling | None = None
    sampling: bundle.Sampling = dataclasses.field(default_factory=bundle.Sampling)
    codebook: np.ndarray | None = None

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        *,
        dtype: str | None = None,
        schedule: packing.Schedule | None = None,
        tiling: Tiling = DEFAULT_TILING,
        mesh: Mesh | None = None,
        offload: str = "none",
    ) -> "FramePack":
        """Open a bundle and put its weights onto the device.

        Args:
            path: Folder of the bundle.
            dtype: Type of weights and computation of transformer and encoders; by default bfloat16
                on an accelerator, float32 on a CPU. The VAE stays in float32. With float32, matrix
                products are float32 too; otherwise those of the VAE take the device's default
                (TF32, bfloat16).
            schedule: Replaces the schedule of the bundle.
            tiling: Tiling of the VAE.
            mesh: Mesh of `sharding.make_mesh` over which weights and work are sharded.
            offload: One of `offload_plan.MODES`, for one video of the bundle's largest size.

        Raises BundleError, ScheduleError, ValueError.
        """
        pipe = cls.open(path, dtype=dtype, schedule=schedule, tiling=tiling, mesh=mesh)
        return pipe.with_weights(
            path, plan=pipe.plan(path, offload, max(pipe.buckets, key=math.prod))
        )

    @classmethod
    def open(
        cls,
        path: epath.PathLike,
        *,
        dtype: str | None = None,
        schedule: packing.Schedule | None = None,
        tiling: Tiling = DEFAULT_TILING,
        mesh: Mesh | None = None,
        codebook: str | None = None,
    ) -> "FramePack":
        """Open a bundle without its weights; check all that does not need them. `codebook` is a
        file in place of the bundle's."""
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        manifest = bundle.read_manifest(path)
        schedule = schedule or manifest.schedule
        for name in bundle.sampling_roles(manifest):
            bundle.role_config(manifest, name)
        spec, cfg = bundle.denoiser_config(manifest)
        spec.check_kernels(cfg, spec.context_kernels(schedule))
        if mesh is not None:
            spec.check_mesh(cfg, mesh)
        vae = bundle.vae_config(manifest)
        vae[0].check_tiling(vae[1], tiling)
        apart, alone = manifest.sampling.anchor_apart, manifest.sampling.decode_alone
        packing.plan(schedule, 1, apart=apart, alone=alone)
        return cls(
            transformer=Network(spec, cfg, None),
            vae=Network(*vae, None),
            encoders=None,
            latent_mean=np.asarray(manifest.latent_mean, np.float32),
            latent_std=np.asarray(manifest.latent_std, np.float32),
            schedule=schedule,
            buckets=manifest.buckets,
            dtype=dtype,
            tiling=tiling,
            mesh=mesh,
            sampling=manifest.sampling,
            codebook=bundle.entries_for(schedule, path, manifest, codebook),
        )

    def with_weights(
        self,
        path: epath.PathLike,
        roles: Sequence[str] | None = None,
        plan: offload_plan.OffloadPlan | None = None,
    ) -> "FramePack":
        """Return the pipeline with the weights of a bundle, see `weights.load_weights`."""
        return weights.load_weights(self, path, roles, plan)

    def plan(
        self,
        path: epath.PathLike,
        mode: str,
        canvas: tuple[int, int],
        batch: int = 1,
        roles: Sequence[str] | None = None,
        encoded: int = 1,
    ) -> offload_plan.OffloadPlan:
        """Decide which weights stay on the device, see `weights.plan_weights`."""
        return weights.plan_weights(self, path, mode, canvas, batch, roles, encoded)

    def with_lora(self, lora: LoRA, *, merge: bool = False) -> "FramePack":
        """Return the pipeline with low-rank adapters, see `weights.add_lora`."""
        return weights.add_lora(self, lora, merge=merge)

    @contextlib.contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Compute on the mesh, if there is one, in the precision of the dtype."""
        mesh = contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        with sampler.precision(self.dtype), mesh:
            yield

    def run(self, network: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function that uses weights; return its results gathered on one device."""
        with self.on_mesh():
            return fetch(network(*args, **options))

    @property
    def geometry(self) -> Geometry:
        """Compression, patches and buckets of the bundle."""
        patch = packing.kernel_shape(self.transformer.spec.patch)[1]
        vae = self.vae.cfg
        halvings = 2 ** (self.sampling.recipe.stages - 1)
        return Geometry(
            self.schedule, vae.time_compression, patch * vae.space_compression * halvings,
            self.buckets, self.sampling,
        )  # fmt: skip

    def __call__(self, image: np.ndarray | None, prompt: str, **options: Any) -> Video:
        """Generate a whole video; `options` are those of `stream`."""
        spans = list(self.stream(image, prompt, **options))
        frames = np.concatenate([s.frames for s in sorted(spans, key=lambda s: s.start)])
        order = np.argsort([position for s in spans for position in s.positions])
        return Video(frames, np.concatenate([s.latents for s in spans])[order])

    def stream(
        self,
        image: np.ndarray | None,
        prompt: str,
        *,
        settings: Settings | None = None,
        on_step: OnStep | None = None,
        on_section: OnSection | None = None,
        **options: Any,
    ) -> Iterator[DecodedSection]:
        """Yield a `DecodedSection` for each clip of the plan, in order of generation.

        Args:
            image: First frame (height, width, 3) uint8, scaled and cropped to the size of the
                video; None for text alone.
            prompt: Text, which may change with time, see `Request`.
            settings: Settings of the sampler; by default those of the bundle.
            on_step: Called after each step with (section, step, x0).
            on_section: Called with (section, positions, latents) before a section is decoded.
            options: Fields of `VideoOptions`.

        Raises ValueError for impossible sizes and lengths, NotFinite if latents are not finite.
        """
        settings = settings or Settings.of(self.sampling)
        settings.check(self.transformer.spec, self.sampling, self.schedule)
        chosen = VideoOptions(**options)
        request, layout = chosen.prepare(self.geometry, image, prompt)
        inputs = self.encode([request], layout, settings, chosen.prompt_blend)
        sections = self.sample(layout.plan, inputs, settings, seeds=[request.seed], on_step=on_step)
        if on_section is not None:
            sections = _announced(sections, layout, on_section)
        source = request.source_video
        joined = source is not None and not self.sampling.decode_alone
        before = self.overlap(layout, source) if joined and source is not None else None
        made = self.decode(layout.plan, sections, before, layout.kept)
        last = None
        for section, start, frames, timeline in made:
            positions = () if section is last else layout.new_positions(section)
            last = section
            pixels = np.asarray(to_uint8(frames, layout.height, layout.width))[0]
            yield DecodedSection(start, pixels, positions, timeline.read(positions)[0])

    def encode(
        self,
        requests: Sequence[Request],
        layout: Layout,
        settings: Settings,
        prompt_blend: float = 0.0,
        given: Mapping[int, np.ndarray] | None = None,
    ) -> Inputs:
        """Encode prompts and images of fitted requests, see `encoding.encode`."""
        return encoding.encode(self, requests, layout, settings, prompt_blend, given)

    def given_latents(self, request: Request, layout: Layout) -> dict[int, np.ndarray]:
        """Encode the images and the source video of a fitted request, by latent position."""
        return encoding.given_latents(self, request, layout)

    def encode_clip(self, frames: np.ndarray) -> np.ndarray:
        """Encode a clip (P, height, width, 3) uint8 to normalised latents (F, H, W, C)."""
        return encoding.encode_clip(self, frames)

    def frame_size(self, layout: Layout, batch: int) -> tuple[int, ...]:
        """Return the shape (B, H, W, C) of one latent frame of a batch of videos."""
        vae = self.vae.cfg
        rows, columns = (side // vae.space_compression for side in layout.canvas)
        return batch, rows, columns, vae.latent_channels

    def timeline(
        self,
        plan: Sequence[Section],
        given: Mapping[int, np.ndarray],
        size: tuple[int, ...] | None = None,
    ) -> Timeline:
        """Return a timeline with `given` latents (B, H, W, C) by position, a guide included; `size`
        is that shape if nothing is given."""
        batch, *frame = size or next(iter(given.values())).shape
        length = max(packing.length(plan), *(1 + position for position in given), 0)
        timeline = Timeline(length, tuple(frame), batch)
        for position, latents in given.items():
            timeline.write([position], latents[:, None])
        return timeline

    def sample(
        self,
        plan: Sequence[Section],
        inputs: Inputs,
        settings: Settings,
        *,
        seeds: Sequence[int] = (0,),
        noise: Sequence[np.ndarray | Sequence[np.ndarray]] | None = None,
        timeline: Timeline | None = None,
        done: int = 0,
        on_step: OnStep | None = None,
        on_block: OnBlock | None = None,
    ) -> Iterator[tuple[Section, Timeline]]:
        """Denoise section after section; yield each with the timeline that now holds it.

        Args:
            plan: Sections in order of generation.
            inputs: Encoded requests, see `encode`.
            settings: Settings of the sampler.
            seeds: One for each sample. The noise of section i, and that of its history, is drawn
                from fold_in(seed, i).
            noise: Noise of each section, in place of that of `seeds`: (B, w, H, W, C), or one array
                for each stage as `noise.draw` returns them.
            timeline: Latents of an earlier run to resume.
            done: Number of finished sections of that run.
            on_step: Called after each step with (section, step, x0).
            on_block: Called after each offloaded block of a step.

        Raises NotFinite.
        """
        spec, cfg, params = self.transformer
        recipe = settings.recipe(self.sampling)
        params = params if on_block is None else offload.with_on_layer(params, on_block)
        if timeline is None:
            timeline = self.timeline(plan, inputs.given, inputs.size)
        _, _, *frame = timeline.latents.shape
        start = packing.start_frames(self.schedule) if 0 in inputs.given else 0
        for i, section in enumerate(plan[done:], start=done):
            shape = (len(section.targets), *frame)
            draws = draw(recipe, seeds, i, shape) if noise is None else noise[i]
            draws = [draws] if isinstance(draws, np.ndarray | jax.Array) else draws
            how = settings.of_section(self.sampling, i, self.dtype)
            read = encoding.by_importance(self, section, timeline)
            context, other = encoding.contexts(self, read, timeline, settings)
            given = GivenFrames(*packing.read_target(section, timeline))
            noise_of_history = draw_history(
                self.schedule, read, context, start, settings.history_noise, seeds, i
            )
            negative = inputs.of(i) if settings.guides_by_history else inputs.negative
            with self.on_mesh():
                result = denoising.denoise(
                    spec, cfg, params, recipe, draws, how, context, inputs.of(i),
                    negative, other, patch=packing.kernel_shape(spec.patch)[1], given=given,
                    history_noise=noise_of_history,
                    on_step=on_step and functools.partial(on_step, i),
                )  # fmt: skip
            check_finite(i, sum(how.steps), result.finite_step, self.dtype)
            timeline.write(section.targets, result.latents)
            yield section, timeline

    def splicer(
        self, plan: Sequence[Section], before: int = START_FRAMES, kept: int = 0
    ) -> Splicer:
        """Return the splicer of the clips of a plan, see `decoding.make_splicer`."""
        return decoding.make_splicer(self.geometry, plan, before, kept)

    def overlap(self, layout: Layout, source_video: SourceVideo) -> jax.Array:
        """Return the frames of a source video to cross-fade with, see `decoding.overlap`."""
        return decoding.overlap(self.geometry, layout, source_video)

    def decode(
        self,
        plan: Sequence[Section],
        sections: Iterable[tuple[Section, Timeline]],
        before: jax.Array | None = None,
        kept: int = 0,
    ) -> Iterator[tuple[Section, int, jax.Array, Timeline]]:
        """Decode sections as they come and cross-fade them, see `decoding.decode`."""
        return decoding.decode(self, plan, sections, before, kept)

    def decode_clip(
        self, clip: Range, timeline: Timeline, samples: slice = slice(None)
    ) -> jax.Array:
        """Decode the clip of a range of positions; wait for it. Raises NotFinite."""
        frames, check = self.start_clip(clip, timeline, samples)
        check()
        return frames

    def start_clip(
        self, clip: Range, timeline: Timeline, samples: slice = slice(None)
    ) -> tuple[jax.Array, Callable[[], None]]:
        """Start to decode a clip of a range of positions, see `decoding.start_clip`."""
        return decoding.start_clip(self, clip, timeline, samples)


def _announced(
    sections: Iterable[tuple[Section, Timeline]], layout: Layout, on_section: OnSection
) -> Iterator[tuple[Section, Timeline]]:
    for number, (section, timeline) in enumerate(sections):
        positions = layout.new_positions(section)
        on_section(number, positions, timeline.read(positions)[0])
        yield section, timeline
