"""`framepack sample`: an image and a prompt become a video in a folder."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from framepack_jax import bundle, pipeline, video
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
    """Decode in square tiles of this many pixels, a multiple of 32 (256 is usual): less memory, for
    sizes above 480p and for cards below 80 GB."""


def main(args: list[str] | None = None, prog: str = "sample.py") -> None:
    """Parse flags and run; user errors end with one line and exit code 1."""
    flags = tyro.cli(Sample, prog=prog, args=args)
    try:
        run(flags)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def run(flags: Sample) -> Path:
    """Make the video of `flags`; returns the folder. Raises ValueError, OSError by name."""
    began = time.monotonic()
    versions = {name: _version(name) for name in PACKAGES}
    image = video.load_image(flags.image)
    settings = pipeline.Settings(
        flags.steps, flags.sampler, flags.guidance, flags.cfg, flags.cfg_rescale
    )
    video.check_encoding(flags.fps, flags.crf)
    pipeline.check_seed(flags.seed)
    output = _output_folder(flags)
    path, tile = EMBEDDED.get(flags.bundle, flags.bundle), flags.vae_tile
    tiling = Tiling() if tile is None else Tiling(size=tile, stride=tile * 3 // 4)
    pipe = pipeline.FramePack.open(path, dtype=flags.dtype, schedule=flags.schedule, tiling=tiling)
    sections = len(pipe.plan(flags.seconds, flags.sections, flags.fps))
    image = pipe.prepare_image(image, flags.height, flags.width)
    height, width = image.shape[:2]
    print(
        f"{sections} sections at {height} x {width} pixels, schedule {pipe.schedule}, {pipe.dtype}"
        f" on {jax.devices()[0].device_kind}"
    )
    pipe = pipe.with_weights(path)
    _clear(output)
    loaded = time.monotonic()
    with _Progress(sections, flags.steps) as progress:
        stream = pipe.stream(
            image,
            flags.prompt,
            negative_prompt=flags.negative_prompt,
            sections=sections,
            height=height,
            width=width,
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
    per_frame, peak = (sampled - loaded) / len(frames), peak_memory()
    record = {
        "flags": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
        "image_sha256": hashlib.sha256(flags.image.read_bytes()).hexdigest(),
        "weights": {k: role.source for k, role in bundle.read_manifest(path).roles.items()},
        "sections": sections,
        "frames": len(frames),
        "height": height,
        "width": width,
        "schedule": pipe.schedule,
        "order": pipe.order,
        "dtype": pipe.dtype,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": versions,
        "timings": {
            "load_seconds": round(loaded - began, 3),
            "sample_and_decode_seconds": round(sampled - loaded, 3),
            "write_seconds": round(time.monotonic() - sampled, 3),
            "seconds_per_frame": round(per_frame, 4),
            "peak_memory_bytes": peak,
        },
    }
    _write_whole(output / "run.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    print(
        f"{output / 'video.mp4'}: {len(frames)} frames, {len(frames) / flags.fps:.1f} s at"
        f" {flags.fps} fps\n{time.monotonic() - began:.1f} s in all, {per_frame:.3f} s a frame"
        f" with compilation, peak memory {peak / 2**30:.2f} GiB"
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
    return output


def _clear(output: Path) -> None:
    """Make the folder, or take an earlier run out of it, its record first."""
    (output / "latents").mkdir(parents=True, exist_ok=True)
    earlier = [output / name for name in ("run.json", "video.mp4", "preview.png")]
    for file in [*earlier, *(output / "latents").glob("section_*.npz")]:
        file.unlink(missing_ok=True)


def _save_latents(output: Path, number: int, positions: tuple[int, ...], z: np.ndarray) -> None:
    """`latents/section_000.npz` with `positions` (F,) and `latents` (F, H, W, C), normalised."""
    buffer = io.BytesIO()
    np.savez(buffer, positions=np.asarray(positions), latents=z)
    _write_whole(output / "latents" / f"section_{number:03d}.npz", buffer.getvalue())


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(data)
    os.replace(partial, path)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
