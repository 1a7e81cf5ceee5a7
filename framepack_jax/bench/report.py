"""Format the figures of a bench as one Markdown row and as JSON."""

import dataclasses
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax

from framepack_jax.bench.result import Result
from framepack_jax.bench.timing import peak_memory
from framepack_jax.bench.workload import Workload
from framepack_jax.utils.messages import bytes_text
from framepack_jax.utils.versions import code_version

PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "framepack-jax"
)  # fmt: skip
PARTS = ("step", "section", "decode", "train")
HEADS = (
    "machine", "bundle", "size", "versions", "step (share of peak)", "floor of the step", "section",
    "decoding a second of video", "training step (share of peak)", "floor of the training step",
    "peak memory",
)  # fmt: skip
NO_FLOOR = "not known"
Outcome = Result | str
"""The figures of a part, or why there are none."""


def machine() -> str:
    """Name the local devices."""
    devices = jax.local_devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = f"{kind} ({platform.machine()}, {cores} cores)"
    return f"{len(devices)} x {kind}"


def part_line(name: str, outcome: Outcome) -> str:
    """Return the line of a part that has ended."""
    if isinstance(outcome, str):
        return f"{name}: {outcome}"
    texts = [f"{name}: {_seconds(name, outcome)}"]
    if floor := outcome.floor(jax.local_devices()):
        texts.append(f"floor {_number(floor)}, {outcome.seconds / floor:.2f} times that")
    elif outcome.flops:
        texts.append(f"{outcome.flops / 1e12:.3g} TFLOP, floor {NO_FLOOR} for this device")
    texts.append(f"compiled in {outcome.compile_seconds:.1f} s")
    if outcome.memory:
        texts.append(f"{bytes_text(outcome.memory)} a device by the compiler")
    return ", ".join(texts)


def table(work: Workload, outcomes: Mapping[str, Outcome]) -> str:
    """Return the row of all parts, with its heading; parts that are not there were not measured."""
    height, width = work.layout.height, work.layout.width
    weights = ", random weights" if work.random else ""
    cells = [
        machine() + _mesh(work),
        f"{work.name}{weights}",
        f"{height} x {width}, {work.pipe.dtype}, {work.batch} video{'s' * (work.batch > 1)}",
        ", ".join(f"{name} {text}" for name, text in code_version(PACKAGES).items()),
        _cell("step", outcomes), _floor("step", outcomes), _cell("section", outcomes),
        _cell("decode", outcomes), _cell("train", outcomes), _floor("train", outcomes),
        memory_text(outcomes),
    ]  # fmt: skip
    rows = (HEADS, ("---",) * len(HEADS), [cell.replace("|", "/") for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_json(work: Workload, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Return all figures, ready for JSON: those of each part by name, or its error."""
    devices = jax.local_devices()
    parts: dict[str, dict[str, Any]] = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            parts[name] = {"error": outcome}
        else:
            share, floor = outcome.share(devices), outcome.floor(devices)
            parts[name] = dataclasses.asdict(outcome) | {"share": share, "floor_seconds": floor}
    return {
        "machine": machine(),
        "mesh": dict(work.mesh.shape),
        "bundle": work.name,
        "random_weights": work.random,
        "size": [work.layout.height, work.layout.width],
        "dtype": work.pipe.dtype,
        "videos": work.batch,
        "versions": code_version(PACKAGES),
        "parts": parts,
        "peak_memory_bytes": peak_memory() or None,
    }


def memory_text(outcomes: Mapping[str, Outcome]) -> str:
    """Return the peak memory of a device; by the compiler if the device does not report it."""
    if peak := peak_memory():
        return bytes_text(peak)
    sizes = [each.memory for each in outcomes.values() if isinstance(each, Result)]
    return f"{bytes_text(max(sizes))} by the compiler" if any(sizes) else "not reported"


def _mesh(work: Workload) -> str:
    sizes = [f"{axis}={size}" for axis, size in work.mesh.shape.items() if size > 1]
    return f", {','.join(sizes)}" if sizes else ""


def _cell(name: str, outcomes: Mapping[str, Outcome]) -> str:
    outcome = outcomes.get(name, "not measured")
    return outcome if isinstance(outcome, str) else _seconds(name, outcome)


def _floor(name: str, outcomes: Mapping[str, Outcome]) -> str:
    outcome = outcomes.get(name)
    floor = outcome.floor(jax.local_devices()) if isinstance(outcome, Result) else None
    return NO_FLOOR if floor is None else _number(floor)


def _seconds(name: str, result: Result) -> str:
    text = _number(result.seconds)
    if name == "section":
        return f"{text} ({result.steps} steps)"
    if name == "decode":
        return f"{text} a second of video"
    share = result.share(jax.local_devices())
    shown = "" if share is None else f" ({100 * share:.0f} %)"
    return f"{text}{shown}, batch {result.batch}" if name == "train" else f"{text}{shown}"


def _number(seconds: float) -> str:
    return f"{seconds:.3g} s"
