"""`framepack sample`: an image and a prompt become a video in a folder."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from framepack_jax import bundle, packing, pipeline, video
from framepack_jax.models.vae import Tiling

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}
PACKAGES = ("framepack-jax", "jax", "jaxlib", "flax", "transformers", "av", "numpy")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Make a video from an image and a prompt.

    The output folder holds video.mp4, preview.png (a contact sheet), latents/ (a file a section,
    written before the section is decoded) and run.json (all that is needed to make it again).
    """

    bundle: str
    """Folder made by convert_weights.py, or "tiny", the small untrained bundle in this package."""
    image: Path
    """First frame: any image file. It is scaled and cropped to the size of the video."""
    prompt: str
    """What happens in the video. May be empty."""
    negative_prompt: str = ""
    """What should not happen; counts only with --cfg other than 1."""
    seconds: float = 5.0
    """Length; the number of sections that comes nearest is made."""
    sections: int | None = None
    """Length in sections, instead of --seconds."""
    seed: int = 0
    """Seed of the noise. The same seed and flags give the same video."""
    steps: int = 25
    """Denoising steps a section."""
    sampler: Literal["unipc", "unipc-bh2", "euler"] = "unipc"
    """Solver of the sampling ODE."""
    guidance: float = 10.0
    """Scale for the guidance-distilled network (costs nothing)."""
    cfg: float = 1.0
    """Classifier-free guidance scale; other than 1 it doubles the time."""
    cfg_rescale: float = 0.0
    """How far --cfg's gain in contrast is taken back, 0 to 1."""
    height: int | None = None
    """Height in pixels, a multiple of 16; default: the 480p bucket nearest to the image's shape."""
    width: int | None = None
    """Width in pixels, a multiple of 16; give both or neither."""
    fps: int = 30
    """Frames a second of the video; the models are made for 30."""
    crf: int = 16
    """H.264 quality, 1 (largest file) to 51."""
    output: Path | None = None
    """Folder for the results; default: a new one under outputs/."""
    overwrite: bool = False
    """Replace the results of an earlier run in --output."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and computation; default: bfloat16 on GPU and TPU, float32 on a CPU."""
    schedule: str | None = None
    """Packing schedule, instead of the bundle's."""
    vae_tile: int | None = None
    """Decode in square tiles of this many pixels (256 is usual), which saves memory."""


def main(args: list[str] | None = None) -> None:
    """Parse flags and run; user errors end with one line and exit code 1."""
    flags = tyro.cli(Sample, prog="sample.py", args=args)
    try:
        run(flags)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def run(flags: Sample) -> Path:
    """Make the video of `flags`; returns the folder. Raises ValueError, OSError by name."""
    began = time.monotonic()
    image = video.load_image(flags.image)
    settings = pipeline.Settings(
        flags.steps, flags.sampler, flags.guidance, flags.cfg, flags.cfg_rescale
    )
    video.check_encoding(flags.fps, flags.crf)
    output = _output_folder(flags)
    tile = flags.vae_tile
    path = EMBEDDED.get(flags.bundle, flags.bundle)
    pipe = pipeline.FramePack.load(
        path,
        dtype=flags.dtype,
        schedule=flags.schedule,
        tiling=Tiling() if tile is None else Tiling(size=tile, stride=tile * 3 // 4),
    )
    loaded = time.monotonic()
    window = packing.parse(pipe.schedule).window
    sections = flags.sections
    if sections is None:
        compression = pipe.vae.cfg.time_compression
        sections = packing.sections_for(flags.seconds, window, flags.fps, compression)
    image = pipe.prepare_image(image, flags.height, flags.width)
    print(
        f"{sections} sections of {window} latent frames at {image.shape[0]} x {image.shape[1]}"
        f" pixels, schedule {pipe.schedule}, {pipe.dtype} on {jax.devices()[0].device_kind}"
    )

    with _Progress(sections, flags.steps) as progress:
        stream = pipe.stream(
            image,
            flags.prompt,
            negative_prompt=flags.negative_prompt,
            sections=sections,
            height=image.shape[0],
            width=image.shape[1],
            seed=flags.seed,
            settings=settings,
            on_step=progress.step,
            on_section=lambda i, at, z: _save_latents(output, i, at, z),
        )
        spans = sorted(stream, key=lambda span: span.start)
    frames = np.concatenate([span.frames for span in spans])
    sampled = time.monotonic()
    video.write_mp4(output / "video.mp4", frames, fps=flags.fps, crf=flags.crf)
    video.save_png(output / "preview.png", video.contact_sheet(frames, fps=flags.fps))
    timings = {
        "load_seconds": round(loaded - began, 3),
        "sample_and_decode_seconds": round(sampled - loaded, 3),
        "write_seconds": round(time.monotonic() - sampled, 3),
        "seconds_per_frame": round((sampled - loaded) / len(frames), 4),
        "peak_memory_bytes": peak_memory(),
    }
    sources = {name: role.source for name, role in bundle.read_manifest(path).roles.items()}
    _write_record(output, flags, pipe, sources, sections, frames.shape, timings)
    print(
        f"{output / 'video.mp4'}: {len(frames)} frames, {len(frames) / flags.fps:.1f} s at"
        f" {flags.fps} fps\n{time.monotonic() - began:.1f} s in all,"
        f" {timings['seconds_per_frame']:.3f} s a frame with compilation,"
        f" peak memory {timings['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    return output


def peak_memory() -> int:
    """Bytes at the highest: of the device where it counts them, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(stats.get("peak_bytes_in_use", process))


class _Progress:
    """Two bars, sections and steps."""

    def __init__(self, sections: int, steps: int) -> None:
        self.bars = [
            tqdm(total=sections, desc="sections", unit="section"),
            tqdm(total=steps, desc="steps", unit="step", leave=False),
        ]

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in reversed(self.bars):
            bar.close()

    def step(self, section: int, step: int) -> None:
        sections, steps = self.bars
        if step == 0:
            steps.reset()
        steps.update()
        if step + 1 == steps.total:
            sections.update()


def _output_folder(flags: Sample) -> Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    output = flags.output or Path("outputs") / f"{stamp}_{flags.image.stem}"
    if (output / "run.json").exists() and not flags.overwrite:
        raise ValueError(f"{output} already holds a run; choose another --output or --overwrite")
    (output / "latents").mkdir(parents=True, exist_ok=True)
    for old in [*(output / "latents").glob("section_*.npz"), output / "run.json"]:
        old.unlink(missing_ok=True)
    return output


def _save_latents(output: Path, number: int, positions: tuple[int, ...], z: np.ndarray) -> None:
    """`latents/section_000.npz` with `positions` (F,) and `latents` (F, H, W, C), normalised."""
    path = output / "latents" / f"section_{number:03d}.npz"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, positions=np.asarray(positions), latents=z)
    os.replace(partial, path)


def _write_record(
    output: Path,
    flags: Sample,
    pipe: pipeline.FramePack,
    sources: dict[str, Any],
    sections: int,
    shape: tuple[int, ...],
    timings: dict[str, float],
) -> None:
    """Write `run.json`, the last file of a run."""
    record = {
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
        "weights": sources,
        "sections": sections,
        "frames": shape[0],
        "height": shape[1],
        "width": shape[2],
        "schedule": pipe.schedule,
        "order": pipe.order,
        "dtype": pipe.dtype,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "timings": timings,
    }
    partial = output / "run.partial"
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, output / "run.json")
