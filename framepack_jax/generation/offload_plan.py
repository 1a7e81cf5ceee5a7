"""Decide which weights stay on the device when the whole bundle does not fit.

Other weights wait elsewhere: the blocks of the transformer in host memory, each copied while the
one before computes (`offload.OffloadedLayers`); the encoders on
the disk, as they read a prompt once and are let go of. What programs need beside their weights is
estimated, by what compilers and an H100 said of the released model (docs/measurements/memory.md and
gpu.md). A CPU's memory is that of the process: there the estimate has all of it.
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
# Of what JAX may take: buffers leave gaps.
USABLE = 0.95
# Of what the host can give: the rest is for what reads, decodes and writes.
HOSTED = 0.85
# A step needs so many times its tokens (B, L, D) beside weights: 14 on an H100, more with a cache
# and between programs. Decoding so many times its widest frames: 5.3 by the compiler for an H200.
STEP_UNITS, DECODE_UNITS = 20, 5.5
# The same by the compiler for CPUs, which multiplies float32 alone; and what Python, libraries and
# compiled programs take of the process.
CPU_DECODE_UNITS, PROCESS = 13.5, 1.0 * GB
# Sides of the VAE's tiles where whole frames are too much.
TILES = Tiling(size=256, stride=192)
# Frames that are decoded at once, and the tokens of text and image.
DECODE_FRAMES, OTHER_TOKENS = 17, 1024


class OffloadPlan(NamedTuple):
    """Where weights lie. Encoders stay on the device if `encoders`; of the transformer's blocks so
    many `layers` do, None being all of them as one, and the next `hosted` wait in host memory, None
    being all others; what is left is read from the disk at every step. The VAE decodes by `tiling`.
    `why` is a line for people, or empty."""

    encoders: bool
    layers: int | None
    tiling: Tiling
    why: str
    hosted: int | None = None


class Work(NamedTuple):
    """What is made: sampled (height, width) in pixels, videos side by side, by a schedule; and how
    many frames of the longest clip are `encoded`."""

    canvas: tuple[int, int]
    batch: int
    schedule: packing.Schedule
    encoded: int = 1


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on a device: of the `encoders`, and what of them is there at once while they are read
    layer by layer (`reading`); of the `vae`; of the transformer's `blocks`, and of the rest of it
    (`base`); and beside all weights, of a `step`, of a `pixel` of a tile that is decoded, and of
    `encoding` pictures, which are never cut. Blocks that wait are in the memory of a host of so
    many `devices`. On a CPU, which has one memory for all, `process` is what the rest of the
    process takes, else 0."""

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
        """So many blocks stay, no encoder does; of the other blocks a step has two at a time."""
        two = sum(sorted(self.blocks[layers:])[-2:])
        stay = self.process + self.vae + self.base + sum(self.blocks[:layers])
        return stay + max(self.step + two, self.decode(tiling), self.reading, self.encoding)


def plan(
    path: epath.PathLike,
    mode: str,
    work: Work,
    *,
    dtype: str,
    tiling: Tiling,
    mesh: Mesh | None = None,
    limit: float | None = None,
    roles: Sequence[str] = bundle.ROLES,
) -> OffloadPlan:
    """Choose which weights stay on the device for an offload `mode`, one of MODES.

    "none": all stay. "full": as few as possible. "auto": what fits into `limit` bytes, by default
    those that JAX may take of the device; all if the device does not count them, as on a CPU.
    Frames are decoded in tiles only if nothing else helps, as seams may be visible. Networks other
    than the `roles` need nothing. Raises ValueError for another mode, BundleError.
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
    """Bytes of a host's memory for blocks that wait, where `others` are taken from it as well."""
    return math.inf if limit is None else min(HOSTED * limit, limit - others)


def need(
    path: epath.PathLike,
    work: Work,
    *,
    dtype: str,
    mesh: Mesh | None = None,
    roles: Sequence[str] = bundle.ROLES,
) -> Need:
    """What these networks of a bundle need for some work. Raises BundleError, ValueError where a
    mesh does not divide them."""
    manifest = bundle.read_manifest(path)
    computed = jnp.dtype(dtype)

    def size(role: str, mesh: Mesh | None = mesh) -> bundle.DeviceBytes:
        if role not in roles:
            return bundle.DeviceBytes(0, (), 0)
        kept = jnp.dtype("float32") if role == "vae" else computed
        return bundle.device_bytes(path, manifest, role, dtype=kept, mesh=mesh)

    on_cpu = jax.default_backend() == "cpu"

    def opened(role: str) -> int:
        """Blocks that are divided are put together, and those of another type than is multiplied
        are converted, as they run."""
        whole = size(role, None)
        multiplied = jnp.dtype("float32") if on_cpu else computed
        converted = whole.quantized or multiplied != computed
        return whole.largest * multiplied.itemsize if mesh or converted else 0

    network, decoder = size("transformer"), bundle.role_config(manifest, "vae")[1]
    names = [role for role in bundle.ROLES if role not in ("transformer", "vae")]
    encoders = [size(role) for role in names]
    bases = sum(each.base for each in encoders)
    # What a host holds to read weights from the disk is not given back at once.
    beside = max(map(opened, names)) + min(loader.LOAD_CHUNK, bases) if on_cpu else 0
    devices = 1 if mesh is None else mesh.size
    units = CPU_DECODE_UNITS if on_cpu else DECODE_UNITS
    # Of one frame, decoded or encoded.
    pixel = units * decoder.channels[0] * 4 / devices
    encoded = min(work.encoded, DECODE_FRAMES)
    return Need(
        encoders=sum(each.base + sum(each.layers) for each in encoders),
        reading=bases + max(sum(sorted(each.layers)[-2:]) for each in encoders) + beside,
        vae=size("vae").base,
        base=network.base,
        blocks=network.layers,
        step=math.ceil(_step_bytes(manifest, work, computed) / devices) + opened("transformer"),
        pixel=DECODE_FRAMES * pixel,
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
