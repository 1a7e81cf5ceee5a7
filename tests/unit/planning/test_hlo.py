"""Collectives and kernels, read from the text of compiled programs."""

import os
import subprocess
import sys

import pytest

from framepack_jax.planning import hlo
from tests.fixtures.hlo_text import hlo_of
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
    print(*(f"{kind} {tuple(traffic)[:3]}" for kind, traffic in collectives(text, nodes).items()))
"""


def test_collectives_of_a_loop_count_as_often_as_it_runs() -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Of 8 rows of 8 float32, each device has one already; of the seven others four are far away.
    got = 5 * 7 * 8 * 4
    assert done.stdout.splitlines() == [
        f"all-gather {(5, got, 0)}",
        f"all-gather {(5, got, got * 4 // 7)}",
    ]


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
    (found,) = hlo.collectives(text, [0] * 4 + [1] * 4).items()
    assert found[0] == kind and found[1][:3] == expected


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
    assert traffic[:3] == (1, received, 0)


@pytest.mark.parametrize(
    ("line", "overlapped"),
    [
        ("%r = f32[4]{0} all-gather(%x), replica_groups=[1,8]<=[8]", False),
        ("%r = (f32[1], f32[4]) all-gather-start(%x), replica_groups=[1,8]<=[8]", True),
        ("%r = (f32[1], f32[4]) all-gather-start(%x), replica_groups=[1,8]<=[8],"
         ' backend_config={"collective_backend_config":{"is_sync":true}}', False),
    ],
)  # fmt: skip
def test_asynchronous_collectives_run_beside_computing(line: str, overlapped: bool) -> None:
    traffic = hlo.collectives(hlo_of(line))["all-gather"]
    assert traffic.overlapped == overlapped and traffic.bytes == 14
    assert traffic.overlapped_bytes == 14 * overlapped
    assert traffic.exposed == hlo.Traffic(*(n * (not overlapped) for n in (1, 14, 0)))


# As libtpu 0.0.42 writes them: a gather in three parts of one chain, of which the second is fused
# with a product; a gather in one fusion; and an all-reduce of which each device keeps a part.
TPU_FUSIONS = """HloModule step, num_partitions=8

%fused_computation.1 (p: f32[1]) -> f32[8] {
  ROOT %a = f32[8] all-gather(%p), replica_groups={}, frontend_attributes={chain_id="3"}
}

%async_collective_fusion.7 (p: f32[1]) -> f32[8] {
  ROOT %b = f32[8] all-gather(%p), replica_groups={}, frontend_attributes={chain_id="3"}
}

%fused_computation.2 (p: f32[1]) -> f32[8] {
  ROOT %c = f32[8] all-gather(%p), replica_groups={}, frontend_attributes={chain_id="4"}
}

%all-reduce-scatter.5 (p: bf16[64]) -> bf16[8] {
  %d = bf16[64] all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %e = bf16[8] dynamic-slice(%d, %i), dynamic_slice_sizes={8}
}

ENTRY %main (x: f32[1]) -> f32[8] {
  %f = f32[8] fusion(%x), kind=kCustom, calls=%fused_computation.1
  %g = f32[8] fusion(%x), kind=kCustom, calls=%async_collective_fusion.7
  %h = f32[8] fusion(%x), kind=kCustom, calls=%fused_computation.2
  ROOT %k = bf16[8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.5
}
"""


def test_fusions_of_the_tpu_compiler() -> None:
    found = hlo.collectives(TPU_FUSIONS)
    # 7 of 8 float32 in each gather, and 7 parts of 8 bfloat16.
    assert found == {
        "all-gather": hlo.Traffic(2, 56, 0, 1, 28, 0), "reduce-scatter": hlo.Traffic(1, 112)
    }  # fmt: skip
    assert hlo.reductions(hlo.find_collectives(TPU_FUSIONS)) == {"bf16": 112}


def test_transfers_between_tpu_slices_go_by_the_hosts() -> None:
    """The program of a slice knows the devices of no other: half of a gather, and a sum."""
    slices = '_xla_megascale_target="{1,2}x{0:3}"'
    lines = [
        f"%{name} = ({result}, u32[], token[]) recv(%t), channel_id=5, is_host_transfer=true,"
        f' frontend_attributes={{{slices},_xla_megascale_transfer_type="{kind}"}}'
        for name, result, kind in (("a", "bf16[2,4]", "ALL_GATHER"), ("b", "f32[8]", "ALL_REDUCE"))
    ]
    text = hlo_of("\n  ".join([*lines, lines[0].replace("recv(", "send(")]))
    assert hlo.collectives(text, [0, 0, 1, 1]) == {
        "all-gather": hlo.Traffic(1, 8, 8, 1, 8, 8), "all-reduce": hlo.Traffic(1, 32, 32, 1, 32, 32)
    }  # fmt: skip


def test_a_type_of_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="array of type 'q16'"):
        hlo.collectives(hlo_of("%r = q16[4]{0} all-reduce(%x), replica_groups={}"))


def test_attributes_with_lines_of_their_own_end_no_computation() -> None:
    text = hlo_of(
        '%splash.1 = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof":"{}"\n}}, metadata={}',
        "%g = f32[8]{0} all-gather(%splash.1), channel_id=1, replica_groups=[4,2]<=[8]",
    )
    assert hlo.collectives(text) == {"all-gather": hlo.Traffic(1, 16)}
    assert hlo.kernels(text) == {"splash": 1}


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
    assert hlo.collectives(by_one)["collective-permute"].runs == 8
