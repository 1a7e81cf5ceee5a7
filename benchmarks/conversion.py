"""Measure the conversion of a 13B checkpoint: peak memory, and time relative to copying it.

    python benchmarks/conversion.py [--scale toy] [--folder DIR] [--json FILE]

Makes a random sharded checkpoint of the released transformer's widths in bfloat16, as deep as the
disk allows. Copies it shard by shard. Converts it with `framepack convert` in a process of its own.
Compares bundle and checkpoint bit for bit. Reads from the bundle the share of each of eight
devices. Deletes everything at the end.
"""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from framepack_jax import bundle
from framepack_jax.bundle import loader
from framepack_jax.conversion import engine, safetensors_files, transformer
from framepack_jax.models.hunyuan.config import TransformerConfig

# Bytes of disk that are left alone, and of a shard (the released model comes in three of 8.6 GB).
SPARE, SHARD = 10_000_000_000, 5_000_000_000
DEVICES = 8
FULL = TransformerConfig()
TOY = TransformerConfig(
    heads=2, head_dim=16, double_layers=2, single_layers=3, refiner_layers=1, text_dim=32,
    pooled_dim=16, image_dim=16, rope_axes=(4, 6, 6),
)  # fmt: skip
# What the child processes run; each prints one JSON object last.
PEAK = """
import json, pathlib, resource, sys
def peak():
    # Of this program alone: ru_maxrss also counts the parent that started it.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
"""
COMMAND = (
    PEAK
    + """
from framepack_jax.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps({"peak": peak()}))
"""
)
READ = (
    PEAK
    + """
from benchmarks import conversion
share = conversion.read_share(sys.argv[1], int(sys.argv[2]))
print(json.dumps({"peak": peak(), "share": share}))
"""
)
LOAD = (
    PEAK
    + """
from benchmarks import conversion
print(json.dumps({"bytes": conversion.load_on_mesh(sys.argv[1]), "peak": peak()}))
"""
)


@dataclasses.dataclass(frozen=True)
class ConversionBenchmark:
    """Measure a conversion.

    Times are wall-clock seconds until all is on the disk. CPU seconds, which other work on the
    machine changes less, stand beside them.
    """

    scale: Literal["full", "toy"] = "full"
    """full: the released widths, as deep as the disk allows, up to the released depth."""
    folder: Path | None = None
    """Where the checkpoint and the bundle are made; default: a temporary folder."""
    loading: bool = True
    """Also read what each of eight devices holds, and load a shallow model on all at once."""
    json: Path | None = None
    """Keep the figures here."""


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the figures."""
    flags = tyro.cli(ConversionBenchmark, args=args)
    with tempfile.TemporaryDirectory(dir=flags.folder, prefix="conversion-") as name:
        root = Path(name)
        cfg = TOY if flags.scale == "toy" else _deepest(shutil.disk_usage(root).free)
        figures = _say({"double_layers": cfg.double_layers, "single_layers": cfg.single_layers})
        figures |= _say(convert(root, cfg))
        if flags.loading:
            figures |= _say(read_shares(root / "bundle"))
            shutil.rmtree(root / "bundle")
            figures |= _say(load_shallow(root, cfg))
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def convert(root: Path, cfg: TransformerConfig) -> dict[str, Any]:
    """Make, copy, convert and verify a checkpoint of `cfg`. Keep only the bundle."""
    source = root / "checkpoint"
    size = make_checkpoint(source, cfg)
    copying, copying_processor = copy_seconds(source, root)
    shape = ["--rope-axes", ",".join(map(str, cfg.rope_axes))]
    args = ["convert", "--transformer", str(source), "--output", str(root / "bundle"), *shape]
    converting = _child(COMMAND, *args)
    verifying = _child(COMMAND, "verify", str(source), str(root / "bundle"))
    shutil.rmtree(source)
    return {
        "bytes": size, "copy_seconds": copying, "copy_processor": copying_processor,
        "convert_seconds": converting["seconds"], "convert_processor": converting["processor"],
        "times_copy": converting["seconds"] / copying, "convert_peak": converting["peak"],
        "verify_seconds": verifying["seconds"], "verify_peak": verifying["peak"],
    }  # fmt: skip


def make_checkpoint(folder: Path, cfg: TransformerConfig) -> int:
    """Write random bfloat16 tensors under diffusers' names, in shards. Return their bytes."""
    tensors = [
        safetensors_files.Tensor(name, shape, "bfloat16")
        for step in engine.steps_of(transformer.DIFFUSERS, cfg)
        for name, shape in zip(step.sources, step.source_shapes(), strict=True)
    ]
    folder.mkdir()
    shards = safetensors_files.shards(tensors, SHARD)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        safetensors_files.write_safetensors(folder / name, shard, map(_random, shard))
    pairs = zip(names, shards, strict=True)
    weight_map = {tensor.name: name for name, shard in pairs for tensor in shard}
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return sum(tensor.nbytes for tensor in tensors)


