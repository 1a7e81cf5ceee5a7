"""Measure whole videos (encoders, sampling, VAE) on a GPU with a cap on its memory.

    python -m benchmarks.capped --folder DIR [--caps 24 12 6] [--weights int8] [--json FILE]

Writes a bundle of random weights with the released model's shapes (42 GB; in 8 bits 22 GB), unless
DIR has it already. Makes the same video with the whole device and then under each cap: one process
of `sample.py --offload auto` for each. Reads the times of the run record and the peak memory of the
process. `--scale toy` does the same with the bundle `random`; a CPU has no cap, so `--offload full`
stands for the caps there.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks import lengths
from framepack_jax import bundle
from framepack_jax.conversion import arrays
from framepack_jax.models import quantization, registry
from scripts import make_toy_bundle

ROOT = Path(__file__).parent.parent
GB = 1e9
# Of the device's memory, what JAX may take without a cap.
MAX_SHARE = 0.95
# Numbers that are drawn; every array repeats them.
DRAWN = 2**20 + 3
# What a process of its own says of the device: all bytes of it, or 0 where they are not counted.
DEVICE = """
import jax
stats = jax.local_devices()[0].memory_stats() or {}
print(2 * stats.get("bytes_limit", 0))
"""


@dataclasses.dataclass(frozen=True)
class CapBenchmark:
    """Measure videos under caps. Times are wall-clock seconds."""

    folder: Path
    """Where the bundle is, or is made."""
    caps: tuple[float, ...] = (24.0, 12.0, 6.0)
    """GB that JAX may take, one run each, after one with all of the device."""
    weights: Literal["bfloat16", "int8", "float8_e4m3fn"] = "bfloat16"
    """How the bundle keeps the kernels of blocks; another folder for each."""
    scale: Literal["full", "toy"] = "full"
    """Shapes of the released model, or small ones for a try."""
    sections: int = 6
    """Of a video; those at both ends are not like the others."""
    steps: int = 10
    """Denoising steps a section."""
    flags: tuple[str, ...] = ()
    """More flags of sample.py, without their dashes: height=64 width=80."""
    image: Path = ROOT / "examples" / "astronaut.jpg"
    """First frame."""
    json: Path | None = None
    """Keep the figures here."""

    def __post_init__(self) -> None:
        least = lengths.SETTLED + 2
        if self.sections < least:
            raise ValueError(f"--sections {self.sections}: expected at least {least}")


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Make the bundle, measure, print and return the figures of every run."""
    try:
        config = tyro.cli(CapBenchmark, prog="benchmarks.capped", args=args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if not (config.folder / bundle.MANIFEST).exists():
        make_bundle(config.folder, config.scale, config.weights)
    kept = bundle.read_manifest(config.folder).roles["transformer"].source["name"]
    if kept != _source(config.scale, config.weights):
        raise SystemExit(
            f"error: --folder {config.folder} has another bundle ({kept}); give each --weights and"
            " --scale a folder of its own"
        )
    total = device_bytes()
    made: list[dict[str, Any]] = []
    for cap in (None, *config.caps):
        made.append(measure(config, cap, total))
        print(json.dumps(made[-1]), flush=True)
        if config.json is not None:
            flags = {name: str(value) for name, value in dataclasses.asdict(config).items()}
            config.json.write_text(json.dumps({"config": flags, "runs": made}, indent=1))
    print(table(made))
    return made


def make_bundle(folder: Path, scale: str, weights: str) -> None:
    """Write a bundle of random weights in the shapes of the released model or of bundle `random`.

    Kernels are scaled by their inputs, so that all numbers stay finite; the tokenizers are those of
    the random bundle, with their end token.
    """
    known = bundle.read_manifest(bundle.resolve("random"))
    manifest = bundle.read_manifest(bundle.resolve("framepack_i2v")) if scale == "full" else known
    roles = {}
    for name, role in manifest.roles.items():
        spec, cfg = bundle.role_config(manifest, name)
        if name == "text_encoder_2":
            end = bundle.role_config(known, name)[1].eos_token_id
            cfg = dataclasses.replace(cfg, eos_token_id=end)
        leaves = registry.abstract_leaves(role.kind, cfg)
        arrays = itertools.chain.from_iterable(
            random_leaf(
                path, leaf.shape, weights if path.partition("/")[0] in spec.stacks else "bfloat16"
            )
            for path, leaf in leaves.items()
        )
        written = bundle.write_params(folder / name, arrays)
        print(f"{name}: {written.bytes / GB:.1f} GB of random weights", flush=True)
        source = {"name": _source(scale, weights), **written._asdict()}
        roles[name] = bundle.Role(role.kind, dataclasses.asdict(cfg), name, source)
    words = bundle.role_config(known, "text_encoder")[1].vocab_size, make_toy_bundle.CORPUS
    make_toy_bundle.llama_tokenizer(*words).save_pretrained(folder / "tokenizer")
    make_toy_bundle.clip_tokenizer(*words).save_pretrained(folder / "tokenizer_2")
    _, seeing = bundle.role_config(manifest, "image_encoder")
    make_toy_bundle.write_image_processor(seeing, folder / "image_processor")
    bundle.write_manifest(folder, dataclasses.replace(manifest, roles=roles))


def _source(scale: str, weights: str) -> str:
    return f"benchmarks/capped.py, random, {scale}, {weights}"


def random_leaf(path: str, shape: tuple[int, ...], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Return (path, bfloat16 array) of a leaf; a kernel is in `dtype`, with scales if quantized."""
    kind = path.rpartition("/")[2]
    if kind in ("bias", "scale"):
        yield path, np.full(shape, kind == "scale", "bfloat16")
        return
    inputs = math.prod(shape[:-1]) if len(shape) == 5 else shape[0]
    spread = inputs**-0.5 if kind == "kernel" else 0.02
    numbers = np.random.default_rng(zlib.crc32(path.encode())).normal(0, spread, DRAWN)
    numbers = numbers.astype("bfloat16")
    if kind == "kernel" and dtype in quantization.QUANTIZED:
        # As one channel; all have its scale.
        numbers, scale = arrays.quantize(path, numbers[:, None], dtype)
        yield path.removesuffix("kernel") + quantization.SCALE, np.resize(scale, shape[1:])
    yield path, np.resize(numbers, shape)


def device_bytes() -> int:
    """Return the bytes of the device's memory; 0 if JAX does not report them."""
    half = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    said = subprocess.run(
        [sys.executable, "-c", DEVICE], env=os.environ | half, check=True, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return int(said.stdout.split()[-1])


def measure(config: CapBenchmark, cap: float | None, total: int) -> dict[str, Any]:
    """Return the figures of a video under a cap in GB, or with the whole device.

    A run that fails gives the last line of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        offload = "none" if cap is None else "auto" if total else "full"
        command = [
            sys.executable, str(ROOT / "sample.py"), "--bundle", str(config.folder.absolute()),
            "--image", str(config.image), "--prompt", "the man smiles", "--overwrite",
            "--sections", str(config.sections), "--steps", str(config.steps),
            "--offload", offload, "--output", folder,
            *(f"--{flag}" for flag in config.flags),
        ]  # fmt: skip
        # Every run compiles for itself, as the first.
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        if total:
            share = MAX_SHARE if cap is None else min(MAX_SHARE, cap * GB / total)
            environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.4f}"}
        with tempfile.TemporaryFile("w+") as told:
            process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
            try:
                _, status, used = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                if process.returncode is None:
                    process.kill()
            told.seek(0)
            lines = told.read().replace("\r", "\n").splitlines()
        # Linux counts kilobytes.
        host = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        row = {"cap": cap, "offload": offload, "host_bytes": host}
        if process.returncode:
            return row | {"error": " ".join(lines[-3:])[-400:]}
        row["plan"] = next((line for line in lines if line.startswith("offload ")), "")
        timings = json.loads((Path(folder) / "run.json").read_text())["timings"]
    return row | figures(timings)


def figures(timings: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a run record: median seconds of its sections after the first two,
    seconds of loading and encoding, peak bytes of the device."""
    found = lengths.figures(timings)
    return {
        "section": found["section"],
        "loading": timings["load_seconds"],
        "encoding": timings["encode_seconds"],
        "device_bytes": found["memory"],
    }


def table(made: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each run, times relative to that without a cap."""
    lines = [
        "| JAX may take | a section | times resident | loading | encoding | device, at most"
        " | host, at most |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    resident = made[0].get("section")
    for row in made:
        cap = "all" if row["cap"] is None else f"{row['cap']:g} GB"
        if "error" in row:
            lines.append(
                f"| {cap} | failed: {row['error']} ||||| {row['host_bytes'] / GB:.1f} GB |"
            )
            continue
        times = f"{row['section'] / resident:.2f}" if resident else ""
        lines.append(
            f"| {cap} | {row['section']:.2f} s | {times} | {row['loading']:.1f} s"
            f" | {row['encoding']:.1f} s | {row['device_bytes'] / GB:.1f} GB"
            f" | {row['host_bytes'] / GB:.1f} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
