"""From an image and a prompt to a video, section by section.

    pipe = FramePack.load("weights/framepack_i2v_hy")
    video = pipe(image, "The girl dances", seconds=5, seed=0)

For each section of the plan: read its context from the timeline, denoise, write the section back,
decode what the section lets us decode, and cross-fade it with what is there. Returns arrays and
writes no file. Source: arXiv 2504.12626 and the authors' sampler.

Shapes: B batch, T latent frames of the video, w latent window, H W latent rows and columns,
C latent channels, P pixel frames.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from framepack_jax import bundle, packing
from framepack_jax.buckets import find_bucket
from framepack_jax.conditioning import (
    Encoders,
    encode_image,
    encode_prompt,
    load_image_processor,
    load_tokenizer,
    start_latent,
)
from framepack_jax.diffusion import SOLVERS, flow, guidance, solver, solver_table
from framepack_jax.models.vae import Tiling, check_tiling
from framepack_jax.packing import PackedContext, Section, Timeline
from framepack_jax.video import cross_fade, resize_center_crop

OnStep = Callable[[int, int], None]
OnSection = Callable[[int, tuple[int, ...], np.ndarray], None]
DEFAULT_TILING = Tiling()
DTYPES = ("float32", "bfloat16", "float16")
# Latent frames that an image gives.
START_FRAMES = 1


class Network(NamedTuple):
    """A network of a bundle: the module of its kind, its config, its parameters."""

    model: ModuleType
    cfg: Any
    params: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How sections are denoised. The defaults are those of the release.

    `guidance` is the scale given to the guidance-distilled network, `cfg` classifier-free guidance
    (1 leaves the negative prompt out), `cfg_rescale` in [0, 1] its correction of contrast.
    """

    steps: int = 25
    sampler: str = "unipc"
    guidance: float = 10.0
    cfg: float = 1.0
    cfg_rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: expected at least 1")
        if self.sampler not in SOLVERS:
            raise ValueError(f"sampler {self.sampler!r}: expected one of {', '.join(SOLVERS)}")
        if not 0 <= self.cfg_rescale <= 1:
            raise ValueError(f"cfg_rescale = {self.cfg_rescale}: expected a number from 0 to 1")


DEFAULT_SETTINGS = Settings()


