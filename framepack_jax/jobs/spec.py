"""The options of one video. Imports no JAX, so that flags are parsed quickly.

Fields come in groups, which are the headings of `--help`. A line of a jobs file and the record of a
run hold all fields of a `VideoSpec` side by side.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from framepack_jax.utils.paths import IN_STORES

if TYPE_CHECKING:
    from framepack_jax.bundle import Sampling
    from framepack_jax.generation.pipeline import Settings

RECORD = "run.json"
# Placeholder for a random seed.
RANDOM_SEED = -1
# Options whose default is the bundle's.
OF_BUNDLE = ("negative_prompt", "steps", "distilled_guidance", "cfg_scale", "history_noise", "fps")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Images, videos and the negative prompt."""

    image: Path | None = None
    """First frame: an image file of any format, scaled and cropped to the size of the video.
    Without it the video starts from a black frame and follows the prompt alone."""
    negative_prompt: str | None = None
    """Negative prompt; used only if --cfg-scale is not 1. Default: the bundle's."""
    end_image: Path | None = None
    """Last frame of the video."""
    end_image_as: Literal["auto", "guide", "still"] = "auto"
    """guide: the section that is sampled first reads the image as the frame after the end of the
    video, as in diffusers and in the released demo with an end frame; inverted schedules only.
    still: the image becomes the last four frames. auto: guide for an inverted schedule, else
    still."""
    key_frame: tuple[str, ...] = ()
    """Images at times: 3.5s=photo.png 7s=other.png."""
    extend: Path | None = None
    """Video file, run folder, or folder of pictures in the order of their names, to continue
    instead of --image."""
    prompt_blend: float = 1.0
    """Seconds over which consecutive timed prompts are blended."""


@dataclasses.dataclass(frozen=True)
class VideoSize:
    """Length and size of the video."""

    seconds: float = 5.0
    """Length of the new video; rounded to a number of sections."""
    sections: int | None = None
    """Length in sections, instead of --seconds."""
    height: int | None = None
    """Height in pixels, an even number; default: the bundle's bucket whose aspect ratio is nearest
    to the image's."""
    width: int | None = None
    """Width in pixels; give both or neither."""


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Sampling of a section."""

    steps: int | None = None
    """Denoising steps of a section, or of each stage of a section. Default: the bundle's, 25 for
    FramePack."""
    sampler: Literal["unipc", "unipc-bh2", "euler"] = "unipc"
    """Solver of the sampling ODE, unless the bundle was made for one."""
    distilled_guidance: float | None = None
    """Guidance scale given to the guidance-distilled network, at no cost. Default: the bundle's, 10
    for FramePack."""
    cfg_scale: float | None = None
    """Scale of classifier-free guidance, which doubles the time; 1 is off. Default: the bundle's, 1
    for FramePack."""
    cfg_without: Literal["prompt", "history"] = "prompt"
    """What the second pass of --cfg-scale lacks: the prompt, which the negative prompt replaces; or
    the history (history guidance), for networks that were trained with --history.drop-history."""
    cfg_rescale: float = 0.0
    """Fraction, 0 to 1, of the contrast added by --cfg-scale that is removed."""
    history_noise: float | None = None
    """Noise the history, but not the start image, to this factor, 0 to 1, of the noise level of
    each step; for networks that were trained with --history.noisy. Default: the bundle's, 0 for
    FramePack."""
    flow_shift: float | None = None
    """Shift s of the noise levels, s t / (1 + (s - 1) t): larger gives more steps to high noise, so
    to layout and motion. Default: the bundle's; FramePack's depends on the size, at most 7."""
    step_cache: Literal["none", "tea", "first-block"] = "none"
    """Skip the network's blocks at steps where the prediction changes little: faster, less
    exact."""
    cache_threshold: float | None = None
    """Change at which --step-cache runs the blocks; default: 0.15 (tea), 0.05 (first-block)."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Video files."""

    fps: float | None = None
    """Frames per second of the video, also 23.976 or 29.97. Default: the bundle's, 30 for
    FramePack."""
    crf: int = 16
    """H.264 quality, 1 (largest file) to 51."""
    gif: bool = False
    """Write video.gif too."""
    png: bool = False
    """Write each frame as a PNG file too, without loss, into the folder frames/ of the run."""


