"""Meshes ranked by arithmetic, and the choice among compiled ones."""

import dataclasses
from types import SimpleNamespace

import pytest

from framepack_jax import bundle
from framepack_jax.parallel import hardware
from framepack_jax.planning import mesh_choice
from framepack_jax.planning.programs import RefusedError
from framepack_jax.training.config import TrainConfig

ALL = TrainConfig(bundle="framepack_i2v", output="run", batch=32, ema=0.999)


def ranked(cfg: TrainConfig, name: str) -> list[dict[str, int]]:
    machine = hardware.parse(name)
    manifest = bundle.read_manifest(bundle.resolve(cfg.bundle))
    devices = hardware.compile_devices(machine)
    return mesh_choice.rank(cfg, manifest, machine, devices, (608, 640))


def test_weights_do_not_cross_the_network_between_slices() -> None:
    best = ranked(ALL, "2*v5p-32")[0]
    assert best["data"] % 2 == 0 and best["tensor"] == best["context"] == 1


def test_all_meshes_divide_the_batch_and_those_whose_state_fits_come_first() -> None:
    meshes = ranked(dataclasses.replace(ALL, batch=16, trainable="lora"), "v5e:4x4")
    assert all(16 % (mesh["data"] * mesh["fsdp"]) == 0 for mesh in meshes)
    # 27 GB of weights and factors, of which a half of 16 GB may hold a fourth or less.
    assert len(meshes) > 10 and meshes[0]["fsdp"] * meshes[0]["tensor"] >= 4


def test_a_small_batch_divides_tokens_or_heads() -> None:
    for mesh in ranked(dataclasses.replace(ALL, batch=8), "v5p-32"):
        assert mesh["context"] * mesh["tensor"] >= 2


def fake(name: str, seconds: float | None, fits: bool) -> SimpleNamespace:
    return SimpleNamespace(
        step_seconds=seconds, fits=fits, total=1, mesh={name: 2}, roofline_seconds=1.0
    )


def chosen(monkeypatch, *steps: tuple[str, float | None, bool] | str) -> list[str]:
    made = iter(steps)

    def compiled(*_: object) -> SimpleNamespace:
        step = next(made)
        if isinstance(step, str):
            raise RefusedError(step)
        return fake(*step)

    monkeypatch.setattr(mesh_choice, "dry_run_training", compiled)
    monkeypatch.setattr(mesh_choice, "rank", lambda *a: [{}] * len(steps))
    monkeypatch.setattr(mesh_choice, "COMPILED", 2)
    reports = mesh_choice.choose(
        ALL, bundle.resolve("framepack_i2v"), hardware.parse("v5e:2x2"), (608, 640)
    )
    return [next(iter(report.mesh)) for report in reports]


def test_the_fastest_mesh_that_fits_is_chosen(monkeypatch) -> None:
    # Two would do, but neither fits.
    steps = [("first", 2, False), ("second", 4, False), ("third", 3, True), ("never", 1, True)]
    assert chosen(monkeypatch, *steps) == ["third", "first", "second"]


def test_a_mesh_as_fast_as_the_roofline_of_all_ends_the_search(monkeypatch) -> None:
    assert chosen(monkeypatch, ("best", 1.005, True), ("never", 1.0, True)) == ["best"]
    # One that does not fit, is slower, or has no model, does not.
    assert chosen(monkeypatch, ("large", 1.0, False), ("small", 2, True)) == ["small", "large"]
    assert chosen(monkeypatch, ("slow", 1.02, True), ("best", 1.0, True)) == ["best", "slow"]
    assert chosen(monkeypatch, ("unknown", None, True), ("slow", 2, True)) == ["slow", "unknown"]


def test_a_mesh_that_the_compiler_refuses_is_passed_over(monkeypatch) -> None:
    assert chosen(monkeypatch, "no", ("small", 2, True), ("large", 1.5, True)) == ["large", "small"]
    with pytest.raises(RefusedError, match="never"):
        chosen(monkeypatch, "no", "never")


def test_a_batch_that_no_mesh_divides_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no mesh of 16 devices divides --batch 33 in 1 parts"):
        mesh_choice.choose(
            dataclasses.replace(ALL, batch=33), bundle.resolve("framepack_i2v"),
            hardware.parse("v5e:4x4"), (608, 640),
        )  # fmt: skip