class Span(NamedTuple):
    """What one section added: its latents, and the frames that became final with it.

    `frames` (P, height, width, 3) uint8 are the video's frames `start` .. `start + P - 1`; there
    may be none yet. `latents` (w, H, W, C) are those of the latent `positions`, normalised.
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
    """An encoded request: what is wanted, what is not (or None), start latents (B, F, H, W, C)."""

    conditions: Any
    negative: Any
    start: np.ndarray


@dataclasses.dataclass(frozen=True)
class FramePack:
    """A bundle and how to run it. Build it with `FramePack.load`."""

    transformer: Network
    vae: Network
    encoders: Encoders | None
    latent_mean: np.ndarray
    latent_std: np.ndarray
    schedule: str
    order: str
    dtype: str = "float32"
    tiling: Tiling = DEFAULT_TILING

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        *,
        dtype: str | None = None,
        schedule: str | None = None,
        tiling: Tiling = DEFAULT_TILING,
    ) -> "FramePack":
        """Open a bundle and put its weights onto the device.

        `dtype` is what transformer and encoders are kept and computed in (None: bfloat16 on an
        accelerator, float32 on a CPU); the VAE stays in float32. With float32, matrix products are
        float32 too; otherwise the VAE's are what the device does by default (TF32, bfloat16).
        `schedule` replaces that of the bundle. Raises BundleError, ScheduleError, ValueError.
        """
        pipe = cls.open(path, dtype=dtype, schedule=schedule, tiling=tiling)
        return pipe.with_weights(path)

    @classmethod
    def open(
        cls,
        path: epath.PathLike,
        *,
        dtype: str | None = None,
        schedule: str | None = None,
        tiling: Tiling = DEFAULT_TILING,
    ) -> "FramePack":
        """All of `load` but the weights: reads and checks what can be checked without them."""
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        manifest = bundle.read_manifest(path)
        order = packing.default_order(schedule) if schedule else manifest.order
        schedule = schedule or manifest.schedule
        networks = {name: bundle.role_config(manifest, name) for name in bundle.ROLES}
        model, cfg = networks["transformer"]
        model.check_kernels(cfg, model.context_kernels(schedule))
        check_tiling(networks["vae"][1], tiling)
        frames = packing.start_frames(schedule, order)
        if frames != START_FRAMES:
            raise packing.ScheduleError(
                f"schedule {schedule} needs {frames} known frames at its start, but a video begins"
                " with one image; use an anchor f1k1"
            )
        return cls(
            transformer=Network(model, cfg, None),
            vae=Network(*networks["vae"], None),
            encoders=None,
            latent_mean=np.asarray(manifest.latent_mean, np.float32),
            latent_std=np.asarray(manifest.latent_std, np.float32),
            schedule=schedule,
            order=order,
            dtype=dtype,
            tiling=tiling,
        )

    def with_weights(self, path: epath.PathLike) -> "FramePack":
        """The same with the weights and tokenizers of the bundle at `path`."""
        root, manifest = epath.Path(path), bundle.read_manifest(path)

        def network(role: str, dtype: str) -> Network:
            params = bundle.load_params(root, manifest, role, dtype=jnp.dtype(dtype))
            return Network(*bundle.role_config(manifest, role), params)

        names = ("text_encoder", "text_encoder_2", "image_encoder")
        encoders = Encoders(
            tokenizer=load_tokenizer(root / "tokenizer"),
            tokenizer_2=load_tokenizer(root / "tokenizer_2"),
            image_processor=load_image_processor(root / "image_processor"),
            template=manifest.prompt_template,
            **{name: network(name, self.dtype)[1:] for name in names},
        )
        return dataclasses.replace(
            self,
            transformer=network("transformer", self.dtype),
            vae=network("vae", "float32"),
            encoders=encoders,
        )

    def __call__(self, image: np.ndarray, prompt: str, **options: Any) -> Video:
        """Make a whole video; `options` are those of `stream`."""
        spans = list(self.stream(image, prompt, **options))
        frames = np.concatenate([s.frames for s in sorted(spans, key=lambda s: s.start)])
        latents = np.concatenate([s.latents for s in sorted(spans, key=lambda s: s.positions)])
        return Video(frames, latents)

    def stream(
        self,
        image: np.ndarray,
        prompt: str,
        *,
        negative_prompt: str = "",
        seconds: float = 5.0,
        sections: int | None = None,
        fps: float = 30.0,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        settings: Settings = DEFAULT_SETTINGS,
        on_step: OnStep | None = None,
        on_section: OnSection | None = None,
    ) -> Iterator[Span]:
        """Yield a `Span` for every section as it is made, in the order of making.

        `image` (height, width, 3) uint8 is the first frame; it is scaled and cropped to the 480p
        bucket nearest to its shape, or to `height` x `width` pixels. The length is `sections`
        latent windows, else the number nearest to `seconds`. `on_section(number, positions,
        latents)` has the latents of a section before they are decoded. Raises ValueError for
        impossible sizes and durations, FloatingPointError where latents stop being finite.
        """
        plan = self.plan(seconds, sections, fps)
        image = self.prepare_image(image, height, width)
        inputs = self.encode(image, prompt, negative_prompt, settings)
        made = self.sample(plan, inputs, settings, seed=seed, on_step=on_step)
        if on_section is not None:
            made = _announced(made, on_section)
        for section, start, frames, timeline in self.decode(plan, made):
            positions = _new_positions(section)
            latents = timeline.read(positions)[0]
            yield Span(start, np.asarray(to_uint8(frames))[0], positions, latents)

    def plan(
        self, seconds: float = 5.0, sections: int | None = None, fps: float = 30.0
    ) -> list[Section]:
        """The plan of a video of `sections`, else of about `seconds`. Raises ValueError."""
        if sections is None:
            window = packing.parse(self.schedule).window
            compression = self.vae.cfg.time_compression
            sections = packing.sections_for(seconds, window, fps, compression)
        return packing.plan(self.schedule, self.order, sections)

    def prepare_image(self, image: np.ndarray, height: int | None, width: int | None) -> np.ndarray:
        """Scale and crop to a size that VAE and patches divide. Raises ValueError."""
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"image of shape {image.shape} and type {image.dtype}: expected (height, width, 3)"
                " uint8; video.load_image reads any image file as such"
            )
        if (height is None) != (width is None):
            raise ValueError(f"height = {height}, width = {width}: give both or neither")
        if height is None:
            height, width = find_bucket(*image.shape[:2])
        patch = packing.kernel_shape(self.transformer.model.PATCH)[1]
        unit = patch * self.vae.cfg.space_compression
        if height < unit or width < unit or height % unit or width % unit:
            raise ValueError(
                f"size {height} x {width}: both must be positive multiples of {unit} pixels"
            )
        return resize_center_crop(image, height, width)

    def encode(
        self, image: np.ndarray, prompt: str, negative_prompt: str, settings: Settings
    ) -> Inputs:
        """Encode a bucket-cropped image (height, width, 3) uint8 and the prompts."""
        images = image[None]
        with _precision(self.dtype):
            embedded = encode_image(self.encoders, images)

        def conditions(text: str) -> Any:
            states, valid, pooled = encode_prompt(self.encoders, [text])
            scale = jnp.full(1, settings.guidance, jnp.float32)
            return self.transformer.model.Conditions(states, valid, pooled, embedded, scale)

        with _precision(self.dtype):
            negative = conditions(negative_prompt) if settings.cfg != 1 else None
            _, cfg, params = self.vae
            start = start_latent(cfg, params, images, self.latent_mean, self.latent_std)
            return Inputs(conditions(prompt), negative, np.asarray(start))

    def sample(
        self,
        plan: Sequence[Section],
        inputs: Inputs,
        settings: Settings,
        *,
        seed: int = 0,
        noise: Sequence[np.ndarray] | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[Section, Timeline]]:
        """Denoise section after section; yields each with the timeline that now holds it.

        The noise of section i, in the order of making, is drawn from fold_in(seed, i), or taken
        from `noise` (B, w, H, W, C). `on_step(section, step)` is called after each step. Raises
        ValueError for a seed that does not fit 32 bits.
        """
        check_seed(seed)
        batch, start_frames, *frame = inputs.start.shape
        length = start_frames + sum(len(section.targets) for section in plan)
        timeline = Timeline(length, tuple(frame), batch)
        timeline.write(range(start_frames), inputs.start)
        sigmas = self._sigmas(settings, frame)
        table = solver_table(settings.sampler, sigmas)
        for i, section in enumerate(plan):
            shape = (batch, len(section.targets), *frame)
            if noise is None:
                x = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
            else:
                x = jnp.asarray(noise[i], jnp.float32)
            context = jax.device_put(packing.read_context(section, timeline))
            step = functools.partial(self._step, context, inputs, settings)
            latents = denoise_section(step, x, sigmas, table, i, self.dtype, on_step)
            timeline.write(section.targets, latents)
            yield section, timeline

    def _sigmas(self, settings: Settings, frame: Sequence[int]) -> np.ndarray:
        tokens = packing.target_tokens(self.schedule, frame[0], frame[1])
        return flow.sigmas(settings.steps, flow.shift_mu(tokens))

    def _step(
        self,
        context: PackedContext,
        inputs: Inputs,
        settings: Settings,
        state: solver.State,
        sigma: np.ndarray,
        row: np.ndarray,
    ) -> tuple[solver.State, jax.Array]:
        model, cfg, params = self.transformer
        scales = np.float32(settings.cfg), np.float32(settings.cfg_rescale)
        with _precision(self.dtype):
            return step(
                model.velocity, cfg, self.dtype,
                params, state, sigma, row, context, inputs.conditions, inputs.negative, *scales,
            )  # fmt: skip

    def decode(
        self, plan: Sequence[Section], made: Iterable[tuple[Section, Timeline]]
    ) -> Iterator[tuple[Section, int, jax.Array, Timeline]]:
        """Decode sections as they are made and cross-fade where clips overlap.

        Yields (section, first frame, final frames (B, P, height, width, 3) in about [-1, 1],
        timeline): what no later clip will touch.
        """
        clips = [self._pixel_span(section) for section in plan]
        start, pending = 0, None
        for i, (section, timeline) in enumerate(made):
            clip = self._decode_clip(section, timeline)
            if pending is None:
                start, pending = clips[i][0], clip
            else:
                start, pending = join_clips(start, pending, clips[i][0], clip)
            stop = start + pending.shape[1]
            if i + 1 == len(plan):
                first, last = start, stop
            elif clips[i + 1][0] < start:  # the video grows at its front
                first, last = clips[i + 1][1], stop
            else:
                first, last = start, clips[i + 1][0]
            yield section, first, pending[:, first - start : last - start], timeline
            before, after = pending[:, : first - start], pending[:, last - start :]
            start, pending = (start, before) if first > start else (last, after)

    def _pixel_span(self, section: Section) -> tuple[int, int]:
        """(first, last + 1) frame of the clip that a section decodes: a clip's first latent is one
        frame, every other as many as the VAE compresses into one."""
        first, last = section.decode
        compression = self.vae.cfg.time_compression
        return first * compression, (last - 1) * compression + 1

    def _decode_clip(self, section: Section, timeline: Timeline) -> jax.Array:
        model, cfg, params = self.vae
        latents = timeline.read(range(*section.decode)) * self.latent_std + self.latent_mean
        with _precision(self.dtype):
            return model.decode(cfg, params, jnp.asarray(latents), self.tiling)


def check_seed(seed: int) -> None:
    """Raise ValueError where jax would fold the seed into another or refuse it."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: expected 0 to {2**32 - 1}")


