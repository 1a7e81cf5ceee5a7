"""Verdicts and advice of dry runs, by hand-made programs."""

import dataclasses

import pytest

from framepack_jax.parallel import hardware
from framepack_jax.planning import hlo
from framepack_jax.planning.programs import Program
from framepack_jax.planning.report import Report, Weights

PROGRAM_OF_STEP = Program(
    "step", "fewer pixels", weights=40, arguments=45, temporaries=20, outputs=5,
    collectives={"all-gather": hlo.Traffic(3, 900 * 10**9, 0)}, kernels={}, compile_seconds=1.0,
)  # fmt: skip
DECODING = dataclasses.replace(
    PROGRAM_OF_STEP, name="decoding", advice="--vae-tile 256", weights=10, arguments=12, held=30,
    runs=0,
)  # fmt: skip


def report(machine: str = "h100:16", **fields) -> Report:
    made = Report(
        machine=hardware.parse(machine),
        mesh={"fsdp": 8, "context": 2},
        networks={
            "transformer": Weights(80, 40),
            "vae": Weights(5, 10),
            "text_encoder": Weights(7, 14),
        },
        programs=(PROGRAM_OF_STEP,),
        flops=2 * 16 * 989 * 10**12,
        steps=25,
        frames=36,
    )
    return dataclasses.replace(made, **fields)


def test_all_weights_count_beside_the_largest_program() -> None:
    assert report().resident == 64
    assert report().total == 70 + 64 - 40
    both = report(programs=(PROGRAM_OF_STEP, DECODING))
    assert both.total == 12 + 20 + 5 + 30 + 64 - 10
    assert both.largest is DECODING


def test_the_verdict_says_what_helps(monkeypatch) -> None:
    both = report(programs=(PROGRAM_OF_STEP, DECODING))
    assert both.fits and str(both).count(": fits\n") == 1
    assert "fits; decoding was not compiled" in str(report())
    for capacity, advice in ((120, "--vae-tile 256"), (50, "divide them over more chips")):
        chip = dataclasses.replace(both.machine.chip, memory=capacity)
        small = dataclasses.replace(both, machine=dataclasses.replace(both.machine, chip=chip))
        assert not small.fits
        assert f"does not fit, 0.0 GB too much; {advice}" in str(small).replace(
            "the weights alone are more; give --offload full, or ", ""
        )


def of_memory(total: float, resident: float, machine: str, **mesh: int) -> str:
    """The verdict on a step that needs this much of a chip's memory, as do its weights."""
    memory = hardware.parse(machine).chip.memory
    weights = int(resident * memory)
    step = dataclasses.replace(
        PROGRAM_OF_STEP, weights=weights, arguments=int(total * memory), temporaries=0, outputs=0,
        collectives={},
    )  # fmt: skip
    networks = {"transformer": Weights(weights, weights)}
    return str(report(machine, mesh=mesh, networks=networks, programs=(step, DECODING)))


@pytest.mark.parametrize(
    ("machine", "mesh", "advice"),
    [
        ("rtx4090:1", {}, "a machine of more chips, as rtx4090:4"),
        ("rtx4090:2", {"fsdp": 2}, "a machine of more chips, as rtx4090:4"),
        ("h100:8", {"fsdp": 8}, "a machine of more chips, as h100:16"),
        ("v5p-2", {}, "a machine of more chips, as v5p:2x2x1"),
        ("v5e:4x4", {"fsdp": 8, "context": 2}, "more chips: --mesh fsdp=16"),
        ("rtx4090:6", {"context": 6}, "more chips: --mesh fsdp=2,context=3"),
    ],
)
def test_advice_for_too_many_weights_can_be_followed(machine, mesh, advice) -> None:
    verdict = of_memory(1.6, 1.5, machine, **mesh)
    assert f"more; give --offload full, or divide them over {advice}\n" in verdict


def test_what_jax_would_not_take_of_a_gpu_is_said() -> None:
    share = " with XLA_PYTHON_CLIENT_MEM_FRACTION={} set, for JAX takes 75% of a GPU by default\n"
    assert ": fits" + share.format("0.95") in of_memory(0.8, 0.5, "h100:1")
    assert ": fits" + share.format("0.98") in of_memory(0.974, 0.5, "h100:1")
    assert ": fits\n" in of_memory(0.74, 0.5, "h100:1")
    assert ": fits\n" in of_memory(0.97, 0.5, "v5e-1")


def test_exchanges_count_as_often_as_their_program_runs() -> None:
    block = dataclasses.replace(PROGRAM_OF_STEP, name="block", runs=20, kernels={"flash": 1})
    made = report(programs=(block, PROGRAM_OF_STEP, DECODING))
    assert made.collectives == {"all-gather": hlo.Traffic(63, 21 * 900 * 10**9, 0)}
    assert made.kernels == {"flash": 20}


def test_bytes_from_other_nodes_go_at_the_rate_of_the_network() -> None:
    assert report().roofline_seconds == 2
    assert report().step_seconds == 2 + 900 / 450
    far = {"all-gather": hlo.Traffic(3, 900 * 10**9, 100 * 10**9)}
    programs = (dataclasses.replace(PROGRAM_OF_STEP, collectives=far),)
    assert report(programs=programs).communication_seconds == 800 / 450 + 100 / 50
    assert "100.000 of it from other nodes" in str(report(programs=programs))
    cards = report("rtx4090:16", programs=programs)
    assert cards.step_seconds is None and "not modelled" in str(cards)


def test_asynchronous_collectives_take_time_beyond_that_of_computing_only() -> None:
    # 4 s of gathers, of which 3 s, then 1 s, run beside 2 s of computing.
    for hidden, seconds in ((1350, 3 + 1), (450, 2 + 3)):
        moved = hlo.Traffic(3, 1800 * 10**9, 0, 1, hidden * 10**9)
        made = dataclasses.replace(PROGRAM_OF_STEP, collectives={"all-gather": moved})
        assert report(programs=(made,)).step_seconds == seconds
    assert "3 a step, 1 of them asynchronous, 1800.000 GB" in str(report(programs=(made,)))
    assert "3.000 s of it not beside computing" in str(report(programs=(made,)))


def test_slices_are_joined_by_the_data_centre_network() -> None:
    moved = hlo.Traffic(1, 25 * 10**9, 25 * 10**9, 1, 25 * 10**9, 25 * 10**9)
    made = dataclasses.replace(PROGRAM_OF_STEP, collectives={"all-reduce": moved})
    slices = report("2*v6e-16", programs=(made,))
    assert slices.communication_seconds == 2
    assert "25.000 of it from other slices, over the data centre network" in str(slices)
    assert "12.5 GB/s between slices" in str(slices)
