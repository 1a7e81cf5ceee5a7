"""Classify the instructions of a compiled program (XLA's HLO) by kind and by module."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from framepack_jax.planning.hlo import COLLECTIVES, computations

# Kinds of instructions by their opcodes (of a kernel also its names); the first match counts.
KINDS = {
    "exchange": rf"(?:{'|'.join(COLLECTIVES)}).*",
    "attention": r"custom-call.*(?:fmha|splash|flash).*",
    "convolution": r"convolution|custom-call.*cudnn\$conv.*",
    "matrix product": r"dot|custom-call.*(?:cublas|gemm|matmul).*",
    "reduction": r"reduce|reduce-window|sort",
    "other kernels": r"custom-call.*",
}
ARITHMETIC, MOVES = "arithmetic", "copies, casts and transposes"
MOVING = frozenset({
    "async-done", "async-start", "bitcast", "bitcast-convert", "broadcast", "concatenate",
    "constant", "convert", "copy", "copy-done", "copy-start", "dynamic-slice",
    "dynamic-update-slice", "fusion", "gather", "get-tuple-element", "iota", "opt-barrier", "pad",
    "parameter", "reshape", "reverse", "scatter", "slice", "transpose", "tuple",
})  # fmt: skip
CONTAINERS = ("while", "conditional", "call")
# Parts of an operation's name that are no module.
WRAPPERS = re.compile(
    r"(?:jit|pjit|vmap|remat)\(.*\)|while|body|cond|branch_\d+_fun|closed_call|checkpoint|scan"
    r"|rematted_computation|shard_map|custom_[jv]+p_call|\[.*\]|"
)


class Operation(NamedTuple):
    """An instruction's kind (of KINDS, ARITHMETIC or MOVES), and the path of its module; of a
    fusion, that of its result."""

    kind: str
    path: tuple[str, ...]


def operations(text: str) -> dict[str, Operation | None]:
    """Return the operations of a compiled program by instruction; None for loops and other calls,
    whose time is that of the instructions that they run."""
    bodies = dict(computations(text))
    found = {}
    for lines in bodies.values():
        for line in lines:
            if name := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
                found[name[1]] = _operation(line, bodies)
    return found


def _operation(line: str, bodies: Mapping[str, list[str]]) -> Operation | None:
    if _opcode(line) in CONTAINERS:
        return None
    # The last line of a fusion is its result.
    lines = [line, *reversed([part for name in _fused(line) for part in bodies.get(name, [])])]
    names = (re.search(r'op_name="([^"]*)"', part) for part in lines)
    path = next((_path(name[1]) for name in names if name), ())
    # Scalars are skipped: they are indices.
    work = {_opcode(part) for part in lines if not re.search(r"= (?:[su]\d+|pred)\[\]", part)}
    for kind, sign in KINDS.items():
        if any(re.fullmatch(sign, opcode) for opcode in work):
            return Operation(kind, path)
    return Operation(MOVES if work <= MOVING else ARITHMETIC, path)


def _opcode(line: str) -> str:
    """Return the opcode of an instruction; of a kernel also its name and target. TPUs write matrix
    products as convolutions without spatial dimensions."""
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    found = re.search(r"(?:^|\s)([a-z][\w\-]*)\(", rest)
    opcode = found[1] if found else ""
    if opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        return f"{opcode} {name} {target[1] if target else ''}"
    labels = re.search(r"dim_labels=([^\s,]*)", rest)
    return "dot" if labels and not re.search(r"\d", labels[1]) else opcode


def _fused(line: str) -> list[str]:
    """Return the computations that an instruction calls."""
    return re.findall(r"calls=%?([\w.\-]+)", line)


def _path(name: str) -> tuple[str, ...]:
    """Return the modules in the name of an operation; gradients are in "backward".

    `jit(step)/while/body/DoubleBlock/img_qkv/dot` -> (DoubleBlock, img_qkv)
    """
    path = []
    for part in name.split("/")[:-1]:
        while inner := re.fullmatch(r"(?:transpose|jvp)\((.*)\)", part):
            if part.startswith("transpose"):
                path = ["backward"]
            part = inner[1]
        if not WRAPPERS.fullmatch(part):
            path.append(part)
    return tuple(path)