def _precision(dtype: str) -> contextlib.AbstractContextManager:
    """float32 means float32: devices multiply float32 matrices in fewer bits unless told."""
    if dtype == "float32":
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()


def _new_positions(section: Section) -> tuple[int, ...]:
    """Positions that come with a section: its targets, and the start where it is decoded too."""
    start = range(section.targets[0]) if section.decode[0] == 0 else ()
    return (*start, *section.targets)


def _announced(
    made: Iterable[tuple[Section, Timeline]], on_section: OnSection
) -> Iterator[tuple[Section, Timeline]]:
    for number, (section, timeline) in enumerate(made):
        positions = _new_positions(section)
        on_section(number, positions, timeline.read(positions)[0])
        yield section, timeline


@functools.partial(jax.jit, static_argnames=("velocity", "cfg", "dtype"))
def step(
    velocity: Callable[..., jax.Array],
    cfg: Any,
    dtype: str,
    params: Any,
    state: solver.State,
    sigma: jax.Array,
    row: jax.Array,
    context: PackedContext,
    conditions: Any,
    negative: Any,
    cfg_scale: jax.Array,
    cfg_rescale: jax.Array,
) -> tuple[solver.State, jax.Array]:
    """One denoising step: (state after it, whether its prediction is finite).

    One program for all steps and sections of a bucket; only a negative prompt makes another.
    """
    sigma = jnp.full(state.x.shape[0], sigma)
    v = velocity(cfg, params, state.x, sigma, context, conditions, jnp.dtype(dtype))
    if negative is not None:
        unconditional = velocity(cfg, params, state.x, sigma, context, negative, jnp.dtype(dtype))
        v = guidance.guide(v, unconditional, cfg_scale, cfg_rescale)
    x0 = flow.x0_from_velocity(state.x, v, sigma)
    return solver.step(state, x0, row), jnp.isfinite(x0).all()


