"""Count collectives and attention kernels in the text of a compiled program (XLA's HLO)."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Names of computations of the TPU's compiler: an all-reduce of which each device keeps a part, and
# parts of a collective together with other operations.
SCATTERED, FUSED = "all-reduce-scatter", "async_collective_fusion"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Traffic(NamedTuple):
    """Collectives of one kind.

    `runs` is their number, `bytes` what a chip receives, and `inter_node_bytes` the part of it that
    comes from other nodes or TPU slices. `overlapped` of the runs are asynchronous, that is, the
    chip may compute while they run; `overlapped_bytes` and `overlapped_inter_node_bytes` are their
    part of the bytes.
    """

    runs: int = 0
    bytes: int = 0
    inter_node_bytes: int = 0
    overlapped: int = 0
    overlapped_bytes: int = 0
    overlapped_inter_node_bytes: int = 0

    @property
    def exposed(self) -> "Traffic":
        """Return the collectives that are not asynchronous."""
        return Traffic(
            self.runs - self.overlapped,
            self.bytes - self.overlapped_bytes,
            self.inter_node_bytes - self.overlapped_inter_node_bytes,
        )


class Collective(NamedTuple):
    """A collective of a program, with the type of its elements."""

    kind: str
    element: str
    traffic: Traffic


def find_collectives(text: str, nodes: Sequence[int] = ()) -> Iterator[Collective]:
    """Yield the collectives of a compiled program.

    Collectives in the body of a loop count as often as the loop runs. `nodes` has the node of every
    device, in the order of the program's mesh; default: one node.
    """
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    chains = _fused_chains(text)
    seen: set[str] = set()
    for computation, line, often in _instructions(text):
        kind, element, size = _collective(line)
        # A collective that is split into several steps is listed in each, with the same chain id.
        # (All hand-written collectives of a program share one channel.)
        chain = _chain(line)
        if not kind or (chain and chain in seen):
            continue
        seen |= {chain} if chain else set()
        groups = _groups(line, devices)
        if kind == "all-reduce" and computation.startswith(SCATTERED):
            kind, size = "reduce-scatter", size // len(groups[0])
        moved = round(often * size * _received(kind, len(groups[0])))
        far = max(_far(group, nodes) for group in groups) if nodes else 0.0
        hidden = chain in chains or _starts(line)
        yield Collective(kind, element, _traffic(often, moved, round(moved * far), hidden))
    yield from _between_slices(text)


def _between_slices(text: str) -> Iterator[Collective]:
    """Yield the collectives over TPU slices, which are transfers by way of the hosts.

    A program is compiled for one slice, and its other collectives know no other slices.
    """
    for _, line, often in _instructions(text):
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
        result = re.search(r"= \((\w+)\[([\d,]*)\].* recv\(", line)
        slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', line)
        if not (found and result and slices):
            continue
        kind = found[1].lower().replace("_", "-")
        kind = kind if kind in COLLECTIVES else "collective-permute"
        size = _array_bytes(result[1], result[2])
        moved = round(often * size * _received(kind, len(_numbers(slices[1]))))
        yield Collective(kind, result[1], _traffic(often, moved, moved, True))


def _traffic(runs: int, size: int, far: int, hidden: bool) -> Traffic:
    return Traffic(runs, size, far, runs * hidden, size * hidden, far * hidden)


def _fused_chains(text: str) -> set[str]:
    """Return the chains of collectives of which a part is fused with a computation: on TPUs, these
    run at the same time."""
    found = set()
    for name, lines in computations(text):
        if name.startswith(FUSED):
            found |= {chain for line in lines if (chain := _chain(line))}
    return found


def _chain(line: str) -> str | None:
    match = re.search(r'chain_id="(\d+)"', line)
    return match[1] if match else None


def _starts(line: str) -> bool:
    """Return True for the first half of an asynchronous collective."""
    return bool(re.search(rf" ({'|'.join(COLLECTIVES)})-start\(", line)) and (
        '"is_sync":true' not in line
    )


def collectives(text: str, nodes: Sequence[int] = ()) -> dict[str, Traffic]:
    """Count the collectives of a compiled program by kind."""
    return total_by(find_collectives(text, nodes), lambda found: found.kind)


def reductions(found: Iterable[Collective]) -> dict[str, int]:
    """Count the bytes that all-reduce and reduce-scatter move, by type of element."""
    reduced = (each for each in found if each.kind in ("all-reduce", "reduce-scatter"))
    totals = total_by(reduced, lambda each: each.element)
    return {element: traffic.bytes for element, traffic in totals.items() if traffic.bytes}


def total_by(found: Iterable[Collective], key: Callable[[Collective], str]) -> dict[str, Traffic]:
    """Add up the traffic of collectives with the same key."""
    totals: dict[str, Traffic] = {}
    for each in found:
        totals[key(each)] = add(totals.get(key(each), Traffic()), each.traffic)
    return totals


def add(a: Traffic, b: Traffic) -> Traffic:
    return Traffic(*map(sum, zip(a, b, strict=True)))


def _received(kind: str, devices: int) -> float:
    """Return the bytes that a device receives per byte of the result, by bandwidth-optimal
    algorithms; an all-reduce is a reduce-scatter and an all-gather."""
    others = devices - 1
    return {
        "all-gather": others / devices,
        "all-to-all": others / devices,
        "reduce-scatter": others,
        "all-reduce": 2 * others / devices,
        "collective-permute": 1,
    }[kind]


def kernels(text: str) -> dict[str, int]:
    """Count the runs of hand-written kernels by name: splash_mha... on TPUs, __cudnn$fmha... on
    GPUs, and other Pallas kernels."""
    counts: Counter[str] = Counter()
    for _, line, often in _instructions(text):
        call = re.search(r'%?([\w\-]+)[\w.\-]* = .*custom_call_target="(\w*(?:\$fmha)?\w*)"', line)
        if call and call[2] == "tpu_custom_call":
            counts[call[1]] += often
        elif call and "$fmha" in call[2]:
            counts[call[2]] += often
    return dict(counts)


def _instructions(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield (computation, line, number of runs) of all instructions that run."""
    bodies = dict(computations(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)
    times = Counter({entry[1]: 1} if entry else {})
    # Callers follow their callees, so in reverse order every count is final when it is used.
    for name in reversed(bodies):
        for line in bodies[name]:
            for callee, often in _calls(line, bodies):
                times[callee] += times[name] * often
            if times[name]:
                yield name, line, times[name]


def _far(group: Sequence[int], nodes: Sequence[int]) -> float:
    """Return the share of a group's other devices that are on other nodes than its first."""
    here = sum(nodes[device] == nodes[group[0]] for device in group)
    return (len(group) - here) / max(1, len(group) - 1)


def _groups(line: str, devices: int) -> list[list[int]]:
    """Return the groups of devices of a collective; one group of all devices by default.

    Groups are listed, {{0,1},{2,3}}, or given as a range that is reshaped and transposed,
    [4,2]<=[2,4]T(1,0), or as axes of a grid, mesh['a'=2,'b'=4] {'b'}, which may be built from such
    a range: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}.
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    ids = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={ids}", line):
        return _range(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    names = r"\{((?:'\w+',?)+)\}"
    grid = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({ids}\))? {names}", line)
    if not grid:
        return [list(range(devices))]
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", grid[1])}
    inside = re.findall(r"'(\w+)'", grid[4])
    order = [*(name for name in axes if name not in inside), *inside]
    every = _range(grid[2] or ",".join(map(str, axes.values())), grid[3]).reshape([*axes.values()])
    every = every.transpose([list(axes).index(name) for name in order])
    return every.reshape(-1, math.prod(axes[name] for name in inside)).tolist()


def _range(shape: str, order: str | None) -> np.ndarray:
    """Return 0, 1, ... in this shape, with its axes in this order."""
    sizes = _numbers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, lines) of each computation of an HLO module."""
    name: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, lines = match[1], []
        # An attribute of a kernel may span lines that begin with braces.
        elif re.match(r"\}(, \w+=.*)?$", line) and name:
            yield name, lines
            name = None
        elif name:
            lines.append(line)


def _calls(line: str, bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Yield (computation, number of runs) of an instruction."""
    for kind, callee in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
        yield callee, _trips(line, bodies) if kind in ("body", "condition") else 1
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        for callee in group.split(","):
            yield callee.strip().lstrip("%"), 1


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """Return the trip count of a loop: the known trip count, else limit / stride of its counter
    (stride 2 if the loop was unrolled once)."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition, body = (
        _defined(bodies.get(match[1], [])) if match else {}
        for match in (re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("condition", "body"))
    )
    limits = [int(n) for text in condition.values() for n in re.findall(r"constant\((\d+)\)", text)]
    if not limits:
        return 1
    counter = re.search(r"get-tuple-element\(.*index=(\d+)", " ".join(condition.values()))
    return -(-max(limits) // (_stride(body, int(counter[1])) if counter else 1))


def _defined(lines: Iterable[str]) -> dict[str, str]:
    """Return {name: instruction} of a computation; "ROOT" names the last one too."""
    found = {}
    for line in lines:
        if match := re.match(r"\s*(ROOT )?%?([\w.\-]+) = (.*)", line):
            found[match[2]] = match[3]
            if match[1]:
                found["ROOT"] = match[3]
    return found


def _stride(body: Mapping[str, str], counter: int) -> int:
    """Return the increment of a loop's counter in its body; 1 if it is not a plain addition."""
    carried = re.search(r" tuple\((.*?)\)", re.sub(r"/\*.*?\*/", "", body.get("ROOT", "")))
    names = re.findall(r"%?([\w.\-]+)", carried[1]) if carried else []
    text = body.get(names[counter], "") if counter < len(names) else ""
    while copied := re.search(r" copy\(%?([\w.\-]+)\)", text):
        text = body.get(copied[1], "")
    added = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", text)
    steps = [
        int(constant[1])
        for name in (added.groups() if added else ())
        if (constant := re.search(r" constant\((\d+)\)", body.get(name, "")))
    ]
    return max(steps, default=1)


def _collective(line: str) -> tuple[str | None, str, int]:
    """Return (kind, type of element, bytes of the result) of a collective; (None, "", 0) of other
    instructions."""
    match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
    if not match:
        return None, "", 0
    arrays = re.findall(r"(\w+)\[([\d,]+)\]", match[1])
    # The result of an asynchronous start lists the operands, the results and some scalars; that of
    # an all-reduce, whose operands have the same shapes, the results only.
    if match[2] != "all-reduce" and f" {match[2]}-start(" in line:
        arrays = arrays[len(arrays) // 2 :]
    sizes = [_array_bytes(element, dims) for element, dims in arrays]
    element = arrays[sizes.index(max(sizes))][0] if arrays else ""
    return match[2], element, sum(sizes)


def _array_bytes(element: str, dims: str) -> int:
    return -(-_item_bits(element) * math.prod(_numbers(dims) if dims else []) // 8)


def _item_bits(kind: str) -> int:
    """Return the bits of an element of an XLA type; all types but `pred` name them: s4, u16, bf16,
    f8e4m3fn, c64 (xla_data.proto). Raises ValueError for an unknown type."""
    bits = re.fullmatch(r"(?:s|u|f|bf|c)(\d+)(?:e\d+m\d+[a-z0-9]*)?", kind)
    if not bits and kind != "pred":
        raise ValueError(
            f"array of type {kind!r} in a compiled program: expected pred or an XLA type with its"
            " bits in its name, for example bf16; add its size to planning/hlo.py"
        )
    return int(bits[1]) if bits else 8
