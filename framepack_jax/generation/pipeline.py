"""From images and prompts to videos, section by section.

    pipe = FramePack.load("weights/framepack_i2v_hy")
    video = pipe(image, "The girl dances", seconds=5, seed=0)

What is known of a video lies on its timeline: the start image, an end image, key frames, the video
that is extended. For each section of the plan: read its context from the timeline, denoise, write
the section back, decode what the section lets us decode, and cross-fade it with what is there.
Returns arrays and writes no file. Source: arXiv 2504.12626 and the authors' sampler.

Shapes: B batch, T latent frames of the video, w latent window, H W latent rows and columns,
C latent channels, P pixel frames.
"""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from framepack_jax import bundle, conditioning, packing
from framepack_jax.conditioning import Encoders, PromptStates, load_encoders
from framepack_jax.diffusion import SOLVERS, flow, sampler, solver_table
from framepack_jax.diffusion.given_frames import GivenFrames
from framepack_jax.diffusion.step_cache import StepCacheConfig
from framepack_jax.generation import offload_plan
from framepack_jax.generation.crossfade import Interval, Splicer, to_uint8
from framepack_jax.generation.prompts import prompt_shares, timed_prompts
from framepack_jax.generation.request import (
    START_FRAMES,
    Geometry,
    Layout,
    Request,
    SourceVideo,
    fit_images,
    make_layout,
)
from framepack_jax.models import offload
from framepack_jax.models.lora import LoRA, attach
from framepack_jax.models.lora import merge as merge_lora
from framepack_jax.models.spec import DenoiserSpec, NetworkSpec, VaeSpec
from framepack_jax.models.tiling import Tiling
from framepack_jax.packing import Section, Timeline
from framepack_jax.packing.buckets import BUCKETS_480P
from framepack_jax.parallel.multihost import fetch, on_primary

# (section from 0, step from 0, the sample as predicted now (B, w, H, W, C))
OnStep = Callable[[int, int, jax.Array], None]
# Called when a transformer block that is not on the device has been computed.
OnBlock = Callable[[], None]
OnSection = Callable[[int, tuple[int, ...], np.ndarray], None]
DEFAULT_TILING = Tiling()
MAX_STEPS = 1000
DTYPES = ("float32", "bfloat16", "float16")


class NotFinite(FloatingPointError):
    """Latents that are not finite. `samples` are those of the batch that it happened to."""

    def __init__(self, message: str, samples: Sequence[int]) -> None:
        super().__init__(message)
        self.samples = tuple(samples)


Spec = TypeVar("Spec", bound=NetworkSpec)


