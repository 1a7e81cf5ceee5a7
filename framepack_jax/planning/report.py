"""Reports of dry runs: memory, FLOPs and communication of a step on each chip of a machine.

FLOPs are counted from the config. The roofline is computed from vendor figures. Only the compile
time is measured.
"""

import abc
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from framepack_jax.parallel import hardware
from framepack_jax.parallel.hardware import Machine
from framepack_jax.planning import hlo
from framepack_jax.planning.hlo import Traffic
from framepack_jax.planning.programs import GB, Program

# Fraction of a GPU that JAX allocates by default, and the largest that leaves enough to the driver.
GPU_SHARE, LARGE_GPU_SHARE = 0.75, 0.95


class Weights(NamedTuple):
    """Number of parameters of a network, and their bytes on a chip."""

    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class StepReport(abc.ABC):
    """Needs of a step on each chip of a machine; `flops` is the sum over all chips."""

    machine: Machine
    mesh: dict[str, int]
    flops: int

    @property
    @abc.abstractmethod
    def total(self) -> int:
        """Bytes on a chip while a step runs."""

    @property
    @abc.abstractmethod
    def collectives(self) -> dict[str, Traffic]:
        """Collectives of a step, by kind."""

    @property
    @abc.abstractmethod
    def kernels(self) -> dict[str, int]:
        """Number of runs of hand-written kernels in a step, by name."""

    @property
    def fits(self) -> bool:
        return self.total <= self.machine.chip.memory

    @property
    def roofline_seconds(self) -> float:
        """Time of a step at the vendor's peak, on all chips."""
        return self.flops / (self.machine.chip.flops * self.machine.count)

    @property
    def communication_seconds(self) -> float | None:
        """Model the time of a step's collectives: their bytes over the links of a chip, and bytes
        from other nodes or slices over its share of the network. None if a figure is missing."""
        return self._seconds(self.collectives.values())

    @property
    def step_seconds(self) -> float | None:
        """Model the time of a step: asynchronous collectives run beside the computation of the
        roofline, others after it."""
        links = self.communication_seconds
        exposed = self._seconds(traffic.exposed for traffic in self.collectives.values())
        if links is None or exposed is None:
            return None
        return max(self.roofline_seconds, links - exposed) + exposed

    def _seconds(self, collectives: Iterable[Traffic]) -> float | None:
        near, far = 0, 0
        for traffic in collectives:
            far += traffic.inter_node_bytes
            near += traffic.bytes - traffic.inter_node_bytes
        seconds = near / self.machine.links if near else 0.0
        if not far:
            return seconds
        network = self.machine.chip.network
        return None if network is None else seconds + far / network

    def heading(self) -> str:
        """Name the machine and its mesh."""
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        divided = f", divided over {mesh}" if mesh else ""
        memory = self.machine.chip.memory / GB
        parts = self.machine.chip.devices
        unit = "chips" if parts == 1 else f"devices ({parts} a chip)"
        return f"{self.machine}: {self.machine.count} {unit} of {memory:.1f} GB{divided}"

    def memory(self) -> str:
        """Compare the memory of a step with that of a chip."""
        capacity = self.machine.chip.memory / GB
        return f"in all           {self.total / GB:.2f} of {capacity:.1f} GB a chip"

    def compute(self, flops: str = "", rate: str = "") -> list[str]:
        """Return lines on the FLOPs and the roofline of a step, with a remark on each."""
        return [
            f"FLOPs a step     {self.flops:.3e}, counted from the config{flops}",
            f"roofline         {self.roofline_seconds:.3f} s a step at the vendor's"
            f" {self.machine.chip.flops / 1e12:.0f} TFLOP/s a chip{rate}",
        ]

    def exchange(self) -> list[str]:
        """Return lines on the attention kernels, the collectives, and their modelled time."""
        lines = [f"attention        {n} a step by {name}" for name, n in self.kernels.items()]
        for kind, traffic in self.collectives.items():
            far = traffic.inter_node_bytes / GB
            between = f", {far:.3f} of it {self._network_name()}" if far else ""
            lines.append(
                f"{kind:<16} {traffic.runs} a step, {traffic.overlapped} of them asynchronous,"
                f" {traffic.bytes / GB:.3f} GB a chip{between}"
            )
        return [*lines, *self._links()] if self.collectives else lines

    def _network_name(self) -> str:
        if self.machine.chip.platform == "tpu":
            return "from other slices, over the data centre network"
        return "from other nodes"

    def _links(self) -> list[str]:
        """Return a line on the modelled time of the collectives."""
        chip, links = self.machine.chip, self.communication_seconds
        if links is None:
            return [f"links            not modelled: no vendor joins nodes of {chip.name}"]
        network = ""
        if chip.network and any(t.inter_node_bytes for t in self.collectives.values()):
            where = "slices" if chip.platform == "tpu" else "nodes"
            network = f", {chip.network / GB:g} GB/s between {where}"
        return [
            f"links            {links:.3f} s a step, modelled: those bytes at"
            f" {self.machine.links / GB:.0f} GB/s{network}; {self._exposed():.3f} s of it not"
            " beside computing"
        ]

    def _exposed(self) -> float:
        links, step = self.communication_seconds, self.step_seconds
        return 0.0 if links is None or step is None else step - self.roofline_seconds

    def verdict(self, advice: str, remark: str = "") -> str:
        """Say that a step fits, with a remark, or how much memory is missing, with advice."""
        if self.fits:
            return f"fits{_large_share(self.machine.chip, self.total)}{remark}"
        over = (self.total - self.machine.chip.memory) / GB
        return f"does not fit, {over:.1f} GB too much; {advice}"


