"""Decide which weights stay on the device when the whole bundle does not fit.

Blocks of the transformer wait in host memory; each is copied while the block before it computes
(`offload.OffloadedLayers`). Encoders stay on the disk: they encode a prompt once and are freed. The
memory of programs beside their weights is estimated from compilers and an H100 with the released
model (docs/measurements/memory.md and gpu.md). On a CPU the estimate is for the whole process.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from framepack_jax import bundle, packing
from framepack_jax.bundle import loader
from framepack_jax.models.tiling import Tiling

MODES = ("auto", "none", "full")
GB = 1e9
# Share of the bytes that JAX may use: buffers leave gaps.
USABLE = 0.95
# Share of free host memory for blocks: the rest is for reading, decoding and writing.
HOSTED = 0.85
# Memory beside weights. A step, in units of its tokens (B, L, D): 14 on an H100, more with a cache
# and between programs. Decoding, in units of its widest frames: 5.3 by the compiler for an H200.
STEP_UNITS, DECODE_UNITS = 20, 5.5
# Decoding by the compiler for CPUs, which multiply float32 only; and the memory that Python,
# libraries and compiled programs take in the process.
CPU_DECODE_UNITS, PROCESS = 13.5, 1.0 * GB
# Tiles of the VAE if whole frames do not fit.
TILES = Tiling(size=256, stride=192)
# Frames decoded at once; tokens of text and image.
DECODE_FRAMES, OTHER_TOKENS = 17, 1024
# Frames that every convolution of a VAE with exact chunks keeps: with them, a decoder of Wan takes
# 11.7 units on a CPU by the compiler.
CARRIED = 2


class OffloadPlan(NamedTuple):
    """Decision where weights lie.

    Args:
        encoders: True if encoders stay on the device.
        layers: Number of transformer blocks that stay on the device; None for all, in one array.
        tiling: Tiling of the VAE when it decodes.
        why: Reason in one line, or empty.
        hosted: Number of the next blocks that wait in host memory, None for all others. The rest
            is read from the disk at every step.
    """

    encoders: bool
    layers: int | None
    tiling: Tiling
    why: str
    hosted: int | None = None


class Work(NamedTuple):
    """Work to fit into memory: a `batch` of videos of `canvas` (height, width) in pixels.

    `encoded` is the number of frames of the longest clip that the VAE encodes.
    """

    canvas: tuple[int, int]
    batch: int
    schedule: packing.Schedule
    encoded: int = 1


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that networks and their programs need on a device.

    Args:
        encoders: Weights of the encoders.
        reading: Largest part of the encoders on the device if their layers are read one by one.
        vae: Weights of the VAE.
        base: Weights of the transformer without its blocks.
        blocks: Weights of each block of the transformer.
        step: Denoising step, beside weights.
        pixel: Decoding, for each pixel of a tile.
        canvas: Sampled (height, width) in pixels.
        devices: Devices of the host whose memory holds waiting blocks.
        process: Rest of the process on a CPU, which has one memory for all; else 0.
        encoding: Encoding of whole frames.
    """

    encoders: int
    reading: int
    vae: int
    base: int
    blocks: tuple[int, ...]
    step: int
    pixel: float
    canvas: tuple[int, int]
    devices: int = 1
    process: int = 0
    encoding: int = 0

    def decode(self, tiling: Tiling) -> int:
        """Return the bytes of decoding, beside weights."""
        sides = [side if tiling.size is None else min(side, tiling.size) for side in self.canvas]
        return int(self.pixel * math.prod(sides))

    def everything(self, tiling: Tiling) -> int:
        """Return the bytes if all networks stay on the device."""
        weights = self.encoders + self.vae + self.base + sum(self.blocks)
        return self.process + weights + max(self.step, self.decode(tiling), self.encoding)

    def streamed(self, layers: int, tiling: Tiling) -> int:
        """Return the bytes if `layers` blocks and no encoder stay; a step has two more."""
        two = sum(sorted(self.blocks[layers:])[-2:])
        stay = self.process + self.vae + self.base + sum(self.blocks[:layers])
        return stay + max(self.step + two, self.decode(tiling), self.reading, self.encoding)


