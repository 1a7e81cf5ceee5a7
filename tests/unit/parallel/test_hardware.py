"""Machines by name, and the TPU's compiler for them. Those of GPUs are seen by `make dry-runs`."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from framepack_jax.parallel import device_grid, hardware
from framepack_jax.parallel.chips import chip_of
from tests.fixtures.paths import ROOT


@pytest.mark.parametrize(
    ("name", "printed", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-2", "v5p:1x1x1", 1),
        ("v5p:2x4x4", "v5p:2x4x4", 32),
        ("v6e-256", "v6e:16x16", 256),
        ("V6E:2x2", "v6e:2x2", 4),
        ("h100:8", "h100:8", 8),
        ("h100:64", "h100:64", 64),
        ("a100-80g:8", "a100-80g:8", 8),
        ("a100:1", "a100-80g:1", 1),
        ("rtx4090:1", "rtx4090:1", 1),
        ("2*v5e-256", "2*v5e:16x16", 512),
        ("2*v5p:2x2x4", "2*v5p:2x2x4", 32),
        ("1*v6e-8", "v6e:2x4", 8),
        # Two devices a chip, and the cloud counts cores.
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 128),
        ("b200:8", "b200:8", 8),
        ("gb200:4", "gb200:4", 4),
        ("gb200:144", "gb200:144", 144),
    ],
)
def test_machines(name: str, printed: str, chips: int) -> None:
    machine = hardware.parse(name)
    assert str(machine) == printed and machine.count == chips
    assert machine.chip.memory > 1e10 and machine.chip.flops > 1e13


def test_gpus_make_nodes_of_eight() -> None:
    assert hardware.parse("h100:64").shape == (8, 8)
    assert hardware.parse("h100:4").shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "domains"),
    [("h100:8", 1), ("h100:64", 8), ("gb200:72", 1), ("gb200:144", 2), ("2*v5e-16", 2)],
)
def test_links_join_nodes_racks_and_slices(name: str, domains: int) -> None:
    assert hardware.parse(name).domains == domains


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("v5e:1x1", 0),
        ("v5e:2x2", 100),
        ("v5e:4x4", 100),
        ("v5e:8x16", 150),
        ("v5e:16x16", 200),
        ("v5p:2x2x1", 200),
        ("v5p:2x4x4", 300),
        ("v5p:4x4x4", 600),
        ("h100:64", 450),
    ],
)
def test_a_corner_of_a_slice_has_half_of_its_links_unless_sides_are_rings(name, links) -> None:
    assert hardware.parse(name).links == links * 1e9


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v5e:4x4", "TPU v5 lite"),
        ("v5e-1", "TPU v5 lite"),
        ("v5p-64", "TPU v5"),
        ("v5p-8", "TPU v5"),
        ("v5p-2", "TPU v5"),
        ("v6e-8", "TPU v6 lite"),
        ("v6e:8x8", "TPU v6 lite"),
        ("tpu7x-8", "TPU7x"),
        ("2*tpu7x-16", "TPU7x"),
        ("2*v5e-4", "TPU v5 lite"),
    ],
)
def test_the_tpu_compiler_knows_the_topology(name: str, kind: str) -> None:
    machine = hardware.parse(name)
    devices = hardware.compile_devices(machine)
    assert len(devices) == machine.count
    assert {device.device_kind for device in devices} == {kind}
    assert len(device_grid.domains(devices)) == machine.domains
    assert chip_of(devices[0]) is machine.chip
    assert hardware.machine_of(devices) == machine


@pytest.mark.parametrize(
    ("kind", "count", "name"),
    [("NVIDIA H100 80GB HBM3", 64, "h100:64"), ("NVIDIA GB200", 72, "gb200:72")],
)
def test_gpus_are_recognised(kind: str, count: int, name: str) -> None:
    gpu = SimpleNamespace(platform="gpu", device_kind=kind)
    assert hardware.machine_of([gpu] * count) == hardware.parse(name)


def test_a_machine_without_known_chips_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cpu is not among the known chips, v5e, "):
        hardware.machine_of([SimpleNamespace(platform="cpu", device_kind="cpu")])


def test_libtpu_is_quiet_where_there_is_no_tpu() -> None:
    program = "from framepack_jax.parallel import hardware; import jax; hardware.quiet_libtpu();"
    env = {name: x for name, x in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "-c", program + "print(jax.devices())"],
        env=env, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "TPU" not in done.stderr, done.stderr


def test_a_tpu_that_is_there_is_not_described(monkeypatch) -> None:
    # JAX sets the variable, on import, where it sees no TPU.
    for variables, kind in (({}, None), ({"TPU_SKIP_MDS_QUERY": "1"}, "v5litepod-4")):
        monkeypatch.setattr(os, "environ", variables)
        hardware.quiet_libtpu()
        assert variables.get("TPU_ACCELERATOR_TYPE") == kind


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("h300:1", "known chips are v5e"),
        ("h100", "known chips are"),
        ("h100:12", "whole nodes"),
        ("h100:2x4", "by their number"),
        ("h100:0", "at least one"),
        ("0*v5e-16", "at least one"),
        ("2*h100:8", "only TPUs have slices; .* as in h100:16"),
        ("gb200:80", "whole NVLink domains of 72"),
        ("gb200:6", "whole nodes of 4"),
        ("v5p-6", "6 cores form no known topology"),
        ("v5p-4", r"'v5p-4': 2 chips do not form a slice of v5p.* 4 \(2x2x1\); take v5p-8"),
        ("v5e-2", "known are 1, 4, 8"),
        ("v5e-12", "12 chips form no known topology"),
        ("v5p:4x4", "3 numbers, as in v5p:4x4x4"),
    ],
)
def test_machines_that_are_not_known(name: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        hardware.parse(name)


def test_a_missing_compiler_names_its_extra(monkeypatch) -> None:
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    for name, extra in (("v5e:2x2", "tpu"), ("h200:1", "cuda13")):
        with pytest.raises(ValueError, match=rf"framepack-jax\[{extra}\]"):
            hardware.compile_devices(hardware.parse(name))
