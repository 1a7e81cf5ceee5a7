"""Bundles against what they were made of; weights in 8 bits."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.bundle import BundleError
from framepack_jax.cli.convert import main
from framepack_jax.conversion import arrays, engine, safetensors_files, transformer, verify
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.verify import compare
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization, registry
from framepack_jax.models.hunyuan import transformer as transformer_model
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.quantization import cast_params
from framepack_jax.packing import PackedContext
from framepack_jax.parallel import sharding

CFG = TransformerConfig(
    heads=2, head_dim=16, double_layers=2, single_layers=3, refiner_layers=1, mlp_ratio=2.0,
    text_dim=20, pooled_dim=12, image_dim=10, rope_axes=(4, 6, 6),
)  # fmt: skip
BASE = dataclasses.replace(CFG, context_kernels=(), image_dim=None)
LEAF = "double/01/img_qkv/kernel"


def write_checkpoint(file: Path, cfg: TransformerConfig, dtype: str = "bfloat16") -> Path:
    """Random weights in diffusers' names."""
    random = np.random.default_rng(0)
    tensors = [
        safetensors_files.Tensor(name, shape, dtype)
        for step in engine.steps_of(transformer.DIFFUSERS, cfg)
        for name, shape in zip(step.sources, step.source_shapes(), strict=True)
    ]
    arrays = (random.standard_normal(t.shape, np.float32).astype(jnp.dtype(dtype)) for t in tensors)
    safetensors_files.write_safetensors(file, tensors, arrays)
    return file


def make(folder: Path, cfg: TransformerConfig = CFG, **flags) -> tuple[Path, str]:
    """(checkpoint, bundle)."""
    source = write_checkpoint(folder / "source.safetensors", cfg)
    root = str(folder / "bundle")
    make_bundle(BundleRequest(output=root, transformer=source, rope_axes="4,6,6", **flags))
    return source, root