def flag_lines(flags: dict[str, Any]) -> list[str]:
    """Return a line with the flags of a compiler, as the environment takes them."""
    shown = " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())
    return [f"flags            {shown}"] if flags else []


def _large_share(chip: hardware.Chip, needed: int) -> str:
    """Name the environment variable that lets JAX allocate enough of a GPU, if needed."""
    share = needed / chip.memory
    if chip.platform != "cuda" or share <= GPU_SHARE:
        return ""
    setting = max(LARGE_GPU_SHARE, math.ceil(100 * share) / 100)
    return (
        f" with XLA_PYTHON_CLIENT_MEM_FRACTION={setting} set, for JAX takes {GPU_SHARE:.0%} of a"
        " GPU by default"
    )


@dataclasses.dataclass(frozen=True)
class Report(StepReport):
    """Needs of sampling on each chip of a machine.

    `programs` starts with the denoising step, or with the programs of an offloaded step. A section
    takes `steps` denoising steps and gives `frames` frames. `hosted` is the number of bytes of
    weights that a chip receives from host memory in every step.
    """

    networks: dict[str, Weights]
    programs: tuple[Program, ...]
    steps: int
    frames: int
    hosted: int = 0

    @property
    def step(self) -> Program:
        """The program of a step that is not offloaded."""
        return self.programs[0]

    @property
    def collectives(self) -> dict[str, Traffic]:
        """Collectives of a step, by kind."""
        total: dict[str, Traffic] = {}
        for program in self.programs:
            for kind, traffic in program.collectives.items():
                more = Traffic(*(program.runs * n for n in traffic))
                total[kind] = hlo.add(total.get(kind, Traffic()), more)
        return {kind: traffic for kind, traffic in total.items() if traffic.runs}

    @property
    def kernels(self) -> dict[str, int]:
        """Number of runs of hand-written kernels in a step, by name."""
        total = Counter[str]()
        for program in self.programs:
            total.update({name: program.runs * n for name, n in program.kernels.items()})
        return dict(+total)

    @property
    def resident(self) -> int:
        """Bytes of the weights of all networks on a chip."""
        return sum(network.bytes for network in self.networks.values())

    @property
    def largest(self) -> Program:
        return max(self.programs, key=lambda program: program.total(self.resident))

    @property
    def total(self) -> int:
        return self.largest.total(self.resident)

    def __str__(self) -> str:
        networks = ", ".join(f"{n} {w.bytes / GB:.2f}" for n, w in self.networks.items())
        lines = [
            self.heading(),
            f"parameters       {self.networks['transformer'].parameters:,} of the transformer",
            f"weights a chip   {self.resident / GB:.2f} GB: {networks}",
            *map(str, self.programs),
            f"{self.memory()}, in {self.largest.name} with {self._on_chip()}:"
            f" {self.verdict(self._advice(), self._remark())}",
            *self.compute(),
        ]
        if self.hosted:
            lines.append(f"host memory      {self.hosted / GB:.2f} GB of blocks a chip and step")
        lines += [*self.exchange(), *self._denoising(), *flag_lines(self.step.flags)]
        return "\n".join(lines)

    def _denoising(self) -> list[str]:
        """Return a line on the modelled time of denoising."""
        step = self.step_seconds
        if not self.collectives or step is None:
            return []
        return [
            f"denoising        {step:.3f} s a step, {step * self.steps:.1f} s a section of"
            f" {self.steps} steps, {step * self.steps / self.frames:.3f} s a frame, modelled:"
            " roofline and links",
        ]

    def _on_chip(self) -> str:
        return "the weights that stay and two blocks" if self.hosted else "all weights"

    def _remark(self) -> str:
        decoded = any(not program.runs for program in self.programs)
        return "" if decoded else "; decoding was not compiled"

    def _advice(self) -> str:
        if self.resident <= self.machine.chip.memory:
            return self.largest.advice
        return (
            "the weights alone are more; give --offload full, or divide them over"
            f" {self._more_chips()}"
        )

    def _more_chips(self) -> str:
        """Name a mesh that divides the weights enough, or a machine with more chips."""
        chip, count = self.machine.chip, self.machine.count
        whole = self.resident * self.mesh.get("fsdp", 1) * self.mesh.get("tensor", 1)
        # Weights divide by powers of two only (`sharding.default_sizes`).
        fsdp = count & -count
        if whole <= fsdp * chip.memory:
            rest = f",context={count // fsdp}" if count > fsdp else ""
            return f"more chips: --mesh fsdp={fsdp}{rest}"
        least = max(4, count + 1, math.ceil(whole / chip.memory))
        chips = 1 << (least - 1).bit_length()
        return f"a machine of more chips, as {hardware.parse(f'{chip.name}-{chips * chip.cores}')}"
