"""The profile of a program counts right; no time is asserted."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
    step_profile,
)

UNNAMED = step_profile.UNNAMED


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> step_profile.Profile:
    """Profile of two products in a loop, under a name, and of their gradient."""

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            with jax.named_scope("layer"):
                return jnp.tanh(x @ w), None

        return jnp.square(jax.lax.scan(layer, x, w)[0]).sum()

    args = jnp.ones((256, 256)), jnp.ones((2, 256, 256))
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
    program = step_profile.Program(compiled, lambda: jax.block_until_ready(compiled(*args)))
    return step_profile.measure(program, tmp_path_factory.mktemp("trace"), runs=2)


def test_a_profile_knows_what_the_device_was_at(profile) -> None:
    assert profile.wall > 0 and all(seconds >= 0 for seconds in profile.by_operation.values())
    kinds = {operation.kind for operation in profile.by_operation}
    assert "matrix product" in kinds and "without a name" not in kinds
    paths = {operation.path for operation in profile.by_operation}
    assert {("layer",), ("backward", "layer")} <= paths


def test_a_step_is_traced(tmp_path, capsys) -> None:
    flags = ["--program", "denoise", "--scale", "toy", "--runs", "1", "--trace", str(tmp_path)]
    found = step_profile.main(flags)
    assert found.wall > 0 and list(tmp_path.rglob("*.xplane.pb"))
    text = capsys.readouterr().out
    assert text.startswith("denoise on cpu, ") and step_profile.table(found) in text
    for words in ("| matrix product |", "| SingleBlock/attention |", "DoubleBlock"):
        assert words in text


def test_the_table_of_a_profile() -> None:
    operation = step_profile.operations.Operation
    product, add = operation("matrix product", ("Block", "qkv")), operation("arithmetic", ())
    found = step_profile.Profile(0.004, {product: 0.003, add: 0.000995, UNNAMED: 0.000005})
    lines = step_profile.table(found).splitlines()
    assert lines[0] == "4.000 ms a run; instructions 4.000 ms in the trace"
    assert "| matrix product | 3.000 | 75.0% |" in lines
    assert "| Block/qkv | matrix product | 3.000 | 75.0% |" in lines
    assert lines[-1] == "| 1 smaller |  | 0.005 | 0.1% |"


def test_instructions_are_those_of_one_device() -> None:
    """Traces of GPUs, whose kernels carry the instruction, and of TPUs, whose events are it."""

    def plane(name: str, **lines: list[tuple[str, dict[str, str]]]) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            lines=[
                SimpleNamespace(
                    name=title.replace("_", " "),
                    events=[
                        SimpleNamespace(name=event, stats=stats.items(), duration_ns=1000)
                        for event, stats in events
                    ],
                )
                for title, events in lines.items()
            ],
        )

    host = plane("/host:CPU", python=[("dot.1", {"hlo_op": "dot.1"})])
    kernels = [("sm90_gemm", {"hlo_op": "dot.1"}), ("MemcpyD2D", {})]
    gpus = [plane(f"/device:GPU:{i}", Stream_1=kernels, Steps=[("0", {})]) for i in range(2)]
    found = list(step_profile.instructions(SimpleNamespace(planes=[host, *gpus])))
    assert found == [("dot.1", 1e-6), ("MemcpyD2D", 1e-6)]
    tpu = plane("/device:TPU:0", XLA_Ops=[("%fusion.3 = bf16[8]{0} fusion(...)", {})], Steps=[])
    found = list(step_profile.instructions(SimpleNamespace(planes=[host, tpu])))
    assert found == [("fusion.3", 1e-6)]