def edit(root: str, path: str, change) -> None:
    """Write the transformer of a bundle anew with one leaf changed."""
    manifest = bundle.read_manifest(root)
    names = bundle.stored_dtypes(root, manifest, "transformer")
    leaves = dict(bundle.read_leaves(root, manifest, "transformer", names))
    leaves[path] = change(leaves[path].copy())
    bundle.write_params(Path(root) / "transformer", leaves.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    return make(tmp_path_factory.mktemp("made"))


def test_the_same_is_the_same(made, capsys) -> None:
    source, root = made
    cli.main(["verify", str(source), root])
    said = capsys.readouterr().out
    leaves = registry.abstract_leaves("hunyuan_packed_dit", CFG)
    size = sum(2 * leaf.size for leaf in leaves.values())
    assert f"transformer     {len(leaves):8,} {size:16,} {0:10,}" in said
    assert "differs" not in said and "cast" not in said


def flip_a_bit(array: np.ndarray) -> np.ndarray:
    array.reshape(-1).view(np.uint16)[-1] ^= 1
    return array


def test_one_bit_is_found_and_named(tmp_path, capsys) -> None:
    source, root = make(tmp_path)
    edit(root, LEAF, flip_a_bit)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", str(source), root])
    said = capsys.readouterr().out
    assert stopped.value.code == 1
    assert f"transformer differs in {LEAF}\n" in said
    (result,) = compare(source, root)
    assert result.differing == [LEAF]


def test_a_zero_of_the_other_sign_differs() -> None:
    zero = np.zeros((2, 3), np.float32)
    assert verify._same_bits(zero, zero.copy()) and not verify._same_bits(zero, -zero)
    nan = np.full((2, 3), np.nan, jnp.bfloat16)
    assert verify._same_bits(nan, nan.copy()) and not verify._same_bits(nan, nan.T)


@pytest.mark.parametrize("dtype", ["float32", *quantization.QUANTIZED])
def test_other_types_are_compared_after_the_same_cast(dtype, tmp_path) -> None:
    source, root = make(tmp_path, dtype=dtype)
    (result,) = compare(source, root)
    assert result.differing == [] and result.leaves > 80
    assert f"after a cast to {dtype}" in verify.table([result])
    edit(root, "double/00/img_out/bias", lambda array: array + array.dtype.type(1))
    (result,) = compare(source, root)
    assert result.differing == ["double/00/img_out/bias"]


def test_a_model_begun_from_a_base_is_compared_with_it(tmp_path) -> None:
    source, root = make(tmp_path, BASE, from_base=True, image_dim=10)
    (result,) = compare(source, root)
    assert result.differing == []
    edit(root, "embed/context_k2/kernel", flip_a_bit)
    (result,) = compare(source, root)
    assert result.differing == ["embed/context_k2/kernel"]


@pytest.mark.golden
def test_every_network_of_a_pipeline(golden, tmp_path, capsys) -> None:
    folder = golden / "diffusers_pipeline" / "pipeline"
    root = str(tmp_path / "bundle")
    main(["--pipeline", str(folder), "--output", root, "--dtype", "bfloat16"])
    capsys.readouterr()
    cli.main(["verify", str(folder), root])
    said = capsys.readouterr().out
    for role in bundle.ROLES:
        (line,) = [line for line in said.splitlines() if line.split(" ")[0] == role]
        assert int(line.split()[2].replace(",", "")) > 1000 and line.split()[3] == "0"
    cli.main(["verify", str(folder / "vae"), root])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_cannot_be_compared(made, tmp_path) -> None:
    source, root = made
    other = write_checkpoint(tmp_path / "other.safetensors", dataclasses.replace(CFG, text_dim=21))
    with pytest.raises(ConversionError, match="text_dim 21 there, 20 here"):
        compare(other, root)
    manifest = bundle.read_manifest(root)
    without = dataclasses.replace(manifest, roles={"vae": manifest.roles["transformer"]})
    with pytest.raises(ConversionError, match="holds none of the bundle's networks: vae"):
        verify.sources(source, without)
    with pytest.raises(SystemExit, match="is not a bundle"):
        cli.main(["verify", str(source), str(tmp_path)])
    with pytest.raises(SystemExit, match="does not exist"):
        cli.main(["verify", str(tmp_path / "absent"), root])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["convert"], "--output"),
        (["convert", "--output", "x", "--key-format", "original"], "--key-format"),
        (["verify", "source", "bundle", "--output", "x"], "--output"),
        (["export", "x", "--bundle", "bundle", "--output", "y"], "--output"),
        (["export", "x", "--bundle", "bundle", "--from-base"], "--from-base"),
    ],
)
def test_a_command_refuses_flags_of_another(args, said, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_inspect_is_there(made, capsys) -> None:
    source, root = made
    for path in (source, root):
        cli.main(["inspect", str(path)])
        assert "transformer" in capsys.readouterr().out


# Eight bits


@pytest.fixture(scope="module", params=quantization.QUANTIZED)
def small(tmp_path_factory, request) -> tuple[Path, str, str]:
    return *make(tmp_path_factory.mktemp("small"), dtype=request.param), request.param


def test_numbers_move_by_half_a_step_at_most(small) -> None:
    source, root, dtype = small
    manifest = bundle.read_manifest(root)
    exact = dict(verify.make_job(source, manifest, "transformer").leaves("float32"))
    types = bundle.stored_dtypes(root, manifest, "transformer")
    stored = dict(bundle.read_leaves(root, manifest, "transformer", types))
    kernels = {path for path, kept in types.items() if kept == dtype}
    assert kernels == {p for p in exact if p.endswith("/kernel") and p[:4] not in ("embe", "head")}
    for path in kernels:
        scale = stored[path.removesuffix("kernel") + quantization.SCALE]
        numbers = stored[path].astype(np.float32)
        largest = np.abs(numbers).max(axis=0)
        if dtype == "int8":
            assert (largest == 127).all(), "every channel has its own scale"
            np.testing.assert_allclose(scale, np.abs(exact[path]).max(axis=0) / 127, rtol=1e-6)
            most = scale[None] / 2
        else:
            assert ((largest >= 224) & (largest <= 448)).all(), "every channel has its own scale"
            np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)
            most = np.maximum(np.abs(exact[path]) / 16, scale[None] * 2.0**-10)
        error = np.abs(numbers * scale[None] - exact[path])
        assert (error <= most * (1 + 1e-5)).all(), path
        assert (error / most).max() > 0.5, "the bound is near"
    for path in exact.keys() - kernels:
        assert types[path] == "bfloat16"
    assert manifest.roles["transformer"].source["bytes"] == sum(x.nbytes for x in stored.values())
    plan = verify.make_job(source, manifest, "transformer")
    assert plan.nbytes(dtype) == sum(x.nbytes for x in stored.values())
    assert list(plan.paths(dtype)) == [path for path, _ in plan.leaves(dtype)]


def test_an_empty_channel_and_numbers_that_are_not_finite() -> None:
    kernel = np.array([[0.0, 1.0], [0.0, -2.0]], np.float32)
    quantized, scale = arrays.quantize("x/kernel", kernel, "int8")
    np.testing.assert_array_equal(quantized, [[0, 64], [0, -127]])
    np.testing.assert_allclose(scale, [2.0**-126, 2 / 127])
    quantized, scale = arrays.quantize("x/kernel", kernel, "float8_e4m3fn")
    np.testing.assert_array_equal(quantized.astype(np.float32), [[0, 128], [0, -256]])
    np.testing.assert_array_equal(scale, [1, 2**-7])
    for least, dtype in itertools.product((1e-45, 9e-43, 1e-40), quantization.QUANTIZED):
        kernel = np.array([[0.0, least]], np.float32)
        quantized, scale = arrays.quantize("x/kernel", kernel, dtype)
        np.testing.assert_allclose(quantized.astype(np.float32) * scale, kernel, atol=2.0**-127)
    for bad, dtype in itertools.product((np.nan, np.inf, -np.inf), quantization.QUANTIZED):
        with pytest.raises(ConversionError, match=f"numbers that are not finite; {dtype} cannot"):
            arrays.quantize("x/kernel", np.array([[0.0, bad]], np.float32), dtype)


