"""Bytes that some work needs."""

from jax.sharding import AbstractMesh, AxisType

from framepack_jax import bundle, packing
from framepack_jax.generation.offload_plan import Work, need
from framepack_jax.parallel import sharding


def test_devices_divide_the_memory_of_a_step() -> None:
    sizes = {"fsdp": 2}
    lengths = tuple(sizes.get(name, 1) for name in sharding.AXES)
    mesh = AbstractMesh(lengths, sharding.AXES, (AxisType.Auto,) * len(lengths))
    schedule = packing.parse(packing.RELEASED_F1)
    small, large = (Work((side, 256), 1, schedule, 1) for side in (128, 512))

    def growth(mesh: AbstractMesh | None) -> int:
        steps = [
            need(bundle.resolve("random"), work, dtype="float32", mesh=mesh).step
            for work in (small, large)
        ]
        return steps[1] - steps[0]

    assert abs(growth(mesh) - growth(None) / 2) <= 1