@dataclasses.dataclass(frozen=True)
class VideoSpec(Encoding, Denoising, VideoSize, Inputs):
    """All options of one video."""

    prompt: str = ""
    """Description of the video. May be empty, and change with time: "0s: she waves 4s: she
    bows"."""
    seed: int = 0
    """Seed of the noise, up to 64 bits. The same seed and flags give the same video; -1 draws a
    random seed."""

    def filled(self, sampling: "Sampling") -> "VideoSpec":
        """Return the options with the bundle's values where none are given."""
        bundle = {name: getattr(sampling, name) for name in OF_BUNDLE}
        missing = {name: value for name, value in bundle.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def settings(self) -> "Settings":
        """Return the sampler's settings from options that are `filled`. Raises ValueError if an
        option is out of range."""
        from framepack_jax.diffusion.step_cache import StepCacheConfig
        from framepack_jax.generation.pipeline import Settings

        if not 0 <= self.prompt_blend < math.inf:
            raise ValueError(f"prompt_blend = {self.prompt_blend}: expected seconds, 0 or more")
        step_cache = None
        if self.step_cache != "none":
            step_cache = StepCacheConfig(self.step_cache, self.cache_threshold)
        elif self.cache_threshold is not None:
            raise ValueError(
                f"cache_threshold = {self.cache_threshold} needs --step-cache tea or first-block"
            )
        assert self.steps is not None and self.distilled_guidance is not None  # `filled`
        assert self.cfg_scale is not None
        return Settings(
            steps=self.steps,
            sampler=self.sampler,
            distilled_guidance=self.distilled_guidance,
            cfg_scale=self.cfg_scale,
            cfg_without=self.cfg_without,
            cfg_rescale=self.cfg_rescale,
            history_noise=self.history_noise or 0.0,  # None in runs of earlier versions
            flow_shift=self.flow_shift,
            step_cache=step_cache,
        )


SPEC_FIELDS = {field.name: field for field in dataclasses.fields(VideoSpec)}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Weights and adapters."""

    bundle: Annotated[str | None, IN_STORES] = None
    """Folder made by convert_weights.py, or a built-in bundle: tiny, for 128x128 pixels of the toy
    world, or random, which is untrained."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and computation; default: bfloat16 on GPU and TPU, float32 on a CPU."""
    schedule: str | None = None
    """Packing schedule, instead of the bundle's."""
    lora: tuple[str, ...] = ()
    """LoRA adapters for the transformer: FILE or FILE:WEIGHT, with the tensor names of kohya and
    musubi, diffusers and PEFT, ComfyUI, OneTrainer or the original model; or the folder of a
    training run. Several are added up."""
    merge_lora: bool = False
    """Add the adapters to the weights: faster, and in bfloat16 less exact than beside them."""

    def bundle_name(self) -> str:
        """Return --bundle. Raises ValueError if it is missing."""
        if self.bundle is None:
            raise ValueError(
                '--bundle is missing: give a folder made by convert_weights.py, or "tiny"; to'
                " continue a run: framepack resume FOLDER"
            )
        return self.bundle


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """Devices and memory. Latents differ by rounding only."""

    mesh: str | None = None
    """Mesh axes and their sizes: fsdp=4,context=2. The product of the sizes is the number of
    devices. Axes are data (videos of a batch), fsdp (weights), context (tokens of a video) and
    tensor. Default: one device; for --dry-run and several processes, the largest fsdp that divides
    the attention heads, and context for the remaining devices."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel: auto uses cuDNN on a GPU and splash on a TPU where they support the shapes;
    xla is slower and runs everywhere."""
    offload: Literal["auto", "none", "full"] | None = None
    """Weights to keep off the device. none: all networks stay on the device. full: as few as
    possible stay; the transformer's blocks are in host memory, each copied while the previous one
    computes, encoders stay on disk, and the VAE decodes tiles of 256 pixels. auto, the default: as
    many stay as fit, and a message lists them."""
    vae_tile: int | None = None
    """Decode in square tiles of this many pixels, a multiple of 32 (256 is usual): less memory, for
    sizes above 480p and for cards below 80 GB."""


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """Options of all videos of a command."""

    batch: int = 1
    """Number of videos of equal size and length in a batch."""
    overwrite: bool = False
    """Replace the results of an earlier run in --output."""
    latents_only: bool = False
    """Save latents without decoding them; `framepack decode` does so later."""


def source_file(extend: Path) -> Path:
    """Return the video of --extend, which may name a run folder."""
    return extend / "video.mp4" if is_run(extend) else extend


def is_run(path: Path) -> bool:
    """Return whether a path is a run folder; any other folder is one of pictures."""
    return (path / RECORD).exists()
