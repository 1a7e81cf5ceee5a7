"""What a dry run says of a program: of other machines' by their compilers, and on devices of this
CPU in place of another machine's."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import pytest

from framepack_jax import bundle
from framepack_jax.cli import sample, train
from framepack_jax.generation.pipeline import Settings
from framepack_jax.generation.request import Request, make_layout
from framepack_jax.jobs.loading import open_pipe
from framepack_jax.parallel import hardware, sharding
from framepack_jax.planning import hlo, sampling
from framepack_jax.planning.training import TrainingReport
from tests.fixtures.paths import ROOT

# A loop of five rounds that gathers 8 x 4 float32 in each, and one sum outside of it.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from framepack_jax.planning.hlo import collectives

mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
rows, whole = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P())

def step(x, w):
    w = jax.lax.with_sharding_constraint(w, whole)
    return jnp.tanh(x @ w), None

def run(x, weights):
    return jax.lax.scan(step, x, weights)[0]

x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=whole)
w = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
text = jax.jit(run, out_shardings=whole).lower(x, w).compile().as_text()
for nodes in ((), [0, 0, 0, 0, 1, 1, 1, 1]):
    print(*(f"{kind} {tuple(traffic)}" for kind, traffic in collectives(text, nodes).items()))
"""


@pytest.fixture
def this_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "compile_devices", lambda machine: jax.devices()[: machine.count])


@pytest.fixture
def reports(monkeypatch) -> list[sampling.Report]:
    """What dry runs of `sample` report, in order."""
    made = []
    real = sampling.dry_run
    monkeypatch.setattr(sampling, "dry_run", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    return made


def test_collectives_of_a_loop_count_as_often_as_it_runs() -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Of 8 rows of 8 float32, each device has one already; of the seven others four are far away.
    got = 5 * 7 * 8 * 4
    assert done.stdout.splitlines() == [
        f"all-gather {(5, got, 0)}",
        f"all-gather {(5, got, got * 4 // 7)}",
    ]


def hlo_of(*lines: str) -> str:
    return "\n".join(["HloModule step, num_partitions=8", "", "ENTRY %main (x: f32[4]) -> f32[4] {"]
                     + [f"  {line}" for line in lines] + ["}"])  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # Two groups of four, each on a node.
        ("all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}", (1, 12, 0)),
        ("all-gather(%x), replica_groups=[2,4]<=[8]", (1, 12, 0)),
        ("all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", (1, 12, 0)),
        # Four pairs with a member on each.
        ("all-to-all(%x), replica_groups=[4,2]<=[2,4]T(1,0)", (1, 8, 8)),
        ("all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}", (1, 8, 8)),
        ("all-to-all(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
         (1, 8, 8)),
        # All eight, four of the seven others on the other node.
        ("all-reduce(%x), replica_groups={}", (1, 28, 16)),
        ("reduce-scatter(%x), replica_groups=[1,8]<=[8]", (1, 112, 64)),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", (1, 16, 0)),
        ("collective-permute(%x), source_target_pairs={{0,1},{3,4}}", (1, 16, 16)),
    ],
)  # fmt: skip
def test_bytes_by_group_and_node(line: str, expected: tuple[int, int, int]) -> None:
    kind = line.partition("(")[0]
    text = hlo_of(f"%r = f32[4]{{0}} {line}, channel_id=1")
    assert hlo.collectives(text, [0] * 4 + [1] * 4) == {kind: expected}