def test_what_was_in_eight_bit_floats_stays_as_it_was() -> None:
    """Every finite number of the type, in channels whose largest is any of them."""
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = every[np.isfinite(every)]
    kernel = np.where(np.abs(every[:, None]) <= np.abs(every[None, :]), every[:, None], 0)
    quantized, scale = arrays.quantize("x/kernel", kernel, "float8_e4m3fn")
    np.testing.assert_array_equal(quantized.astype(np.float32) * scale[None], kernel)


def inputs() -> tuple:
    random = np.random.default_rng(1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    context = PackedContext(
        (normal(1, 1, 4, 4, 16),), (jnp.array([[0]]),), jnp.array([[5, 6]]), ("k1",)
    )
    conditions = Conditions(
        normal(1, 3, 20), jnp.ones((1, 3), bool), normal(1, 12), normal(1, 4, 10), jnp.ones(1)
    )
    return normal(1, 2, 4, 4, 16), jnp.full(1, 0.5), context, conditions


def test_kernels_compute_as_their_products_with_the_scales(small) -> None:
    """The output equals that of the network with each kernel multiplied out beforehand."""
    _, root, dtype = small
    manifest = bundle.read_manifest(root)
    params = bundle.load_params(root, manifest, "transformer", dtype=jnp.bfloat16)
    assert params["double"]["img_qkv"]["kernel"].dtype == jnp.dtype(dtype)
    assert params["double"]["img_qkv"][quantization.SCALE].dtype == jnp.float32
    assert params["double"]["img_qkv"][quantization.SCALE].shape == (2, 3, 2, 16)
    assert params["embed"]["patch"]["kernel"].dtype == jnp.bfloat16
    wide = {
        name: cast_params(part, jnp.float32)
        if name not in TRANSFORMER.stacks
        else jax.vmap(lambda layer: cast_params(layer, jnp.float32))(part)
        for name, part in params.items()
    }
    assert quantization.SCALE not in wide["double"]["img_qkv"]
    ours = transformer_model.velocity(CFG, params, *inputs())
    theirs = transformer_model.velocity(CFG, wide, *inputs())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_eight_bits_change_the_velocity_little(small, made) -> None:
    """By root mean square, of random toy weights."""
    x = inputs()

    def velocity(root: str) -> np.ndarray:
        params = bundle.load_params(root, bundle.read_manifest(root), "transformer")
        return np.asarray(transformer_model.velocity(CFG, params, *x))

    ours, theirs = velocity(small[1]), velocity(made[1])
    error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    assert 1e-4 < error < {"int8": 0.02, "float8_e4m3fn": 0.05}[small[2]]


def test_eight_bits_on_a_mesh(small) -> None:
    """Scales lie as the outputs of their kernels do; a mesh of one device divides nothing, but has
    every rule applied."""
    _, root, _ = small
    manifest = bundle.read_manifest(root)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = bundle.load_params(root, manifest, "transformer", mesh=mesh)
    plain = bundle.load_params(root, manifest, "transformer")
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    qkv = params["double"]["img_qkv"]
    layers, _, *outputs = qkv["kernel"].sharding.spec
    assert tuple(qkv[quantization.SCALE].sharding.spec) == (layers, *outputs)
    assert any(outputs), "the rule divides outputs"


def test_a_lost_scale_is_missed(tmp_path) -> None:
    _, root = make(tmp_path, dtype="int8")
    manifest = bundle.read_manifest(root)
    types = bundle.stored_dtypes(root, manifest, "transformer")
    leaves = dict(bundle.read_leaves(root, manifest, "transformer", types))
    lost = leaves.pop("double/01/img_qkv/kernel_scale")
    bundle.write_params(Path(root) / "transformer", leaves.items())
    with pytest.raises(BundleError, match=r"1 missing \(double/01/img_qkv/kernel_scale\)"):
        bundle.load_params(root, manifest, "transformer")
    leaves["embed/patch/kernel_scale"] = lost
    bundle.write_params(Path(root) / "transformer", leaves.items())
    with pytest.raises(BundleError, match=r"1 unexpected \(embed/patch/kernel_scale\)"):
        bundle.load_params(root, manifest, "transformer")


def test_eight_bits_do_not_go_out(small, tmp_path) -> None:
    _, root, dtype = small
    with pytest.raises(SystemExit, match=f"quantized to {dtype}"):
        cli.main(["export", str(tmp_path / "out"), "--bundle", root])
    assert not (tmp_path / "out").exists()