def _random(tensor: safetensors_files.Tensor) -> np.ndarray:
    """Return random bits with the highest exponent bit off, so that all numbers are finite."""
    random = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    bits = random.integers(0, 1 << 16, math.prod(tensor.shape), dtype=np.uint16)
    bits &= 0xBFFF
    return bits.view(tensor.dtype).reshape(tensor.shape)


def copy_seconds(source: Path, root: Path) -> tuple[float, float]:
    """Return (wall-clock, CPU) seconds of copying the files of a folder, each deleted before the
    next."""
    seconds, target, processor = 0.0, root / "copy", time.process_time()
    for file in sorted(source.iterdir()):
        began = time.monotonic()
        shutil.copyfile(file, target)
        with target.open("rb") as copied:
            os.fsync(copied.fileno())
        seconds += time.monotonic() - began
        target.unlink()
    return seconds, time.process_time() - processor


def read_shares(root: Path) -> dict[str, Any]:
    """Measure, for each of eight devices, a process that reads the share of this device."""
    shares = [_child(READ, str(root), str(device)) for device in range(DEVICES)]
    return {
        "share_bytes": [share["share"] for share in shares],
        "share_peaks": [share["peak"] for share in shares],
        "share_seconds": [share["seconds"] for share in shares],
    }


def read_share(root: str, device: int) -> int:
    """Read the slices of the transformer that one device of `fsdp=8` holds. Return their bytes.

    A leaf is read as orbax reads it: the slice of its file, and no more is kept.
    """
    import tensorstore

    manifest, mesh = bundle.read_manifest(root), _mesh()
    spec, cfg = bundle.role_config(manifest, "transformer")
    path, stored = loader._opened(root, manifest, "transformer")
    where = loader._layer_shardings(stored, loader._shardings(spec, cfg, mesh, stored), spec.stacks)
    kept = []
    for name, leaf in stored.items():
        folder = {"driver": "ocdbt", "base": f"file://{path}/state"}
        spec = {"driver": "zarr3", "kvstore": {**folder, "path": f"{name.replace('/', '.')}/"}}
        slices = where[name].devices_indices_map(leaf.shape)[mesh.devices.flat[device]]
        kept.append(tensorstore.open(spec, read=True).result()[slices].read().result().copy())
    return sum(array.nbytes for array in kept)


def load_shallow(root: Path, cfg: TransformerConfig) -> dict[str, Any]:
    """Measure loading a model of a few layers on a mesh of eight devices in one process."""
    shallow = dataclasses.replace(cfg, double_layers=2, single_layers=4)
    convert(root, shallow)
    loaded = _child(LOAD, str(root / "bundle"))
    return {"mesh_bytes": loaded["bytes"], "mesh_peak": loaded["peak"]}


def load_on_mesh(root: str) -> int:
    """Load the transformer of a bundle on `fsdp=8`. Return its bytes."""
    import jax

    params = bundle.load_params(root, bundle.read_manifest(root), "transformer", mesh=_mesh())
    return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(params)))


def _mesh() -> Any:
    from framepack_jax.parallel import sharding

    return sharding.make_mesh(fsdp=DEVICES)


def _deepest(free: int) -> TransformerConfig:
    """Return the released config with as many layers as fit on the disk."""
    for layers in range(FULL.double_layers, 0, -1):
        cfg = dataclasses.replace(FULL, double_layers=layers, single_layers=2 * layers)
        steps = engine.steps_of(transformer.DIFFUSERS, cfg)
        size = 2 * sum(math.prod(shape) for step in steps for shape in step.targets.values())
        if 2 * size + SHARD + SPARE <= free:
            return cfg
    raise SystemExit(f"{free / 1e9:.0f} GB of disk are too few for one layer; --scale toy is small")


def _child(program: str, *args: str) -> dict[str, Any]:
    """Run a Python program. Return its last line of JSON, and seconds until all is on the disk."""
    root = Path(__file__).parent.parent
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    began, processor = time.monotonic(), _processor_of_children()
    ended = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=root, env=environment, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    os.sync()
    return {
        "seconds": time.monotonic() - began,
        "processor": _processor_of_children() - processor,
        **json.loads(ended.stdout.splitlines()[-1]),
    }


def _processor_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _say(figures: dict[str, Any]) -> dict[str, Any]:
    for name, value in figures.items():
        print(f"{name:16} {value}", flush=True)
    return figures


if __name__ == "__main__":
    main()
