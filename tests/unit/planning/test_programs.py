"""Programs as the compiler of a TPU slice makes them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from framepack_jax import bundle
from framepack_jax.parallel import hardware, sharding
from framepack_jax.planning.programs import Program, RefusedError, compile_program
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.default_mesh import default_mesh

# A program for a machine that is not present cannot be read from the cache.
pytestmark = pytest.mark.usefixtures("compiled_anew")

WEIGHTS = {"up": (2, 1024, 4096), "down": (2, 4096, 1024)}


def gradient_of_blocks(mesh: jax.sharding.Mesh) -> Program:
    """Compile the gradient of two scanned feed-forward blocks, wide enough for the compiler to
    treat their weights as it treats those of the released model (the tiny networks' are not)."""

    def abstract(shape: tuple[int, ...], dtype: jnp.dtype, *axes: object) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def block(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        hidden = jax.nn.gelu(x @ w["up"].astype(x.dtype))
        return x + hidden @ w["down"].astype(x.dtype), None

    def loss(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        last, _ = jax.lax.scan(jax.checkpoint(block), x, w)
        return jnp.sum(last.astype(jnp.float32) ** 2)

    weights = {
        name: abstract(shape, jnp.dtype("float32"), None, "fsdp") for name, shape in WEIGHTS.items()
    }
    tokens = abstract((mesh.size, 256, 1024), jnp.dtype("bfloat16"), sharding.BATCH)
    places = jax.tree.map(lambda leaf: leaf.sharding, weights)
    gradient = jax.jit(jax.grad(loss), out_shardings=places)
    return compile_program("", "", weights, lambda: gradient.lower(weights, tokens), mesh, True)


def test_a_large_slice_gathers_weights_beside_products_and_scatters_gradients() -> None:
    """The default mesh and the flags together: without flags no gather is asynchronous, and with
    `fsdp` over all 32 chips every chip receives whole gradients."""
    devices = hardware.compile_devices(hardware.parse("v5p-64"))
    cfg = TrainConfig(bundle="framepack_i2v", output="run", batch=32)
    sizes = default_mesh(cfg, bundle.read_manifest(bundle.resolve(cfg.bundle)), devices)
    moved = gradient_of_blocks(sharding.make_mesh(**sizes, devices=devices)).collectives
    assert moved["all-gather"].overlapped > 0
    # What is left to sum over `data` is the part of each chip.
    assert moved["reduce-scatter"].bytes > 10 * moved["all-reduce"].bytes


def test_a_program_beyond_the_memory_of_a_chip_is_compiled_and_counted() -> None:
    devices = hardware.compile_devices(hardware.parse("v5e:2x2"))
    mesh = sharding.make_mesh(fsdp=4, devices=devices)
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    # 12 GB a chip, read and written.
    x = jax.ShapeDtypeStruct((12_000, 1_000_000), jnp.float32, sharding=where)
    program = compile_program("", "", x, lambda: jax.jit(lambda x: x + 1).lower(x), mesh)
    assert program.total(program.weights) >= 24e9


def test_a_program_that_the_compiler_refuses() -> None:
    """As libtpu refuses a program that needs far more memory than a chip has."""

    def lower() -> None:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU program.\nMore of it.")

    devices = hardware.compile_devices(hardware.parse("v5e:2x2"))
    mesh = sharding.make_mesh(fsdp=4, devices=devices)
    with pytest.raises(RefusedError) as found:
        compile_program("step", "take a smaller batch", {}, lower, mesh)
    assert str(found.value) == (
        "the compiler for TPU v5 lite refuses step (INVALID_ARGUMENT: Invalid TPU program.), most"
        " likely for want of memory; take a smaller batch"
    )