def choose(
    path: epath.PathLike,
    mode: str,
    work: Work,
    *,
    dtype: str,
    tiling: Tiling,
    mesh: Mesh | None = None,
    limit: float | None = None,
    roles: Sequence[str] | None = None,
) -> OffloadPlan:
    """Choose which weights stay on the device for an offload `mode`, one of MODES.

    "none": all stay. "full": as few as possible. "auto": as many as fit into `limit` bytes, by
    default the bytes that JAX may use; all if the device does not report them, as on a CPU. Frames
    are decoded in tiles only as a last resort, as seams may be visible. Only networks of `roles`
    are counted. Raises ValueError for another mode, BundleError.
    """
    if mode not in MODES:
        raise ValueError(f"offload {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "none":
        return OffloadPlan(True, None, tiling, "offload none: all networks stay on the device")
    small = TILES if tiling.size is None else tiling
    limit = limit_of_device() if limit is None else limit
    if mode == "full":
        needed = need(path, work, dtype=dtype, mesh=mesh, roles=roles)
        return _streamed(needed, 0, small, "offload full")
    if limit is None:
        return OffloadPlan(True, None, tiling, "")
    needed = need(path, work, dtype=dtype, mesh=mesh, roles=roles)
    has = f"{needed.everything(tiling) / GB:.1f} of {limit / GB:.1f} GB"
    if needed.everything(tiling) <= USABLE * limit:
        why = f"offload auto: all networks stay on the device, {has}"
        return OffloadPlan(True, None, tiling, why)
    choices = [(n, t) for t in (tiling, small) for n in range(len(needed.blocks), -1, -1)]
    fitting = [choice for choice in choices if needed.streamed(*choice) <= USABLE * limit]
    why = f"offload auto, as all would be {has}"
    if not fitting:
        why += ", and the least is more than there is"
    return _streamed(needed, *(fitting or choices[-1:])[0], why)


def limit_of_device() -> int | None:
    """Return the bytes that JAX may use of the device; None if the device does not report them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def limit_of_host() -> int | None:
    """Return the bytes of memory that this host still has for a process; None if unknown."""
    free = re.search(r"MemAvailable: +(\d+) kB", _read("/proc/meminfo"))
    group = re.fullmatch(r"(\d+)\n", _read("/sys/fs/cgroup/memory.max"))
    limits = [1024 * int(free[1])] if free else []
    return min(limits + ([int(group[1])] if group else []), default=None)


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def _streamed(needed: Need, layers: int, tiling: Tiling, why: str) -> OffloadPlan:
    count = len(needed.blocks)
    parts = []
    if count:
        parts.append(f"{layers} of {count} blocks stay on the device, encoders do not")
    hosted, taken, total = None, 0, needed.streamed(layers, tiling)
    if layers < count:
        sizes = [needed.devices * size for size in needed.blocks[layers:]]
        limit = limit_of_host()
        sums = list(itertools.accumulate(sizes))
        fitting = sum(s <= _room(limit, total if needed.process else 0) for s in sums)
        taken = sums[fitting - 1] if fitting else 0
        if fitting:
            parts.append(f"{fitting} wait in {taken / GB:.3g} GB of the host's memory")
        if fitting < len(sizes):
            assert limit is not None, "a host of unknown memory takes all blocks"
            hosted = fitting
            parts.append(
                f"{len(sizes) - fitting} are read from the disk at every step, as the host has"
                f" {limit / GB:.3g} GB (a bundle converted with --dtype int8 needs half of that)"
            )
    if tiling.size is not None and tiling.size < max(needed.canvas):
        parts.append(f"the VAE decodes tiles of {tiling.size} pixels")
    if needed.process and taken:
        parts.append(f"{(total + taken) / GB:.3g} GB are needed in all, with those blocks")
    else:
        parts.append(f"{total / GB:.3g} GB are needed")
    why = f"{why}: {'; '.join(parts)}"
    return OffloadPlan(False, None if layers == count else layers, tiling, why, hosted)


def _room(limit: float | None, others: int) -> float:
    """Return the bytes of host memory for waiting blocks if `others` are taken from it as well."""
    return math.inf if limit is None else min(HOSTED * limit, limit - others)


def need(
    path: epath.PathLike,
    work: Work,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    roles: Sequence[str] | None = None,
) -> Need:
    """Return the bytes that networks of a bundle need for some work.

    Raises BundleError, and ValueError if a mesh does not divide the weights.
    """
    manifest = bundle.read_manifest(path)
    computed = jnp.dtype(dtype)

    def size(role: str, mesh: Mesh | None = mesh) -> bundle.DeviceBytes:
        if roles is not None and role not in roles:
            return bundle.DeviceBytes(0, (), 0)
        kept = jnp.dtype("float32") if role == "vae" else computed
        return bundle.device_bytes(path, manifest, role, dtype=kept, mesh=mesh)

    on_cpu = jax.default_backend() == "cpu"

    def opened(role: str) -> int:
        """Return the bytes of the largest block as it runs: gathered and converted, if needed."""
        whole = size(role, None)
        multiplied = jnp.dtype("float32") if on_cpu else computed
        converted = whole.quantized or multiplied != computed
        return whole.largest * multiplied.itemsize if mesh or converted else 0

    network, (vae, decoder) = size("transformer"), bundle.vae_config(manifest)
    names = bundle.encoder_roles(manifest)
    encoders = [size(role) for role in names]
    bases = sum(each.base for each in encoders)
    # A host does not free at once the memory in which it reads weights from the disk.
    beside = max(map(opened, names)) + min(loader.LOAD_CHUNK, bases) if on_cpu else 0
    devices = 1 if mesh is None else mesh.size
    units = CPU_DECODE_UNITS if on_cpu else DECODE_UNITS
    # Bytes of a pixel of one frame, decoded or encoded.
    pixel = units * decoder.channels[0] * 4 / devices
    # Frames decoded or encoded at once, or those of a chunk and those carried to the next.
    frames = decoder.time_compression + CARRIED if vae.exact_chunks else DECODE_FRAMES
    encoded = min(work.encoded, frames)
    return Need(
        encoders=sum(each.base + sum(each.layers) for each in encoders),
        reading=bases + max(sum(sorted(each.layers)[-2:]) for each in encoders) + beside,
        vae=size("vae").base,
        base=network.base,
        blocks=network.layers,
        step=math.ceil(_step_bytes(manifest, work, computed) / devices) + opened("transformer"),
        pixel=frames * pixel,
        canvas=work.canvas,
        devices=jax.local_device_count() if mesh else 1,
        process=int(PROCESS) if on_cpu else 0,
        encoding=int(encoded * pixel * math.prod(work.canvas)),
    )


def _step_bytes(manifest: bundle.Manifest, work: Work, dtype: jnp.dtype) -> int:
    """Return the bytes that a denoising step needs beside weights, on one device."""
    _, cfg = bundle.role_config(manifest, "transformer")
    compression = bundle.role_config(manifest, "vae")[1].space_compression
    rows, columns = (side // compression for side in work.canvas)
    groups = packing.context_tokens(work.schedule, rows, columns)
    tokens = sum(n for _, n in groups) + packing.target_tokens(work.schedule, rows, columns)
    tokens = work.batch * (tokens + OTHER_TOKENS)
    return STEP_UNITS * tokens * cfg.width * dtype.itemsize
