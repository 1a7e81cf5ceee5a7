"""Devices and their drivers, memory, and the folders that commands write to."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from framepack_jax.doctor.finding import Finding
from framepack_jax.doctor.packages import MISSING, NAME
from framepack_jax.utils.memory import host_memory
from framepack_jax.utils.messages import bytes_text
from framepack_jax.utils.versions import version

# JAX can hang or abort on a device that another process holds, so another process asks for it.
PROBE = """
import json, jax
print(json.dumps([
    [d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit")] for d in jax.devices()
]))
"""
PATIENCE = 180
"""Seconds that JAX may take to find its devices."""
DRIVERS = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}
"""Oldest driver from NVIDIA for each plug-in."""
GPU_FILE, TPU_FILES = Path("/proc/driver/nvidia/version"), ("/dev/accel0", "/dev/vfio/0")
LEAST_MEMORY, LEAST_DISK = 8e9, 15e9
"""Bytes of host memory and of a disk with less of which the released model is not converted."""
FULL = 100e6
"""Bytes of a disk with less of which nothing is written."""


class Device(NamedTuple):
    """Platform and kind of a device of JAX, and its memory in bytes, if it is known."""

    platform: str
    kind: str
    memory: int | None


def devices() -> Iterator[Finding]:
    """Find the devices that JAX uses, and those of this machine that it does not use."""
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        text = f"JAX found no device in {PATIENCE} s"
        yield Finding("devices", "problem", text, "end other processes that hold the device")
        return
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        text = f"JAX cannot start: {lines[-1]}"
        yield Finding("devices", "problem", text, "mend this, or set JAX_PLATFORMS=cpu")
        return
    found = [Device(*each) for each in json.loads(done.stdout.splitlines()[-1])]
    yield Finding("devices", "ok", describe(found))
    yield from unused(found[0].platform)


def describe(found: list[Device]) -> str:
    """Return a text for devices of one kind."""
    first = found[0]
    each = f", {bytes_text(first.memory)} each" if first.memory else ""
    return f"{len(found)} x {first.kind} ({first.platform}){each}"


def unused(platform: str) -> Iterator[Finding]:
    """Look for a GPU or TPU that JAX does not use, and at the driver of the GPU."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    if GPU_FILE.exists():
        if platform != "gpu":
            text = "this machine has an NVIDIA GPU, and JAX does not use it"
            yield Finding("GPU", "problem", text, f'pip install "{NAME}[cuda13]"')
        yield from driver(GPU_FILE.read_text())
    elif any(map(os.path.exists, TPU_FILES)) and platform != "tpu":
        if version("libtpu") == MISSING:
            text = "this machine may have a TPU, and libtpu is not installed"
            yield Finding("TPU", "warning", text, f'pip install "{NAME}[tpu]"')
        else:
            text = "this machine may have a TPU, and JAX does not use it"
            yield Finding("TPU", "warning", text, "end other processes that hold the TPU")


def driver(text: str) -> Iterator[Finding]:
    """Compare the driver, by the text of the kernel module, with what the plug-in needs."""
    match = re.search(r"Kernel Module.*?\s(\d+)\.(\d+)", text)
    if match is None:
        yield Finding("driver", "warning", "the version of NVIDIA's driver is not known")
        return
    there = f"{match[1]}.{match[2]}"
    for plugin, oldest in DRIVERS.items():
        if version(plugin) != MISSING and int(match[1]) < oldest:
            needs = f"version {there} is older than {oldest}, which {plugin} needs"
            other = "update the driver"
            if plugin == "jax-cuda13-plugin":
                other += f', or pip install "{NAME}[cuda12]"'
            yield Finding("driver", "problem", needs, other)
            return
    yield Finding("driver", "ok", f"version {there}")


def memory() -> Iterator[Finding]:
    """Look at the memory of the host, within the limit of its control group."""
    total = host_memory()
    if total < LEAST_MEMORY:
        remedy = "convert and sample the released model on another machine; tiny needs 2 GB"
        yield Finding("memory", "warning", bytes_text(total), remedy)
    else:
        yield Finding("memory", "ok", bytes_text(total))


def folders() -> Iterator[Finding]:
    """Write a file to each folder that commands write to, and look at the room on its disk."""
    if not os.environ.get("HOME"):
        text = f"HOME is not set; caches are kept in {os.path.expanduser('~')}"
        yield Finding("HOME", "warning", text, "set HOME, or XDG_CACHE_HOME and HF_HOME")
    for subject, folder in places().items():
        yield folder_finding(subject, folder)


def places() -> dict[str, Path]:
    """Return the folders that commands write to, by what they are for."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or caches / "framepack-jax" / "compiled"
    downloads = os.environ.get("HF_HOME") or caches / "huggingface"
    return {
        "working folder": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "compiled programs": Path(compiled),
        "downloaded weights": Path(downloads),
    }


def folder_finding(subject: str, folder: Path) -> Finding:
    """Return whether a folder, or the nearest one above it that is there, takes a file."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror})"
        return Finding(subject, "problem", text, "free space there, or choose another folder")
    text = f"{folder}, {bytes_text(free)} free"
    if free < FULL:
        return Finding(subject, "problem", text, "free space there, or choose another folder")
    if free < LEAST_DISK:
        return Finding(subject, "warning", text, "a released model needs 15 to 80 GB")
    return Finding(subject, "ok", text)
