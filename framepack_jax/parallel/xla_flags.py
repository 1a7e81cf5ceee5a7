"""Flags of XLA and libtpu for each kind of machine: one table, for commands and dry runs alike.

Commands set them in the environment before JAX starts; dry runs give them to the compiler. A flag
that the user's own environment names is left alone. `FRAMEPACK_XLA_FLAGS=0` sets none.
"""

import importlib.util
import logging
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax

LOGGER = logging.getLogger(__name__)
# The variable that holds the flags of a platform.
VARIABLES = {"tpu": "LIBTPU_INIT_ARGS", "cuda": "XLA_FLAGS"}
SWITCH = "FRAMEPACK_XLA_FLAGS"


class Flag(NamedTuple):
    """A flag of a platform's compiler, and why it is set; some serve training only."""

    platform: str
    name: str
    value: str
    reason: str
    training: bool = False

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


# Flags of public recipes for v5p, v6e and TPU7x (MaxText, maxdiffusion) and of JAX's and NVIDIA's
# pages for GPUs. Their effect was seen in compiled programs (docs/measurements/memory.md), not yet
# measured on these machines.
FLAGS = (
    Flag("tpu", "xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000",
         "Gather weights whole: otherwise each gather becomes a ring of steps with pieces of a"
         " product, 22,000 exchanges a step and twice the time to compile.", training=True),
    Flag("tpu", "xla_tpu_enable_async_collective_fusion", "true",
         "Run collectives beside products, as parts of fusions."),
    Flag("tpu", "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true",
         "Do so for gathers of weights, most of the bytes of a step."),
    Flag("tpu", "xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true",
         "Do so for sums of gradients over data."),
    Flag("tpu", "xla_tpu_enable_async_collective_fusion_multiple_steps", "true",
         "Divide one collective over several products, none of which is long enough alone."),
    Flag("tpu", "xla_tpu_overlap_compute_collective_tc", "true",
         "Let collectives and products share the cores of a chip."),
    Flag("tpu", "xla_enable_async_all_gather", "true",
         "Start gathers before their result is needed."),
    Flag("tpu", "xla_enable_async_all_reduce", "true",
         "Start sums before their result is needed."),
    Flag("tpu", "xla_tpu_prefer_async_allgather_to_allreduce", "true",
         "Gather a weight by an all-gather, which can be asynchronous, also where an all-reduce of"
         " zeros and pieces was preferred."),
    Flag("tpu", "xla_tpu_enable_data_parallel_all_reduce_opt", "true",
         "Reduce gradients over slices while the gradient of other layers is computed."),
    Flag("tpu", "xla_tpu_data_parallel_opt_different_sized_ops", "true",
         "Do so for gradients of different sizes."),
    Flag("cuda", "xla_gpu_enable_latency_hiding_scheduler", "true",
         "Order operations so that collectives run beside products."),
    Flag("cuda", "xla_gpu_all_gather_combine_threshold_bytes", "134217728",
         "Gather small weights of a block at once: each exchange between GPUs costs microseconds."),
    Flag("cuda", "xla_gpu_reduce_scatter_combine_threshold_bytes", "134217728",
         "Reduce small gradients of a block at once."),
    Flag("cuda", "xla_gpu_all_reduce_combine_threshold_bytes", "134217728",
         "Reduce small gradients of a block over nodes at once."),
)  # fmt: skip


def missing(platform: str, training: bool = False) -> list[Flag]:
    """Return the flags of a platform that the user's environment does not name."""
    if os.environ.get(SWITCH) == "0":
        return []
    given = os.environ.get(VARIABLES[platform], "")
    named = {flag.lstrip("-").partition("=")[0] for flag in given.split()}
    wanted = (flag for flag in FLAGS if flag.platform == platform and flag.name not in named)
    return [flag for flag in wanted if training or not flag.training]


def compiler_options(device: jax.Device, training: bool = False) -> dict[str, str | bool]:
    """Return the flags for a device as options of `jax.stages.Lowered.compile`."""
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    if platform not in VARIABLES:
        return {}
    # Of options, unlike flags, XLA takes no bool as text.
    return {
        flag.name: True if flag.value == "true" and platform == "cuda" else flag.value
        for flag in missing(platform, training)
    }


def apply(training: bool = False) -> None:
    """Set the flags for the accelerators of this machine, and log them. Call it before JAX starts.

    libtpu ends the process on a flag that it does not know, so those are left out.
    """
    for platform in _platforms():
        flags = missing(platform, training)
        if platform == "tpu":
            flags = known(flags, _libtpu())
        if flags:
            variable = VARIABLES[platform]
            text = " ".join(map(str, flags))
            os.environ[variable] = f"{os.environ.get(variable, '')} {text}".strip()
            LOGGER.info(f"{variable} {text} ({SWITCH}=0 sets none)")


def known(flags: Iterable[Flag], library: Path) -> list[Flag]:
    """Return the flags whose names occur in a library."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return [flag for flag in flags if text.find(flag.name.encode()) >= 0]


def _platforms() -> list[str]:
    """Return the kinds of accelerators that JAX will use on this machine. A single GPU has nothing
    to exchange, and needs no flags."""
    allowed = (jax.config.values["jax_platforms"] or "tpu,cuda,gpu").split(",")
    found = []
    # JAX sets the variable, on import, if it sees no TPU.
    if "tpu" in allowed and _libtpu().exists() and os.environ.get("TPU_SKIP_MDS_QUERY") != "1":
        found.append("tpu")
    if {"cuda", "gpu"} & {*allowed} and _count_gpus() > 1:
        found.append("cuda")
    return found


def _count_gpus() -> int:
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").iterdir())


def _libtpu() -> Path:
    """Return the path of libtpu, which need not exist."""
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        return Path(path)
    spec = importlib.util.find_spec("libtpu")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    return folder / "libtpu.so"
