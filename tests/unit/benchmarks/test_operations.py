"""Instructions by kind and module, read from the text of compiled programs."""

from benchmarks.operations import ARITHMETIC, MOVES, operations
from tests.fixtures.hlo_text import hlo_of


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
    found = operations(text)
    assert found.pop("w.1") is None
    assert {name: operation.kind for name, operation in found.items()} == {
        "p.1": MOVES, "t.1": ARITHMETIC, "i": MOVES, "less.1": MOVES,
        "s.1": MOVES, "c.1": "matrix product", "c.2": "attention", "splash_mha.1": "attention",
        "c.3": "convolution", "c.4": "other kernels", "v.1": "convolution",
        "v.2": "matrix product", "f.1": ARITHMETIC, "f.2": MOVES, "t.2": MOVES,
        "g.1": "exchange", "r.1": "reduction",
    }  # fmt: skip
    paths = {name: operation.path for name, operation in found.items() if operation.path}
    assert paths == {
        "t.1": ("Block", "gate"), "f.1": ("Block", "gate"), "c.1": ("B", "qkv"), "c.2": ("B", "a"),
        "splash_mha.1": ("B", "a"), "c.3": ("conv_in",), "t.2": ("backward", "dot_general"),
        "g.1": ("backward", "Block", "mlp"),
    }  # fmt: skip