class Network(NamedTuple, Generic[Spec]):
    """A network of a bundle: the spec of its kind, its config, its parameters."""

    spec: Spec
    cfg: Any
    params: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How sections are denoised. The defaults are those of the release.

    `distilled_guidance` is the scale that a guidance-distilled network takes as an input.
    `cfg_scale` is that of classifier-free guidance (1: no second pass, no negative prompt), and
    `cfg_rescale` in [0, 1] corrects the contrast that it adds.
    `step_cache` leaves the transformer's blocks out at steps where they would change little.
    """

    steps: int = 25
    sampler: str = "unipc"
    distilled_guidance: float = 10.0
    cfg_scale: float = 1.0
    cfg_rescale: float = 0.0
    step_cache: StepCacheConfig | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps = {self.steps}: expected at least 1, at most {MAX_STEPS}")
        if self.sampler not in SOLVERS:
            raise ValueError(f"sampler {self.sampler!r}: expected one of {', '.join(SOLVERS)}")
        if not 0 <= self.cfg_rescale <= 1:
            raise ValueError(f"cfg_rescale = {self.cfg_rescale}: expected a number from 0 to 1")
        for name in ("distilled_guidance", "cfg_scale"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)}: expected a finite number")


DEFAULT_SETTINGS = Settings()


class DecodedSection(NamedTuple):
    """What one section added: its latents, and the frames that became final with it.

    `frames` (P, height, width, 3) uint8 are the video's frames `start` .. `start + P - 1`; there
    may be none yet. `latents` (F, H, W, C) are those of the F latent `positions`, normalised: the
    section's, and with the first or last in time the start or end image's.
    """

    start: int
    frames: np.ndarray
    positions: tuple[int, ...]
    latents: np.ndarray


class Video(NamedTuple):
    """`frames` (P, height, width, 3) uint8; `latents` (T, H, W, C), normalised."""

    frames: np.ndarray
    latents: np.ndarray


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Encoded requests of one layout: `conditions` of every section, or one for all; what is not
    wanted, or None; latents (B, H, W, C) of the positions that are `known`."""

    conditions: Sequence[Any]
    negative: Any
    known: Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FramePack:
    """A bundle and how to run it. Build it with `FramePack.load`. Encoders that do not stay on the
    device are a function that reads them; `decode_tiling`, where given, is how the VAE takes apart
    what it decodes, beside `tiling` for what it encodes."""

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

        `dtype` is what transformer and encoders are kept and computed in (None: bfloat16 on an
        accelerator, float32 on a CPU); the VAE stays in float32. With float32, matrix products are
        float32 too; otherwise the VAE's are what the device does by default (TF32, bfloat16).
        `schedule` replaces that of the bundle. On a `mesh` (of `sharding.make_mesh`) weights and
        work are divided. `offload`, one of `offload_plan.MODES`, says which weights leave the
        device, for one video of the bundle's largest size. Raises BundleError, ScheduleError,
        ValueError.
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
    ) -> "FramePack":
        """All of `load` but the weights: reads and checks what can be checked without them."""
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        manifest = bundle.read_manifest(path)
        schedule = schedule or manifest.schedule
        for name in bundle.ROLES:
            bundle.role_config(manifest, name)
        spec, cfg = bundle.denoiser_config(manifest)
        spec.check_kernels(cfg, spec.context_kernels(schedule))
        if mesh is not None:
            spec.check_mesh(cfg, mesh)
        vae = bundle.vae_config(manifest)
        vae[0].check_tiling(vae[1], tiling)
        frames = packing.start_frames(schedule)
        if frames != START_FRAMES:
            raise packing.ScheduleError(
                f"schedule {schedule} needs {frames} known frames at its start, but a video begins"
                " with one image; use an anchor f1k1"
            )
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
        )

    def with_weights(
        self,
        path: epath.PathLike,
        roles: Sequence[str] = bundle.ROLES,
        plan: offload_plan.OffloadPlan | None = None,
    ) -> "FramePack":
        """The same with the weights of the bundle at `path`, and with the tokenizers where `roles`
        are all of them; decoding needs `("vae",)` only. They lie where the `plan` says, by default
        on the device."""
        root, manifest = epath.Path(path), bundle.read_manifest(path)

        def load_role(role: str, dtype: str, load: Callable[..., Any]) -> Any:
            return load(root, manifest, role, dtype=jnp.dtype(dtype), mesh=self.mesh)

        vae = Network(*bundle.vae_config(manifest), load_role("vae", "float32", bundle.load_params))
        loaded = dataclasses.replace(self, vae=vae)
        if plan is not None:
            loaded = dataclasses.replace(loaded, decode_tiling=plan.tiling)
        if set(roles) == {"vae"}:
            return loaded
        read = functools.partial(load_encoders, root, manifest, jnp.dtype(self.dtype), self.mesh)
        stay = plan is None or plan.encoders
        load = bundle.load_params
        if plan is not None and plan.layers is not None:
            load = functools.partial(
                bundle.load_offloaded, resident=plan.layers, hosted=plan.hosted
            )
        return dataclasses.replace(
            loaded,
            encoders=read() if stay else functools.partial(read, streamed=True),
            transformer=Network(
                *bundle.denoiser_config(manifest), load_role("transformer", self.dtype, load)
            ),
        )

    def plan(
        self,
        path: epath.PathLike,
        mode: str,
        canvas: tuple[int, int],
        batch: int = 1,
        roles: Sequence[str] = bundle.ROLES,
        encoded: int = 1,
    ) -> offload_plan.OffloadPlan:
        """Return what of these networks stays on the device for one of `offload_plan.MODES`, if
        videos sampled at canvas (height, width) are made `batch` side by side, and clips of up to
        `encoded` latent frames are encoded for them; the same in all processes. Raises ValueError,
        BundleError."""
        _, frames = self.geometry.frames_of(0, encoded)
        return on_primary(
            offload_plan.plan, path, mode, offload_plan.Work(canvas, batch, self.schedule, frames),
            dtype=self.dtype, tiling=self.tiling, mesh=self.mesh, roles=roles,
        )  # fmt: skip

    def with_lora(self, lora: LoRA, *, merge: bool = False) -> "FramePack":
        """The same with low-rank adapters beside the transformer's kernels, or in them.

        `lora` is what `conversion.lora.read` gives, several joined by `lora.combine`. Merged, it
        costs no time in sampling, and uses up the transformer's weights of this pipeline. Raises
        ValueError where it does not fit.
        """
        spec, cfg, params = self.transformer
        dtype = "float32" if merge else self.dtype
        params = attach(params, lora, dtype=jnp.dtype(dtype), mesh=self.mesh)
        if merge:
            params = merge_lora(params, donate=True)
        return dataclasses.replace(self, transformer=Network(spec, cfg, params))

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        """Compute on the mesh, if there is one, in the precision that the dtype means."""
        mesh = contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        with sampler.precision(self.dtype), mesh:
            yield

    def _run(self, network: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function that uses weights; what it gives is whole on one device."""
        with self._on_mesh():
            return fetch(network(*args, **options))

    @property
    def geometry(self) -> Geometry:
        """How this bundle divides time and space."""
        patch = packing.kernel_shape(self.transformer.spec.patch)[1]
        vae = self.vae.cfg
        return Geometry(
            self.schedule, vae.time_compression, patch * vae.space_compression,
            self.buckets,
        )  # fmt: skip

    def __call__(self, image: np.ndarray | None, prompt: str, **options: Any) -> Video:
        """Make a whole video; `options` are those of `stream`."""
        spans = list(self.stream(image, prompt, **options))
        frames = np.concatenate([s.frames for s in sorted(spans, key=lambda s: s.start)])
        latents = np.concatenate([s.latents for s in sorted(spans, key=lambda s: s.positions)])
        return Video(frames, latents)

    def stream(
        self,
        image: np.ndarray | None,
        prompt: str,
        *,
        negative_prompt: str = "",
        end_image: np.ndarray | None = None,
        end_image_as: str = "auto",
        key_frames: Mapping[float, np.ndarray] | None = None,
        footage: SourceVideo | None = None,
        seconds: float = 5.0,
        sections: int | None = None,
        fps: float = 30.0,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        prompt_blend: float = 1.0,
        settings: Settings = DEFAULT_SETTINGS,
        on_step: OnStep | None = None,
        on_section: OnSection | None = None,
    ) -> Iterator[DecodedSection]:
        """Yield a `DecodedSection` for every section as it is made, in the order of making.

        `image` (height, width, 3) uint8 is the first frame, None for text alone; it is scaled and
        cropped to the bundle's bucket nearest to its shape, or to `height` x `width` pixels, any
        even numbers. `end_image` is what the video ends with, as `end_image_as` says (see
        `Request`), `key_frames` are images by seconds, `footage` is a video to go on from, whose
        frames before the first span stay as they are. The length of what is made is `sections`
        latent windows, else the number nearest to `seconds`. `prompt_blend` seconds around a change
        of prompt both count. `on_section(number, positions, latents)` has the latents of a section
        before they are decoded.

        Raises ValueError for impossible sizes and durations, NotFinite if latents are not finite.
        """
        request = Request(
            prompt, image, negative_prompt, seed, end_image,
            tuple(sorted((key_frames or {}).items())), footage, end_image_as,
        )  # fmt: skip
        layout = make_layout(
            self.geometry, request,
            seconds=seconds, sections=sections, fps=fps, height=height, width=width,
        )  # fmt: skip
        request = fit_images(self.geometry, request, layout)
        inputs = self.encode([request], layout, settings, prompt_blend)
        made = self.sample(layout.plan, inputs, settings, seeds=[seed], on_step=on_step)
        if on_section is not None:
            made = _announced(made, layout, on_section)
        before = None if footage is None else self.overlap(layout, request.footage)
        for section, start, frames, timeline in self.decode(layout.plan, made, before):
            positions = layout.new_positions(section)
            pixels = np.asarray(to_uint8(frames, layout.height, layout.width))[0]
            yield DecodedSection(start, pixels, positions, timeline.read(positions)[0])

    def encode(
        self,
        requests: Sequence[Request],
        layout: Layout,
        settings: Settings,
        prompt_blend: float = 0.0,
        known: Mapping[int, np.ndarray] | None = None,
    ) -> Inputs:
        """Encode prepared requests of one layout; `known` latents (B, H, W, C) by position, where
        they are there already."""
        encoders = self.encoders() if callable(self.encoders) else self.encoders
        embedded = jnp.concatenate(
            [
                self._run(conditioning.encode_image, encoders, request.image[None])
                for request in requests
            ]
        )
        guidance = jnp.full(len(requests), settings.distilled_guidance, jnp.float32)

        def conditions(prompts: Sequence[PromptStates]) -> Any:
            states = (jnp.concatenate(parts) for parts in zip(*prompts, strict=True))
            return self.transformer.spec.conditions(*states, embedded, guidance)

        # Sections under the same prompts share one set of arrays.
        @functools.cache
        def at(*shares: tuple[tuple[str, float], ...]) -> Any:
            return conditions(
                [
                    conditioning.blend_prompts([(encoded[t], share) for t, share in prompts])
                    for prompts in shares
                ]
            )

        shares = [
            tuple(self._prompts_at(r.prompt, section, layout, prompt_blend) for r in requests)
            for section in layout.plan
        ]
        _warn_of_unused(requests, shares)
        refused = [r.negative_prompt for r in requests] if settings.cfg_scale != 1 else []
        wanted = [t for each in shares for prompts in each for t, _ in prompts]
        texts = list(dict.fromkeys([*wanted, *refused]))
        read = self._run(conditioning.encode_each, encoders, [[text] for text in texts])
        encoded = dict(zip(texts, read, strict=True))
        by_section = [at(*each) for each in shares]
        negative = conditions([encoded[text] for text in refused]) if refused else None
        if known is None:
            each = [self.known_latents(request, layout) for request in requests]
            known = {p: np.stack([latents[p] for latents in each]) for p in each[0]}
        return Inputs(by_section, negative, known)

    def _prompts_at(
        self, prompt: str, section: Section, layout: Layout, span: float
    ) -> tuple[tuple[str, float], ...]:
        """The prompts that count in the middle of a section, and their shares."""
        times, texts = zip(*timed_prompts(prompt), strict=True)
        compression = self.vae.cfg.time_compression
        middle = (section.targets[0] - 1 + section.targets[-1]) / 2 - (layout.before - 1)
        shares = prompt_shares(times, compression * middle / layout.fps, span)
        return tuple((text, s) for text, s in zip(texts, shares, strict=True) if s > 0)

    def known_latents(self, request: Request, layout: Layout) -> dict[int, np.ndarray]:
        """Return the latents (H, W, C) of a prepared request by position: of the start image or the
        footage, of key frames and end image."""
        known = {}
        if request.footage is None:
            known[0] = self.encode_clip(request.image[None])[0]
        else:
            known |= self._known_footage(request.footage, layout.before)
        pictures = [image for _, image in request.key_frames]
        pictures += [] if request.end_image is None else [request.end_image]
        for position, picture in zip(layout.stills, pictures, strict=True):
            known[position] = self._still(picture, guide=position == layout.length)
        return known

    def _still(self, picture: np.ndarray, guide: bool) -> np.ndarray:
        """Return the latent (H, W, C) of one frame for a guide, else of `time_compression` frames:
        only the first latent of a video stands for one."""
        frames = 1 if guide else 1 + self.vae.cfg.time_compression
        return self.encode_clip(np.stack([picture] * frames))[-1]

    def encode_clip(self, frames: np.ndarray) -> np.ndarray:
        """The normalised latents (F, H, W, C) of a clip (P, height, width, 3) uint8."""
        encoded = self._run(
            conditioning.clip_latents, self.vae.cfg, self.vae.params, frames[None],
            self.latent_mean, self.latent_std, tiling=self.tiling,
        )  # fmt: skip
        return np.asarray(encoded)[0]

    def _known_footage(self, footage: SourceVideo, before: int) -> dict[int, np.ndarray]:
        positions = self.geometry.footage_positions(before)
        if footage.latents is not None:
            return {position: footage.latents[position] for position in positions}
        count = min(footage.frames, self.geometry.footage_frames)
        known = dict(zip(positions, self.encode_clip(footage.last[-count:]), strict=True))
        if count < footage.frames:
            # The first latent of this clip stands for one frame, and would for four in the video.
            known[0] = self.encode_clip(footage.first[None])[0]
        return known

    def timeline(self, plan: Sequence[Section], known: Mapping[int, np.ndarray]) -> Timeline:
        """Return a timeline of the video, and of a guide that may follow it, with what is known:
        latents (B, H, W, C) by position."""
        batch, *frame = next(iter(known.values())).shape
        length = max(packing.length(plan), 1 + max(known))
        timeline = Timeline(length, tuple(frame), batch)
        for position, latents in known.items():
            timeline.write([position], latents[:, None])
        return timeline

    def sample(
        self,
        plan: Sequence[Section],
        inputs: Inputs,
        settings: Settings,
        *,
        seeds: Sequence[int] = (0,),
        noise: Sequence[np.ndarray] | None = None,
        timeline: Timeline | None = None,
        done: int = 0,
        on_step: OnStep | None = None,
        on_block: OnBlock | None = None,
    ) -> Iterator[tuple[Section, Timeline]]:
        """Denoise section after section; yields each with the timeline that now holds it.

        The noise of section i, in the order of making, is drawn from fold_in(seed, i) for every
        sample, or taken from `noise` (B, w, H, W, C). To go on with an earlier run, `timeline` has
        its latents and `done` is the number of its sections. `on_step(section, step, x0)` is
        called after each step, `on_block()` after each block inside a step, if blocks are streamed.
        Raises NotFinite.
        """
        spec, cfg, params = self.transformer
        params = params if on_block is None else offload.with_on_layer(params, on_block)
        timeline = self.timeline(plan, inputs.known) if timeline is None else timeline
        _, _, *frame = timeline.latents.shape
        sigmas = flow.sigmas(
            settings.steps, flow.shift_mu(packing.target_tokens(self.schedule, *frame[:2]))
        )
        how = sampler.SamplerSettings(
            sigmas, solver_table(settings.sampler, sigmas), settings.cfg_scale,
            settings.cfg_rescale, self.dtype, settings.step_cache,
        )  # fmt: skip
        for i, section in enumerate(plan[done:], start=done):
            if noise is None:
                shape = (len(section.targets), *frame)
                x = np.stack([_noise(seed, i, shape) for seed in seeds])
            else:
                x = np.asarray(noise[i], np.float32)
            context = packing.read_context(section, timeline)
            conditions = inputs.conditions[i if len(inputs.conditions) > 1 else 0]
            with self._on_mesh():
                result = sampler.denoise(
                    spec, cfg, params, x, how, context, conditions, inputs.negative,
                    given=GivenFrames(*packing.read_target(section, timeline)),
                    on_step=on_step and functools.partial(on_step, i),
                )  # fmt: skip
            self._check_finite(i, settings.steps, result.finite_step)
            timeline.write(section.targets, result.latents)
            yield section, timeline

    def _check_finite(self, number: int, steps: int, first_bad: np.ndarray) -> None:
        """`first_bad` (B,): the first step of each sample that was not finite, or -1."""
        if bad := [b for b, step in enumerate(first_bad) if step >= 0]:
            advice = "" if self.dtype == "float32" else "try --dtype float32, or "
            raise NotFinite(
                f"section {number + 1}, step {first_bad[bad[0]] + 1} of {steps}: the prediction is"
                f" not finite in {self.dtype}; {advice}check the weights",
                bad,
            )

    def splicer(self, plan: Sequence[Section], before: int = START_FRAMES) -> Splicer:
        """Joins the clips of a plan; where a video is extended, the last clip is its end."""
        clips = [Interval(*self.geometry.frames_of(*section.decode)) for section in plan]
        if before > START_FRAMES:
            clips.append(
                Interval(min(clip.start for clip in clips), self.geometry.frames_of(0, before)[1])
            )
        return Splicer(clips)

    def overlap(self, layout: Layout, footage: SourceVideo) -> jax.Array:
        """The frames (1, P, height, width, 3) of prepared footage that clips are cross-faded with,
        in [-1, 1]."""
        start = self.geometry.frames_of(layout.overlap_start, layout.before)[0]
        return jnp.asarray(footage.last[None, start - footage.frames :], jnp.float32) / 127.5 - 1

    def decode(
        self,
        plan: Sequence[Section],
        made: Iterable[tuple[Section, Timeline]],
        before: jax.Array | None = None,
    ) -> Iterator[tuple[Section, int, jax.Array, Timeline]]:
        """Decode sections as they are made and cross-fade where clips overlap, also with the end
        of a video that came `before`.

        Yields (section, first frame, final frames (B, P, height, width, 3) in about [-1, 1],
        timeline): what no later clip will touch.
        """
        splicer = self.splicer(plan, START_FRAMES if before is None else plan_start(plan))
        if before is not None:
            splicer.add(len(plan), before)
        for i, (section, timeline) in enumerate(made):
            start, frames = splicer.add(i, self.decode_clip(section, timeline))
            yield section, start, frames, timeline

    def decode_clip(
        self, section: Section, timeline: Timeline, samples: slice = slice(None)
    ) -> jax.Array:
        """The clip (B, P, height, width, 3) in about [-1, 1] that a section lets us decode, of
        these samples of the batch. Raises NotFinite."""
        clip, check = self.start_clip(section, timeline, samples)
        check()
        return clip

    def start_clip(
        self, section: Section, timeline: Timeline, samples: slice = slice(None)
    ) -> tuple[jax.Array, Callable[[], None]]:
        """The clip of `decode_clip`, which the device may still be at work on, and a function that
        waits for it and raises NotFinite where it is not finite."""
        spec, cfg, params = self.vae
        latents = timeline.read(range(*section.decode))[samples]
        latents = latents * self.latent_std + self.latent_mean
        clip = self._run(spec.decode, cfg, params, latents, self.decode_tiling or self.tiling)
        finite = jnp.isfinite(clip).all(axis=(1, 2, 3, 4))
        numbers = np.arange(timeline.latents.shape[0])[samples]
        (first, last), dtype = section.decode, latents.dtype

        def check() -> None:
            if not np.asarray(finite).all():
                raise NotFinite(
                    f"frames decoded from latents {first} to {last - 1} are not finite in"
                    f" {dtype}; check the weights of the VAE",
                    numbers[~np.asarray(finite)].tolist(),
                )

        return clip, check


def _warn_of_unused(
    requests: Sequence[Request], shares: Sequence[Sequence[tuple[tuple[str, float], ...]]]
) -> None:
    """Name prompts by time that fall between the middles of sections, so that none is led by them.
    `shares` are, for each section and request, the prompts that count."""
    for i, request in enumerate(requests):
        used = {text for section in shares for text, _ in section[i]}
        for seconds, text in timed_prompts(request.prompt):
            if text not in used:
                warnings.warn(
                    f"the prompt at {seconds:g} s, {text!r}, leads no section: sections are made"
                    " whole, so give it more time",
                    stacklevel=3,
                )


def plan_start(plan: Sequence[Section]) -> int:
    """The first position that a plan writes."""
    return min(section.targets[0] for section in plan)


def _noise(seed: int, section: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(_key(seed), section), shape)


def _key(seed: int) -> jax.Array:
    """The key of a seed of up to 64 bits; one of 32 bits has jax's own."""
    high, low = divmod(seed, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


def _announced(
    made: Iterable[tuple[Section, Timeline]], layout: Layout, on_section: OnSection
) -> Iterator[tuple[Section, Timeline]]:
    for number, (section, timeline) in enumerate(made):
        positions = layout.new_positions(section)
        on_section(number, positions, timeline.read(positions)[0])
        yield section, timeline