@pytest.mark.parametrize(
    ("result", "line", "received"),
    [
        ("f32[4]", "all-reduce-start(%x), replica_groups=[1,8]<=[8]", 28),
        ("(f32[4], s64[2])", "all-reduce-start(%x, %y), replica_groups=[1,8]<=[8]", 56),
        ("(f32[4], f32[32])", "all-gather-start(%x), replica_groups=[1,8]<=[8]", 112),
        ("((bf16[4], u16[8]), (bf16[32], u16[64]))",
         "all-gather-start(%x, %y), replica_groups=[1,8]<=[8]", 168),
        ("((f64[32]), f64[4], u32[])", "reduce-scatter-start(%x), replica_groups=[1,8]<=[8]", 224),
        ("(f8e4m3fn[4], f8e4m3fn[4], u32[], u32[])",
         "collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}", 4),
        ("s4[5]", "collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 3),
        ("pred[5]", "collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 5),
    ],
)  # fmt: skip
def test_bytes_by_type_and_by_what_a_start_holds(result: str, line: str, received: int) -> None:
    (traffic,) = hlo.collectives(hlo_of(f"%r = {result} {line}, channel_id=1")).values()
    assert traffic == (1, received, 0)


def test_a_type_of_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="array of type 'q16'"):
        hlo.collectives(hlo_of("%r = q16[4]{0} all-reduce(%x), replica_groups={}"))


def test_attributes_with_lines_of_their_own_end_no_computation() -> None:
    text = hlo_of(
        '%splash.1 = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof":"{}"\n}}, metadata={}',
        "%g = f32[8]{0} all-gather(%splash.1), channel_id=1, replica_groups=[4,2]<=[8]",
    )
    assert hlo.collectives(text) == {"all-gather": (1, 16, 0)}
    assert hlo.kernels(text) == {"splash": 1}


def named(path: str) -> str:
    return f'metadata={{op_name="jit(step)/while/body/closed_call/{path}"}}'


def test_what_instructions_do_and_for_whom() -> None:
    """Operands, whose names tell of other instructions, count for nothing."""
    fused = """%fused (p: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %t.1 = f32[4]{0} tanh(%p.1), NAME
}

%taken (p.2: f32[8,4], i: s32[]) -> f32[4] {
  %i = s32[] parameter(1)
  %less.1 = pred[] compare(%i, %i), direction=LT
  ROOT %s.1 = f32[4]{0} dynamic-slice(%p.2, %i), dynamic_slice_sizes={1,4}
}

""".replace("NAME", named("Block/gate/dot_general"))
    call = '%{} = (f32[4]{{0:T(8)}}, u8[]) custom-call(%dot.7), custom_call_target="{}", {}'
    text = fused + hlo_of(
        call.format("c.1", "__cublas$gemm", named("B/qkv/dot")),
        call.format("c.2", "__cudnn$fmhaSoftmax", named("B/a/f")),
        call.format("splash_mha.1", "tpu_custom_call", named("B/a/f")),
        call.format("c.3", "__cudnn$convForward", named("conv_in/conv")),
        call.format("c.4", "sorted", named("x")),
        "%v.1 = bf16[4] convolution(%x, %y), window={size=3x3}, dim_labels=b01f_01io->b01f",
        "%v.2 = bf16[4] convolution(%x, %y), dim_labels=bf_io->bf",
        "%f.1 = f32[4] fusion(%gemm_fusion_dot.1), kind=kLoop, calls=%fused",
        "%f.2 = f32[4] fusion(%all-reduce.3, %i.2), kind=kLoop, calls=%taken",
        f"%t.2 = f32[4] transpose(%x), {named('transpose(jvp(jit(embed)))/dot_general/transpose')}",
        f"%g.1 = f32[4] all-gather-start(%x), {named('transpose(jvp(Block))/mlp/add')}",
        f"%r.1 = f32[4] reduce(%x), to_apply=%sum, {named('cond/branch_0_fun/checkpoint/max')}",
        "%w.1 = f32[4] while(%x), body=%b, condition=%c",
    )
    found = hlo.operations(text)
    assert found.pop("w.1") is None
    assert {name: operation.kind for name, operation in found.items()} == {
        "p.1": hlo.MOVES, "t.1": hlo.ARITHMETIC, "i": hlo.MOVES, "less.1": hlo.MOVES,
        "s.1": hlo.MOVES, "c.1": "matrix product", "c.2": "attention", "splash_mha.1": "attention",
        "c.3": "convolution", "c.4": "other kernels", "v.1": "convolution",
        "v.2": "matrix product", "f.1": hlo.ARITHMETIC, "f.2": hlo.MOVES, "t.2": hlo.MOVES,
        "g.1": "exchange", "r.1": "reduction",
    }  # fmt: skip
    paths = {name: operation.path for name, operation in found.items() if operation.path}
    assert paths == {
        "t.1": ("Block", "gate"), "f.1": ("Block", "gate"), "c.1": ("B", "qkv"), "c.2": ("B", "a"),
        "splash_mha.1": ("B", "a"), "c.3": ("conv_in",), "t.2": ("backward", "dot_general"),
        "g.1": ("backward", "Block", "mlp"),
    }  # fmt: skip


FLAGS = ("--bundle", "random", "--height", "64", "--width", "80")


def test_a_step_of_streamed_blocks_is_the_programs_that_it_runs(this_cpu, reports, capsys) -> None:
    flags = (*FLAGS, "--dtype", "float32", "--dry-run", "h200:1")
    sample.main([*flags, "--offload", "full", "--cfg-scale", "3"])
    sample.main(flags)
    low, high = reports
    runs = {program.name: program.runs for program in low.programs}
    assert runs == {"double block": 4, "single block": 4, "embedding": 2, "head": 2}
    # On the chip there are two of the larger blocks, and what is no block.
    double, single, *rest = (program.weights for program in low.programs)
    assert low.networks["transformer"].bytes == 2 * double + sum(rest)
    assert low.hosted == 2 * double + 2 * single
    assert low.hosted + sum(rest) == high.networks["transformer"].bytes
    assert set(low.networks) == {"transformer", "vae"}
    assert low.total < high.total and low.flops == 2 * high.flops
    assert "GB of blocks a chip and step" in capsys.readouterr().out


@pytest.mark.large
def test_a_small_slice_takes_the_released_model_block_by_block(reports) -> None:
    sample.main(
        ["--bundle", "framepack_i2v", "--height", "608", "--width", "640", "--offload", "full",
         "--dry-run", "v5e:2x2"]
    )  # fmt: skip
    (made,) = reports
    for program in made.programs:
        assert program.arguments <= 0.3e9 and program.temporaries <= 1.5e9
    assert made.fits and made.hosted == pytest.approx(2 * 12.45e9 / 4, rel=0.01)


def test_exchanges_count_as_often_as_their_program_runs() -> None:
    block = dataclasses.replace(PROGRAM_OF_STEP, name="block", runs=20, kernels={"flash": 1})
    made = report(programs=(block, PROGRAM_OF_STEP, DECODING))
    assert made.collectives == {"all-gather": hlo.Traffic(63, 21 * 900 * 10**9, 0)}
    assert made.kernels == {"flash": 20}


@pytest.mark.parametrize(
    "more", [(), ("--step-cache", "tea"), ("--cfg-scale", "3", "--batch", "2")]
)
def test_the_real_step_is_compiled(this_cpu, capsys, more) -> None:
    sample.main([*FLAGS, "--dtype", "float32", "--dry-run", "h200:1", *more])
    printed = capsys.readouterr().out
    assert "331,168" in printed and ": fits" in printed
    assert "64 x 80 pixels" in printed and "counted from the config" in printed


PROGRAM_OF_STEP = sampling.Program(
    "step", "fewer pixels", weights=40, arguments=45, temporaries=20, outputs=5,
    collectives={"all-gather": hlo.Traffic(3, 900 * 10**9, 0)}, kernels={}, compile_seconds=1.0,
)  # fmt: skip
DECODING = dataclasses.replace(
    PROGRAM_OF_STEP, name="decoding", relief="--vae-tile 256", weights=10, arguments=12, held=30,
    runs=0,
)  # fmt: skip


def report(machine: str = "h100:16", **fields) -> sampling.Report:
    made = sampling.Report(
        machine=hardware.parse(machine),
        mesh={"fsdp": 8, "context": 2},
        networks={
            "transformer": sampling.Weights(80, 40),
            "vae": sampling.Weights(5, 10),
            "text_encoder": sampling.Weights(7, 14),
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
    networks = {"transformer": sampling.Weights(weights, weights)}
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


@pytest.mark.parametrize(("batch", "more"), [(1, 8), (12, 16)])
def test_chips_that_would_repeat_work_are_refused(monkeypatch, batch: int, more: int) -> None:
    monkeypatch.setattr(hardware, "compile_devices", lambda machine: jax.devices()[:1] * 8)
    path = bundle.resolve("random")
    pipe = open_pipe(path, "float32", None, None)
    layout = make_layout(pipe.geometry, Request("", None), sections=1, height=64, width=64)
    run = pipe, path, layout, Settings(), hardware.parse("h200:8"), {"data": -1}, batch
    with pytest.raises(ValueError, match=rf"batch = {batch} on data=8: .* give --batch {more}, "):
        sampling.dry_run(*run)


def test_bytes_from_other_nodes_go_at_the_rate_of_the_network() -> None:
    assert report().floor_seconds == 2
    assert report().step_seconds == 2 + 900 / 450
    far = {"all-gather": hlo.Traffic(3, 900 * 10**9, 100 * 10**9)}
    programs = (dataclasses.replace(PROGRAM_OF_STEP, collectives=far),)
    assert report(programs=programs).link_seconds == 800 / 450 + 100 / 50
    assert "100.000 of it from other nodes" in str(report(programs=programs))
    cards = report("rtx4090:16", programs=programs)
    assert cards.step_seconds is None and "not modelled" in str(cards)


UNROLLED = """
%condition (p: (f32[8], u32[])) -> pred[] {
  %limit = u32[] constant(8)
  %p = (f32[8], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p = (f32[8], u32[]) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%p), index=1
  %x = f32[8] get-tuple-element(%p), index=0
  %y = f32[8] collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %more = u32[] add(%i, %two)
  %next = u32[] copy(%more)
  ROOT %t = (f32[8], /*index=1*/u32[]) tuple(%y, /*index=1*/%next)
}

ENTRY %main (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %p = (f32[8], u32[]) parameter(0)
  ROOT %loop = (f32[8], u32[]) while(%p), condition=%condition, body=%body
}
"""


def test_a_loop_that_was_unrolled_runs_less_often() -> None:
    found = hlo.collectives(UNROLLED)
    assert found == {"collective-permute": hlo.Traffic(4, 4 * 8 * 4)}
    by_one = UNROLLED.replace("constant(2)", "constant(1)")
    assert hlo.collectives(by_one)["collective-permute"].count == 8


def test_decoding_is_compiled_for_the_largest_tile() -> None:
    """Of a clip of 10 latents the decoder takes 5 at once, and squares where tiles are given."""
    path = bundle.resolve("random")
    temporaries = []
    for tile in (None, 32):
        pipe = open_pipe(path, "float32", None, tile)
        layout = make_layout(pipe.geometry, Request("", None), sections=1, height=64, width=64)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        weights = sampling._abstract(*pipe.vae[:2], "float32", mesh)
        decoding = sampling._decode(pipe, weights, layout, 1, mesh)
        side = tile or 64
        assert decoding.outputs == 17 * side**2 * 3 * 4
        assert decoding.held == 2 * 37 * 64**2 * 3 * 4
        # All that is read are the decoder's weights, and the latents.
        read = sum(leaf.size * 4 for leaf in jax.tree.leaves(weights["decoder"]))
        assert decoding.weights == read
        assert decoding.arguments == read + 4 * math.prod((5, side // 8, side // 8, 16))
        temporaries.append(decoding.temporaries)
    assert temporaries[1] < temporaries[0] / 3


def test_what_does_not_fit_ends_with_code_1(this_cpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sampling.Report, "total", property(lambda report: 200 * 10**9))
    with pytest.raises(SystemExit) as ended:
        sample.main([*FLAGS, "--dry-run", "h200:1"])
    assert ended.value.code == 1
    assert "does not fit, 49.9 GB too much" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--dry-run", "h300:1"), "machine 'h300:1' is unknown"),
        (("--dry-run", "h200:1", "--mesh", "fsdp=2"), "multiply to 2, but there are 1 devices"),
        (("--dry-run", "h200:1", "--mesh", "fspd=1"), "'fspd=1' is not AXIS=SIZE"),
    ],
)
def test_errors_name_what_is_wrong(this_cpu, more, named) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        sample.main([*FLAGS, *more])


def test_the_tpu_compiler_takes_a_tiny_step(reports, capsys) -> None:
    sample.main([*FLAGS, "--dtype", "bfloat16", "--dry-run", "v5e:2x2"])
    (made,) = reports
    assert made.networks["transformer"].parameters == 331_168
    assert made.step.collectives["all-gather"].bytes > 0 and made.fits
    assert "v5e:2x2: 4 chips of 16.0 GB" in capsys.readouterr().out


def test_the_tpu_compiler_takes_the_released_model(reports, capsys) -> None:
    """13B on 16 chips: what is counted here again is counted by hand."""
    sample.main(
        ["--bundle", "framepack_i2v", "--height", "608", "--width", "640", "--dry-run", "v5e:4x4"]
    )
    (made,) = reports
    step, fsdp = made.step, made.mesh["fsdp"]
    parameters = {name: network.parameters for name, network in made.networks.items()}
    assert parameters["transformer"] == 12_874_314_816
    assert parameters["vae"] == 246_478_803
    assert parameters["text_encoder"] == 7_068_958_720

    # The compiler's own figure: weights in pieces, some small ones whole, and little else.
    pieces = 2 * 12_874_314_816 / fsdp
    assert pieces < step.arguments < 1.05 * pieces
    rest = 2 * (7_068_958_720 + 123_060_480 + 412_987_248) / fsdp + 4 * 246_478_803
    assert made.resident - made.networks["transformer"].bytes == pytest.approx(rest, rel=0.01)
    assert made.total >= step.arguments + rest and made.fits

    # 60 blocks, each token by four d x d and two d x 4d products, and all tokens by each other.
    tokens, width = 17500 + 729 + 256, 3072
    blocks = 60 * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)
    assert made.flops == pytest.approx(blocks, rel=0.005)

    assert {name.partition("_")[0] for name in step.kernels} == {"splash"}
    assert sum(step.kernels.values()) == 60
    # Weights of 40 single and of both halves of 20 double blocks are gathered, but for modulations.
    gathered = 2 * (40 + 2 * 20) * 12 * width**2 * (fsdp - 1) / fsdp
    assert gathered <= step.collectives["all-gather"].bytes < 1.5 * gathered
    assert "modelled" in capsys.readouterr().out


TRAIN = ("--bundle", "random", "--dry-run-size", "64x80", "--batch", "4", "--remat", "full")


@pytest.fixture
def training_reports(monkeypatch) -> list[TrainingReport]:
    made = []
    real = train.dry_run_training
    monkeypatch.setattr(
        train, "dry_run_training", lambda *a, **k: made.append(real(*a, **k)) or made[-1]
    )
    return made


def test_the_tpu_compiler_takes_a_tiny_training_step(training_reports, capsys) -> None:
    """All that a step holds is divided, and counted by hand."""
    train.main([*TRAIN, "--ema", "0.9", "--dry-run", "v5e:2x2", "--mesh", "fsdp=4"])
    (made,) = training_reports
    assert made.parameters == made.trained == 331_168 and made.frozen == 0
    # float32 parameters, two moments and an average, almost all of it in four parts.
    assert 4 * made.trained < made.state < 1.2 * 4 * made.trained
    assert made.program.arguments >= made.state
    # 9 frames of 4 x 5 patches, 2 under k1, 2 under k2 (2 x 3 patches), 16 under k4 (1 x 2 x 4).
    assert made.tokens == 11 * 20 + 6 + 8 + 9 + 256
    assert made.fits
    printed = capsys.readouterr().out
    assert "331,168 trained by adamw" in printed and ": fits" in printed


def test_training_that_does_not_fit_ends_with_code_1(this_cpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(TrainingReport, "total", property(lambda report: 200 * 10**9))
    flags = (
        "--trainable",
        "lora",
        "--lora.rank",
        "2",
        "--init",
        "bundle",
        "--grad-accum-steps",
        "2",
    )
    with pytest.raises(SystemExit) as ended:
        train.main([*TRAIN, *flags, "--dry-run", "h200:1"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "does not fit, 49.9 GB too much; a smaller --batch" in printed
    assert "in 2 parts" in printed


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--dry-run", "h300:1"), "machine 'h300:1' is unknown"),
        (("--dry-run", "h200:1", "--dry-run-size", "wide"), "--dry-run-size wide"),
        (("--dry-run", "h200:1", "--mesh", "fsdp=2"), "multiply to 2"),
    ],
)
def test_errors_of_training_dry_runs(this_cpu, more, named) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        train.main([*TRAIN, *more])
