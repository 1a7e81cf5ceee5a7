"""Measure the stages of preparing a clip.

    python benchmarks/prepare.py [--scale toy] [--clips 8] [--json FILE]

Draws synthetic videos and times each stage of `framepack prepare` alone, on one thread: reading and
resampling, cutting and cropping with scores, text encoders, VAE, packing. Encoders and VAE are of
the bundle `random`, so only reading, scores and packing apply to real models; `--bundle` names
another bundle.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from framepack_jax import bundle, video
from framepack_jax.data import records, scenes
from framepack_jax.data.precompute import Encoder
from framepack_jax.data.records import Clip, Index, Record
from framepack_jax.data.shard_writer import write_shards
from framepack_jax.packing.buckets import BUCKETS_480P
from framepack_jax.toy import world

SIZES = {"full": ((480, 832), BUCKETS_480P, 5.0), "toy": ((64, 96), ((32, 48),), 1.5)}


@dataclasses.dataclass(frozen=True)
class PrepareBenchmark:
    """Time the stages of preparing."""

    scale: Literal["full", "toy"] = "full"
    """full: clips of 5 s at 480 x 832 pixels."""
    clips: int = 4
    """How many are timed, after one that compiles."""
    bundle: str = "random"
    """The bundle whose encoders are used."""
    encode: bool = True
    """Also time the encoders and the VAE."""
    json: Path | None = None
    """Keep the figures here."""


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return clips per second by stage."""
    flags = tyro.cli(PrepareBenchmark, args=args)
    size, buckets, seconds = SIZES[flags.scale]
    with tempfile.TemporaryDirectory() as name:
        files = [
            world.write(Path(name), number, 0, seconds, size) for number in range(flags.clips + 1)
        ]
        figures = measure(files, buckets, flags, Path(name))
    figures = {f"{stage}_clips_per_second": rate for stage, rate in figures.items()}
    figures |= {"seconds_of_clip": seconds, "height": size[0], "width": size[1]}
    for key, value in figures.items():
        print(f"{key:32} {value:,.3f}", flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def measure(
    files: list[Path], buckets: Any, flags: PrepareBenchmark, folder: Path
) -> dict[str, float]:
    """Return clips per second of each stage, without the first file."""
    rates = {"read": timed(lambda file: list(video.read_frames(file, 30)), files)[0]}
    settings = scenes.SceneSettings(buckets=buckets, cut=1.0)
    rates["read_cut_and_score"], cuts = timed(lambda f: next(scenes.clips(f, settings)), files)
    if not flags.encode:
        return rates
    path = bundle.resolve(flags.bundle)
    encoder = Encoder.load(path, bundle.read_manifest(path), pixels=False)
    captions = [file.with_suffix(".txt").read_text() for file in files]
    rates["text"], texts = timed(encoder.prompt, captions)
    rates["vae"], latents = timed(lambda cut: encoder.latents(cut.frames), cuts)
    image = np.zeros((729, 1152), np.float32)
    made = [
        Record(
            Clip(str(i), "a.mp4", 0.0, len(cut.frames), *cut.frames.shape[1:3], "a"),
            *text, image, z,
        )
        for i, (cut, text, z) in enumerate(zip(cuts, texts, latents, strict=True))
    ]  # fmt: skip
    rates["pack"], packed = timed(records.pack, made)
    began = time.monotonic()
    shards = write_shards(folder, (32, 48), ((data, 2) for data in packed))
    records.write_index(folder, Index("latents", tuple(shards), {}, 30.0, 4, 8, 16))
    rates["write"] = len(packed) / (time.monotonic() - began)
    return rates


def timed(stage: Callable[[Any], Any], items: list[Any]) -> tuple[float, list[Any]]:
    """Return (items per second without the first, results)."""
    results = [stage(items[0])]
    began = time.monotonic()
    results += [stage(item) for item in items[1:]]
    return (len(items) - 1) / (time.monotonic() - began), results


if __name__ == "__main__":
    main()
