"""Devices, drivers, memory and folders of machines that are broken."""

import os
import resource
import subprocess
import sys

import pytest

from framepack_jax.doctor import machine, packages
from framepack_jax.doctor.machine import Device

DRIVER = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root)
GCC version:  gcc version 13.2.0
"""


def test_devices_of_this_machine(monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (found,) = machine.devices()
    assert (found.status, found.subject) == ("ok", "devices") and "cpu" in found.text


def test_a_platform_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    (found,) = machine.devices()
    assert found.status == "problem" and "nowhere" in found.text
    assert "JAX_PLATFORMS=cpu" in found.remedy


def test_a_device_that_another_process_holds(monkeypatch) -> None:
    monkeypatch.setattr(machine, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "PATIENCE", 0.5)
    (found,) = machine.devices()
    assert found.status == "problem" and "end other processes" in found.remedy


def test_a_gpu_that_jax_does_not_use(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine, "GPU_FILE", tmp_path / "version")
    (tmp_path / "version").write_text(DRIVER.format("580.65.06"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    gpu, driver = machine.unused("cpu")
    assert (gpu.subject, gpu.status) == ("GPU", "problem") and "[cuda13]" in gpu.remedy
    assert (driver.status, driver.text) == ("ok", "version 580.65")
    assert [each.subject for each in machine.unused("gpu")] == ["driver"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not list(machine.unused("cpu"))


@pytest.mark.parametrize(
    ("plugin", "oldest", "remedy"),
    [
        ("jax-cuda13-plugin", 580, 'update the driver, or pip install "framepack-jax[cuda12]"'),
        ("jax-cuda12-plugin", 525, "update the driver"),
    ],
)
def test_an_old_driver(monkeypatch, plugin, oldest, remedy) -> None:
    monkeypatch.setattr(
        machine, "version", lambda name: "0.10.2" if name == plugin else packages.MISSING
    )
    (old,) = machine.driver(DRIVER.format(f"{oldest - 1}.99.1"))
    assert old.status == "problem" and old.remedy == remedy and plugin in old.text
    (new,) = machine.driver(DRIVER.format(f"{oldest}.10"))
    assert new.status == "ok"
    (unknown,) = machine.driver("something else")
    assert unknown.status == "warning"


def test_several_devices() -> None:
    found = [Device("gpu", "NVIDIA H100", 80_000_000_000)] * 8
    assert machine.describe(found) == "8 x NVIDIA H100 (gpu), 80.0 GB each"


def test_folders(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "not" / "there"))
    monkeypatch.setenv("HF_HOME", "/proc/none")
    found = {each.subject: each for each in machine.folders()}
    assert found["working folder"].status in ("ok", "warning")
    assert str(tmp_path / "not" / "there") in found["compiled programs"].text
    assert found["compiled programs"].status in ("ok", "warning")
    assert found["downloaded weights"].status == "problem"
    assert "/proc/none cannot be written" in found["downloaded weights"].text
    # Nothing is left behind.
    assert not os.listdir(tmp_path)
    monkeypatch.delenv("HOME")
    assert next(machine.folders()).subject == "HOME"


def test_a_disk_that_takes_no_more(tmp_path) -> None:
    """A process that may write no file, as on a full disk."""
    code = (
        "from pathlib import Path; from framepack_jax.doctor import machine;"
        f"print(machine.folder_finding('place', Path({str(tmp_path)!r})))"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    done = subprocess.run(
        [sys.executable, "-B", "-c", "import signal;"
         f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN);{code}"],
        capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert done.stdout.startswith(f"problem  place: {tmp_path} cannot be written"), done.stderr


def test_little_memory(monkeypatch) -> None:
    (found,) = machine.memory()
    assert found.status in ("ok", "warning")
    monkeypatch.setattr(machine, "LEAST_MEMORY", 1e15)
    (found,) = machine.memory()
    assert found.status == "warning" and found.remedy
