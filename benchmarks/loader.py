"""Measure how fast cached latents become batches, in samples and bytes per second.

    python benchmarks/loader.py [--scale toy] [--seconds-of-clip 5] [--json FILE]

Writes a dataset of random clips at 480 x 832 pixels with the released widths of text and image
states, reads batches of it for the released schedule (window 9), and deletes it. The lower bound is
set by memory: the bytes of a record are read once, the bytes of a sample written once.
"""

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from framepack_jax import packing
from framepack_jax.data import loader, records
from framepack_jax.data.config import DataConfig
from framepack_jax.data.records import BFLOAT16, Clip, Index, Record
from framepack_jax.data.shard_writer import write_shards

SIZES = {"full": ((480, 832), 4096, 768, 1152, 729), "toy": ((64, 80), 32, 24, 24, 9)}


@dataclasses.dataclass(frozen=True)
class LoaderBenchmark:
    """Measure the loader."""

    scale: Literal["full", "toy"] = "full"
    """full: 480 x 832 pixels and the released widths."""
    clips: int = 32
    """Clips of the dataset."""
    seconds_of_clip: float = 5.0
    """Their length."""
    prompt: int = 120
    """Tokens of their prompts."""
    batch: int = 8
    """Samples a batch."""
    threads: int = 4
    """Threads that read."""
    seconds: float = 10.0
    """How long is measured."""
    json: Path | None = None
    """Keep the figures here."""


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the figures."""
    flags = tyro.cli(LoaderBenchmark, args=args)
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), flags)
        figures = measure(Path(name), flags) | {"record_bytes": size}
    figures["copy_bytes_per_second"] = copy_rate()
    moved = size + figures["sample_bytes"]
    figures["floor_samples_per_second"] = figures["copy_bytes_per_second"] / moved
    for key, value in figures.items():
        print(f"{key:26} {value:,.3f}", flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def write(folder: Path, flags: LoaderBenchmark) -> int:
    """Write the dataset. Return the bytes of a record."""
    (height, width), text, pooled, image, tokens = SIZES[flags.scale]
    length = 1 + int(flags.seconds_of_clip * 30) // 4
    shapes = (
        (flags.prompt, text),
        (pooled,),
        (tokens, image),
        (length, height // 8, width // 8, 16),
    )
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 1 << 15, shape, np.uint16).view(BFLOAT16) for shape in shapes]

    def packed(number: int) -> bytes:
        frames = 1 + 4 * (length - 1)
        clip = Clip(f"{number:05d}", "a.mp4", 0.0, frames, height, width, "a caption")
        return records.pack(Record(clip, *arrays))

    made = ((packed(number), length) for number in range(flags.clips))
    shards = write_shards(folder, (height, width), made)
    empty = records.write_empty(folder, arrays[0][:3], arrays[1])
    records.write_index(folder, Index("latents", tuple(shards), {}, 30.0, 4, 8, 16, empty))
    return len(packed(0))


def measure(folder: Path, flags: LoaderBenchmark) -> dict[str, float]:
    """Read batches for some seconds, after one that opens the files."""
    cfg = DataConfig(path=str(folder), threads=flags.threads)
    schedule = packing.parse(packing.RELEASED_INVERTED)
    batches = loader.open_loader(cfg, schedule, flags.batch)
    first = next(batches)
    began, processor, count = time.monotonic(), time.process_time(), 0
    while time.monotonic() - began < flags.seconds:
        next(batches)
        count += flags.batch
    seconds, used = time.monotonic() - began, time.process_time() - processor
    return {
        "samples_per_second": count / seconds,
        "processor_seconds_per_sample": used / count,
        "sample_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(first)) / flags.batch,
        "load_average": os.getloadavg()[0],
    }


def copy_rate() -> float:
    """Return the bytes per second that one thread reads and writes together in copying."""
    source = np.ones(1 << 28, np.uint8)
    target = np.zeros_like(source)
    began = time.monotonic()
    for _ in range(4):
        target[:] = source
    return 2 * 4 * source.nbytes / (time.monotonic() - began)


if __name__ == "__main__":
    main()
