"""Chips and machines by name, and their compilers, which run without them.

XLA compiles for a TPU pod or a GPU node on any host, and reports the memory that the machine would
need. The compilers come with the extras `tpu` and `cuda13`.

    v5e:4x4  v5litepod-16  v5p:2x4x4  v5p-64  v6e-8  tpu7x-8  2*v5e-256
    h100:8  h200:1  rtx4090:1  h100:64  b200:8  gb200:72

TPUs are named by topology, or as in the cloud by chips, on v5p and TPU7x by cores (two a chip);
2*v5e-256 are two slices that the data centre network joins. GPUs are named by their number; more
than eight form nodes of eight. GB200 form hosts of four and NVLink domains of 72.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from framepack_jax.parallel.chips import ALIASES, CHIPS, Chip, chip_of, target_config
from framepack_jax.parallel.device_grid import domains
from framepack_jax.utils.messages import first_line

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
    """Chips of one kind.

    `shape` is the topology of a TPU slice, or (hosts, GPUs a host). `slices` TPU slices are joined
    by the data centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        """Return the number of devices."""
        return math.prod(self.shape) * self.chip.devices * self.slices

    @property
    def domains(self) -> int:
        """Return the number of TPU slices, or of groups of GPUs that NVLink joins."""
        return self.slices if self.chip.dims else -(-self.count // self.chip.domain)

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
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.topology}"

    @property
    def topology(self) -> str:
        """Return the name of a TPU slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(text: str) -> Machine:
    """Parse the name of a machine. Raises ValueError with the known chips."""
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9-]+?)[:-](\d+(?:x\d+)*)", text.strip().lower())
    name = ALIASES.get(match[2], match[2]) if match else ""
    if match is None or name not in CHIPS:
        raise ValueError(
            f"machine {text!r} is unknown; known chips are {', '.join(CHIPS)}, for example v5e:4x4,"
            " v5p-64, 2*v5e-256, h100:8"
        )
    chip, sizes = CHIPS[name], tuple(int(size) for size in match[3].split("x"))
    slices = int(match[1] or 1)
    if min(slices, *sizes) < 1:
        raise ValueError(f"machine {text!r}: expected at least one chip")
    if chip.platform == "cuda":
        if match[1]:
            raise ValueError(
                f"machine {text!r}: only TPUs have slices; give the number of all GPUs, as in"
                f" {name}:{slices * sizes[0]}"
            )
        return Machine(chip, _nodes(text, chip, sizes))
    if len(sizes) == 1:
        sizes = _cloud_shape(text, chip, sizes[0])
    if len(sizes) != chip.dims:
        raise ValueError(
            f"machine {text!r}: the topology of {name} has {chip.dims} numbers, as in"
            f" {name}:{'x'.join(['4'] * chip.dims)}"
        )
    return Machine(chip, sizes, slices)


def _nodes(text: str, chip: Chip, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if len(sizes) != 1:
        raise ValueError(f"machine {text!r}: give GPUs by their number, as in h100:8")
    count = sizes[0]
    for unit, name in ((chip.host, "nodes"), (chip.domain, "NVLink domains")):
        if count > unit and count % unit:
            raise ValueError(f"machine {text!r}: more than {unit} GPUs make whole {name} of {unit}")
    hosts = max(1, count // chip.host)
    return hosts, count // hosts


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


def machine_of(devices: Sequence[jax.Device]) -> Machine:
    """Return the machine that these devices make up. Raises ValueError if it is not known."""
    chip = chip_of(devices[0])
    if chip is None:
        raise ValueError(
            f"{devices[0].device_kind} is not among the known chips, {', '.join(CHIPS)}"
        )
    if chip.platform == "cuda":
        hosts = max(1, len(devices) // chip.host)
        return Machine(chip, (hosts, len(devices) // hosts))
    slices = len(domains(devices))
    places = [device.coords for device in devices]  # type: ignore[attr-defined]  # a TPU
    sides = (len({place[axis] for place in places}) for axis in range(chip.dims))
    return Machine(chip, tuple(sides), slices)


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
        topology = _tpu_topology if chip.platform == "tpu" else _gpu_topology
        return list(topology(machine).devices)
    except (ValueError, RuntimeError) as error:
        line = first_line(error)
        raise ValueError(f"the compiler is not available for {machine}: {line}") from error


def _tpu_topology(machine: Machine) -> topologies.TopologyDescription:
    # Otherwise it queries the metadata server of a cloud machine for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    quiet_libtpu()
    # Several processes may compile on one host.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if math.prod(machine.shape) == 1:
        # The default is a full host.
        options["chips_per_host_bounds"] = [1, 1, 1]
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    return topologies.get_topology_desc(machine.topology, "tpu", **options)


def _gpu_topology(machine: Machine) -> topologies.TopologyDescription:
    hosts, each = machine.shape
    shape = f"{machine.domains}x{hosts // machine.domains}x{each}"
    return topologies.get_topology_desc(
        str(machine), "cuda", target_config=target_config(machine.chip), topology=shape
    )
