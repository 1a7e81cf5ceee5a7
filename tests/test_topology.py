"""Machines by name. That their compilers come up is seen in dry runs, where they are installed."""

import pytest

from framepack_jax import topology


@pytest.mark.parametrize(
    ("name", "printed", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v5p:2x4x4", "v5p:2x4x4", 32),
        ("v6e-256", "v6e:16x16", 256),
        ("V6E:2x2", "v6e:2x2", 4),
        ("h100:8", "h100:8", 8),
        ("h100:64", "h100:64", 64),
        ("a100-80g:8", "a100-80g:8", 8),
        ("a100:1", "a100-80g:1", 1),
        ("rtx4090:1", "rtx4090:1", 1),
    ],
)
def test_machines(name: str, printed: str, chips: int) -> None:
    machine = topology.parse(name)
    assert str(machine) == printed and machine.count == chips
    assert machine.chip.memory > 1e10 and machine.chip.flops > 1e13


def test_gpus_make_nodes_of_eight() -> None:
    assert topology.parse("h100:64").shape == (8, 8)
    assert topology.parse("h100:4").shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("h300:1", "known chips are v5e"),
        ("h100", "known chips are"),
        ("h100:12", "whole nodes"),
        ("h100:2x4", "by their number"),
        ("h100:0", "at least one"),
        ("v5p-6", "6 cores make no known topology"),
        ("v5e-12", "12 chips make no known topology"),
        ("v5p:4x4", "3 numbers, as in v5p:4x4x4"),
    ],
)
def test_machines_that_are_not_known(name: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        topology.parse(name)


def test_a_missing_compiler_names_its_extra(monkeypatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for name, extra in (("v5e:2x2", "tpu"), ("h200:1", "cuda13")):
        with pytest.raises(ValueError, match=rf"framepack-jax\[{extra}\]"):
            topology.compile_devices(topology.parse(name))