def denoise_section(
    step: Callable[..., tuple[solver.State, jax.Array]],
    noise: jax.Array,
    sigmas: np.ndarray,
    table: np.ndarray,
    number: int,
    dtype: str,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Run all steps of one section; returns its latents (B, w, H, W, C) float32.

    Raises FloatingPointError that names section, step and dtype where a prediction is not finite.
    """
    state, finite = solver.start(noise), []
    for i, row in enumerate(table):
        state, ok = step(state, np.float32(sigmas[i]), row.astype(np.float32))
        finite.append(ok)
        if on_step is not None and i > 0:
            # Reported one step late, so that the device always has the next one at hand.
            finite[i - 1].block_until_ready()
            on_step(number, i - 1)
    if on_step is not None:
        finite[-1].block_until_ready()
        on_step(number, len(finite) - 1)
    if not all(flags := [bool(ok) for ok in finite]):
        raise FloatingPointError(
            f"section {number + 1}, step {flags.index(False) + 1} of {len(flags)}: the prediction"
            f" is not finite in {dtype}; try --dtype float32, or check the weights"
        )
    return np.asarray(state.x)


def join_clips(a_start: int, a: jax.Array, b_start: int, b: jax.Array) -> tuple[int, jax.Array]:
    """Put two clips (B, P, ...) that start at frames a_start and b_start into one, cross-faded
    where they overlap. Raises ValueError where there is a gap between them."""
    if b_start < a_start:
        a_start, a, b_start, b = b_start, b, a_start, a
    overlap = a_start + a.shape[1] - b_start
    if overlap < 0:
        raise ValueError(f"clips leave a gap of {-overlap} frames before frame {b_start}")
    return a_start, cross_fade(a, b, overlap, axis=1)


@jax.jit
def to_uint8(frames: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> 0 .. 255, rounded and clipped, on the device."""
    return jnp.clip(jnp.round((frames + 1) * 127.5), 0, 255).astype(jnp.uint8)
