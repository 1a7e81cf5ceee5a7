"""Chips and machines by name, and their compilers, which run without them.

XLA compiles for a TPU pod or a GPU node on any host, and reports the memory that the machine would
need. The compilers come with the extras `tpu` and `cuda13`.

    v5e:4x4  v5litepod-16  v5p:2x4x4  v5p-64  v6e:2x2  v6e-8  h100:8  h200:1  rtx4090:1  h100:64

TPUs are named by topology, or as in the cloud by chips, on v5p by cores (two a chip). GPUs are
named by their number; more than eight form nodes of eight.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from framepack_jax.utils.messages import first_line

GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    `memory` is what a program can allocate, in bytes. Vendor figures: dense bfloat16 FLOP/s,
    `bandwidth` of the memory and `links` to other chips in bytes/s, all links together in one
    direction. `network` is a GPU's share of its node's network, None if no vendor builds such
    nodes. `target` are the fields of XLA's GPU target config, `dims` the axes of a TPU's topology.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    network: float | None = None
    dims: int = 0
    cores: int = 1
    target: tuple[tuple[str, Any], ...] = ()

    @property
    def platform(self) -> str:
        return "tpu" if self.dims else "cuda"

    @property
    def extra(self) -> str:
        """Return the extra of this package that installs its compiler."""
        return "tpu" if self.dims else "cuda13"


def _gpu(
    name: str, memory: float, tflops: float, links: float, network: float | None,
    capability: tuple[int, int], cores: int, fpus: int, shared: int, bandwidth: float, l2: int,
    clock: float, device_memory: int,
) -> Chip:  # fmt: skip
    target = {
        "core_count": cores, "fpus_per_core": fpus, "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024, "memory_bandwidth": int(bandwidth),
        "l2_cache_size": l2, "clock_rate_ghz": clock, "device_memory_size": device_memory,
        "capability": capability,
    }  # fmt: skip
    return Chip(
        name, memory, tflops * 1e12, bandwidth, links, network, target=tuple(target.items())
    )


CHIPS = {
    chip.name: chip
    for chip in (
        # Links of TPUs: inter-chip interconnect of a chip, from Google's pages of each version.
        Chip("v5e", 16e9, 197e12, 819e9, 200e9, dims=2),
        Chip("v5p", 95e9, 459e12, 2765e9, 600e9, dims=3, cores=2),
        Chip("v6e", 32e9, 918e12, 1640e9, 448e9, dims=2),
        # Links of GPUs: NVLink in one direction, PCIe 4.0 or 5.0 x16 where there is none. Network:
        # of NVIDIA's DGX nodes, a ConnectX port of 200 (A100) or 400 Gb/s InfiniBand for each GPU.
        _gpu("a100-80g", 84e9, 312, 300e9, 25e9, (8, 0), 108, 64, 167936, 2.03904e12, 41943040,
             1.41, 85100068864),
        _gpu("h100", 84e9, 989, 450e9, 50e9, (9, 0), 132, 128, 233472, 3.35232e12, 52428800, 1.98,
             84942979072),
        _gpu("h200", 150.1e9, 989, 450e9, 50e9, (9, 0), 132, 128, 233472, 4.8e12, 52428800, 1.98,
             151397597184),
        _gpu("b200", 190e9, 2250, 900e9, 50e9, (10, 0), 148, 128, 233472, 7.67232e12, 132644864,
             1.965, 191514411008),
        _gpu("rtx3060", 12.6e9, 51, 32e9, None, (8, 6), 28, 128, 102400, 3.6e11, 2359296, 1.78,
             12884901888),
        _gpu("rtx3090", 25.3e9, 71, 32e9, None, (8, 6), 82, 128, 102400, 9.36e11, 6291456, 1.70,
             25769803776),
        _gpu("rtx4090", 25.3e9, 165, 32e9, None, (8, 9), 128, 128, 102400, 1.008e12, 75497472,
             2.52, 25769803776),
        _gpu("rtx5090", 33.7e9, 210, 64e9, None, (12, 0), 170, 128, 102400, 1.792e12, 100663296,
             2.41, 34359738368),
    )
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "a100": "a100-80g"}
# Parts of `Device.device_kind` without spaces; the first match counts.
KINDS = {
    "a100": "a100-80g", "h100": "h100", "h200": "h200", "b200": "b200", "rtx3060": "rtx3060",
    "rtx3090": "rtx3090", "rtx4090": "rtx4090", "rtx5090": "rtx5090", "v5lite": "v5e",
    "v5e": "v5e", "v6lite": "v6e", "v6e": "v6e", "v5p": "v5p", "v5": "v5p",
}  # fmt: skip
# A side of a TPU slice closes to a ring: on v5e and v6e if it spans a whole pod, on v5p if the
# slice consists of whole cubes.
RING_2D, CUBE_3D = 16, 4
# TPUs of a slice on one host, as 2x2 or 2x2x1; a single chip has its own host.
CHIPS_PER_HOST = 4
# Shapes of the numbers of chips in cloud names.
SHAPES_2D = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips of one kind in a topology `shape`: (hosts, chips a host) for GPUs."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def links(self) -> float:
        """Return the bytes/s, in one direction, from a chip to others of its node or TPU slice.

        A TPU counts the links of a chip in a corner: a side of a slice is a line, and only in a
        large slice a ring (https://jax-ml.github.io/scaling-book/tpus).
        """
        if not self.chip.dims:
            return self.chip.links
        if self.chip.dims == 2:
            rings = [side == RING_2D for side in self.shape]
        else:
            rings = [all(side % CUBE_3D == 0 for side in self.shape)] * 3
        used = sum((1 + ring) * (side > 1) for side, ring in zip(self.shape, rings, strict=True))
        return self.chip.links * used / (2 * self.chip.dims)

    def __str__(self) -> str:
        if self.chip.platform == "cuda":
            return f"{self.chip.name}:{self.count}"
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Machine:
    """Parse the name of a machine. Raises ValueError with the known chips."""
    match = re.fullmatch(r"([a-z0-9-]+?)[:-](\d+(?:x\d+)*)", text.strip().lower())
    name = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or name not in CHIPS:
        raise ValueError(
            f"machine {text!r} is unknown; known chips are {', '.join(CHIPS)}, for example v5e:4x4,"
            " v5p-64, h100:8"
        )
    chip, sizes = CHIPS[name], tuple(int(size) for size in match[2].split("x"))
    if min(sizes) < 1:
        raise ValueError(f"machine {text!r}: expected at least one chip")
    if chip.platform == "cuda":
        return Machine(chip, _nodes(text, sizes))
    if len(sizes) == 1:
        sizes = _cloud_shape(text, chip, sizes[0])
    if len(sizes) != chip.dims:
        raise ValueError(
            f"machine {text!r}: the topology of {name} has {chip.dims} numbers, as in"
            f" {name}:{'x'.join(['4'] * chip.dims)}"
        )
    return Machine(chip, sizes)


def _nodes(text: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if len(sizes) != 1:
        raise ValueError(f"machine {text!r}: give GPUs by their number, as in h100:8")
    count = sizes[0]
    if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
        raise ValueError(f"machine {text!r}: more than {GPUS_PER_NODE} GPUs make whole nodes")
    nodes = max(1, count // GPUS_PER_NODE)
    return nodes, count // nodes


def _cloud_shape(text: str, chip: Chip, number: int) -> tuple[int, ...]:
    """Return the topology of a cloud name: nearest to a cube, each side a divisor of the next; a
    single host is 2x2x1."""
    chips = number // chip.cores
    if number % chip.cores or chips.bit_count() != 1:
        unit = "cores" if chip.cores > 1 else "chips"
        raise ValueError(f"machine {text!r}: {number} {unit} form no known topology")
    if chip.dims == 2:
        if chips not in SHAPES_2D:
            raise ValueError(f"machine {text!r}: known are {', '.join(map(str, SHAPES_2D))} chips")
        return SHAPES_2D[chips]
    if 1 < chips < CHIPS_PER_HOST:
        raise ValueError(
            f"machine {text!r}: {chips} chips do not form a slice of {chip.name}, whose hosts have"
            f" {CHIPS_PER_HOST} (2x2x1); take {chip.name}-{CHIPS_PER_HOST * chip.cores}"
        )
    if chips == CHIPS_PER_HOST:
        return 2, 2, 1
    power = chips.bit_length() - 1
    return tuple(sorted(2 ** ((power + i) // 3) for i in range(3)))


def chip_of(device: jax.Device) -> Chip | None:
    """Return the chip of a device, or None if it is not in the table."""
    kind = device.device_kind.lower().replace(" ", "")
    if device.platform not in ("gpu", "cuda", "tpu"):
        return None
    return next((CHIPS[name] for part, name in KINDS.items() if part in kind), None)


def quiet_libtpu() -> None:
    """Silence libtpu's warnings on a host without a TPU.

    libtpu asks for two environment variables that describe the TPU. They are set if JAX found no
    TPU on import.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def compile_devices(machine: Machine) -> list[jax.Device]:
    """Return devices to compile for that need not exist on this host.

    Raises ValueError, with the extra to install, if the compiler of the chip is missing or does not
    know the topology.
    """
    from jax.experimental import topologies

    chip = machine.chip
    module = "libtpu" if chip.platform == "tpu" else "jax_plugins.xla_cuda13"
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None and not (
        chip.platform == "cuda" and importlib.util.find_spec("jax_cuda12_plugin")
    ):
        raise ValueError(
            f"the compiler for {machine} is not installed:"
            f' pip install "framepack-jax[{chip.extra}]"'
        )
    try:
        if chip.platform == "tpu":
            # Otherwise it queries the metadata server of a cloud machine for minutes.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            quiet_libtpu()
            # Several processes may compile on one host.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            # The default is a full host.
            host = {"chips_per_host_bounds": [1, 1, 1]} if machine.count == 1 else {}
            return list(
                topologies.get_topology_desc(
                    topology_name=str(machine), platform="tpu", **host
                ).devices
            )
        shape = "x".join(map(str, (1, *machine.shape)))
        return list(
            topologies.get_topology_desc(
                str(machine), "cuda", target_config=_target(chip), topology=shape
            ).devices
        )
    except (ValueError, RuntimeError) as error:
        line = first_line(error)
        raise ValueError(f"the compiler is not available for {machine}: {line}") from error


def _target(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text."""
    fields = dict(chip.target)
    major, minor = fields.pop("capability")
    fields |= {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048, "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }  # fmt: skip
    lines = [f"{name}: {value}" for name, value in fields.items()]
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join(
        [
            "gpu_device_info {", *lines, "}", 'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            f'device_description_str: "{chip.name}"',
        ]
    )  # fmt: skip
