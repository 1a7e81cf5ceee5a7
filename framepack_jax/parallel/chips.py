"""The table of chips: memory, vendor figures, and what their compilers need to know."""

import dataclasses
import re
from typing import Any

import jax

GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as JAX sees it: a device.

    `memory` is what a program can allocate, in bytes. Vendor figures: dense bfloat16 FLOP/s,
    `bandwidth` of the memory and `links` to other chips in bytes/s, all links together in one
    direction. `network` is its share of the network between nodes or TPU slices, None if no vendor
    joins them. `dims` are the axes of a TPU's topology, `cores` the cores of a chip, which cloud
    names count, and `devices` the devices that JAX makes of a chip. Of GPUs, `host` have one host,
    `domain` are joined by NVLink, and `target` are the fields of XLA's GPU target config.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    network: float | None = None
    dims: int = 0
    cores: int = 1
    devices: int = 1
    host: int = GPUS_PER_NODE
    domain: int = GPUS_PER_NODE
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
    clock: float, device_memory: int, host: int = GPUS_PER_NODE, domain: int = GPUS_PER_NODE,
) -> Chip:  # fmt: skip
    target = {
        "core_count": cores, "fpus_per_core": fpus, "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024, "memory_bandwidth": int(bandwidth),
        "l2_cache_size": l2, "clock_rate_ghz": clock, "device_memory_size": device_memory,
        "capability": capability,
    }  # fmt: skip
    return Chip(
        name, memory, tflops * 1e12, bandwidth, links, network, host=host, domain=domain,
        target=tuple(target.items()),
    )  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        # Links of TPUs: inter-chip interconnect of a chip; network: data centre network of a chip.
        # From Google's pages of each version. Of TPU7x each device is a half of a chip.
        Chip("v5e", 16e9, 197e12, 819e9, 200e9, 25e9 / 8, dims=2),
        Chip("v5p", 95e9, 459e12, 2765e9, 600e9, 50e9 / 8, dims=3, cores=2),
        Chip("v6e", 32e9, 918e12, 1640e9, 448e9, 100e9 / 8, dims=2),
        Chip("tpu7x", 96e9, 2307e12 / 2, 7380e9 / 2, 1200e9 / 2, 100e9 / 8 / 2, dims=3, cores=2,
             devices=2),
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
        # An NVL72: hosts of four GPUs, 72 GPUs joined by NVLink.
        _gpu("gb200", 186e9, 2500, 900e9, 50e9, (10, 0), 152, 128, 233472, 8e12, 132644864,
             1.965, 199715979264, host=4, domain=72),
        _gpu("l4", 24.1e9, 121, 32e9, None, (8, 9), 58, 128, 102400, 3e11, 50331648, 2.04,
             24152899584),
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
# Regular expressions for `Device.device_kind` without spaces; the first match counts.
KINDS = {
    "gb200": "gb200", "a100": "a100-80g", "h100": "h100", "h200": "h200", "b200": "b200",
    "l4(?!0)": "l4",
    "rtx3060": "rtx3060", "rtx3090": "rtx3090", "rtx4090": "rtx4090", "rtx5090": "rtx5090",
    "tpu7x": "tpu7x", "v5lite": "v5e", "v5e": "v5e", "v6lite": "v6e", "v6e": "v6e", "v5p": "v5p",
    "v5": "v5p",
}  # fmt: skip


def chip_of(device: jax.Device) -> Chip | None:
    """Return the chip of a device, or None if it is not in the table."""
    kind = device.device_kind.lower().replace(" ", "")
    if device.platform not in ("gpu", "cuda", "tpu"):
        return None
    return next((CHIPS[name] for part, name in KINDS.items() if re.search(part, kind)), None)


def target_config(chip: Chip) -> str:
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
