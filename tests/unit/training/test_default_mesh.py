"""Default meshes of training the released model, whose state is counted and never made."""

import dataclasses
from types import SimpleNamespace

import pytest

from framepack_jax import bundle
from framepack_jax.parallel import hardware
from framepack_jax.training import default_mesh
from framepack_jax.training.config import TrainConfig

ALL = TrainConfig(bundle="framepack_i2v", output="run", ema=0.999)
LORA = dataclasses.replace(ALL, trainable="lora")


def gpus(kind: str, nodes: int, each: int) -> list:
    return [
        SimpleNamespace(
            id=i,
            platform="gpu",
            device_kind=f"NVIDIA {kind}",
            slice_index=i // each,
            process_index=0,
        )
        for i in range(nodes * each)
    ]


def tpus(name: str) -> list:
    return hardware.compile_devices(hardware.parse(name))


@pytest.mark.parametrize(
    ("cfg", "machine", "data", "fsdp"),
    [
        # 206 GB of parameters, moments and average: 25.8 GB in eight parts.
        (ALL, ("H100", 8, 8), 8, 8),
        (ALL, ("H100", 1, 8), 1, 8),
        # 42 GB in four parts are more than half of an H100.
        (ALL, ("H100", 4, 4), 2, 8),
        (LORA, ("H100", 4, 4), 4, 4),
        (ALL, ("GB200", 2, 72), 6, 24),
        (ALL, "2*v5e-256", 4, 128),
        (ALL, "2*v5e-16", 1, 32),
        # The weights in eight parts take 3.4 GB; a slice of 16 is halved.
        (LORA, "2*v5e-16", 4, 8),
        (ALL, "v5p-64", 2, 16),
        (ALL, "v5p-16", 1, 8),
        # Too much for all of them: divided as far as possible.
        (ALL, "v5e:2x2", 1, 4),
    ],
)
def test_weights_stay_within_a_node_or_slice_if_they_fit(cfg, machine, data, fsdp) -> None:
    devices = tpus(machine) if isinstance(machine, str) else gpus(*machine)
    manifest = bundle.read_manifest(bundle.resolve(cfg.bundle))
    sizes = default_mesh.default_mesh(cfg, manifest, devices)
    assert sizes == {"data": data, "fsdp": fsdp}


def test_a_machine_that_is_not_known_divides_weights_over_all_devices() -> None:
    cpus = [
        SimpleNamespace(id=i, platform="cpu", device_kind="cpu", process_index=i) for i in range(8)
    ]
    manifest = bundle.read_manifest(bundle.resolve("random"))
    cfg = dataclasses.replace(ALL, bundle="random")
    assert default_mesh.default_mesh(cfg, manifest, cpus) == {"data": 1, "fsdp": 8}
