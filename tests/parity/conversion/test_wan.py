"""Transformers of Wan and Helios: packed networks of base models, 8-bit weights, refused files."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.conversion import engine, tables, verify, wan_transformer, weight_files
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.packed_video import ContextEmbed
from framepack_jax.models.wan import transformer
from framepack_jax.packing import kernel_shape
from tests.fixtures.checkpoints import (
    abstract_checkpoint,
    assert_same,
    leaves_of,
    plan_of,
    scaled,
    write,
    write_folder,
)
from tests.fixtures.torch_reference import randomize, relative_error
from tests.fixtures.wan_networks import (
    MODULES,
    RELEASE_CONFIG,
    SMALL,
    arguments,
    draw,
    original_names,
    torch_velocity,
)

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch
FORWARD = "f1k1_x_f16k4f2k2f1k1_g9"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def modules() -> dict[str, torch.nn.Module]:
    return {name: randomize(MODULES[name](), seed=1) for name in ("wan", "helios")}


@pytest.fixture
def folders(modules, tmp_path) -> dict[str, Path]:
    return {name: write_folder(module, tmp_path / name) for name, module in modules.items()}


def converted(output: Path, transformer: Path, **given):
    """The manifest and the config of a new bundle."""
    request = BundleRequest(output=str(output), transformer=transformer, **given)
    manifest = make_bundle(request)
    return manifest, bundle.role_config(manifest, "transformer")[1]


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_a_packed_network_of_a_base_model(naming: str, modules, folders, tmp_path) -> None:
    source = folders["wan"]
    if naming == "original":
        source = write(
            original_names(modules["wan"].state_dict()), tmp_path / "o" / "x.safetensors"
        )
        (tmp_path / "o" / "config.json").write_text(RELEASE_CONFIG)
    manifest, cfg = converted(tmp_path / "b", source, from_base=True)
    base = plan_of(folders["wan"]).cfg
    assert not base.context_kernels and not base.clean_context and not base.prompt_to_target
    assert cfg == dataclasses.replace(
        base, context_kernels=("k1", "k2", "k4"), clean_context=True, prompt_to_target=True
    )
    assert str(manifest.schedule) == FORWARD
    paths = bundle.stored_dtypes(tmp_path / "b", manifest, "transformer")
    leaves = dict(bundle.read_leaves(tmp_path / "b", manifest, "transformer", list(paths)))
    plain = leaves_of(folders["wan"])
    context = {path for path in leaves if path.startswith("embed/context_")}
    assert len(context) == 6
    assert_same({path: leaf for path, leaf in leaves.items() if path not in context}, plain)
    np.testing.assert_array_equal(leaves["embed/context_k1/kernel"], plain["embed/patch/kernel"])
    [result] = verify.compare(source, tmp_path / "b")
    assert result.leaves == len(leaves) and not result.differing
    # Latents that are repeated on the coarser grid have the embeddings of the small latents.
    small = np.random.default_rng(0).standard_normal((1, 3, 4, 6, 16)).astype(np.float32)

    def tokens(name: str, latents: np.ndarray, kernel: str):
        params = {leaf: jnp.asarray(leaves[f"embed/{name}/{leaf}"]) for leaf in ("kernel", "bias")}
        return ContextEmbed(cfg).apply({"params": params}, jnp.asarray(latents), kernel)

    expected = tokens("patch", small, "k1")
    for kernel in ("k2", "k4"):
        times, rows, columns = kernel_shape(kernel)
        large = small.repeat(times, 1).repeat(rows // 2, 2).repeat(columns // 2, 3)
        assert relative_error(tokens(f"context_{kernel}", large, kernel), expected) < 1e-5


def test_other_kernels_by_the_schedule(folders, tmp_path) -> None:
    schedule = "f1k1_x_f8k2_g9"
    manifest, cfg = converted(tmp_path / "b", folders["wan"], from_base=True, schedule=schedule)
    assert cfg.context_kernels == ("k1", "k2") and str(manifest.schedule) == schedule


def test_schedules_that_nobody_gives(folders, tmp_path, capsys) -> None:
    """Helios' own, and one section without context for a base model."""
    assert str(converted(tmp_path / "h", folders["helios"])[0].schedule) == FORWARD
    assert str(converted(tmp_path / "w", folders["wan"])[0].schedule) == "g21"
    args = ["--transformer", str(folders["wan"]), "--from-base"]
    cli.main(["convert", "--output", str(tmp_path / "c"), *args])
    assert f"schedule {FORWARD}, order forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("helios", {"from_base": True}, "it is a packed model already; remove --from-base"),
        ("wan", {"from_base": True, "image_dim": 7}, r"Wan's .* reads no image .* --image-dim"),
        ("wan", {"schedule": FORWARD}, "has context, and .* a base model .* --from-base, or give"),
        ("helios", {"schedule": "f1k1_x_f2k8_g9"}, "needs kernels k8; the transformer has k1, k2"),
    ],
)
def test_flags_that_do_not_fit(name: str, given, said: str, folders, tmp_path) -> None:
    with pytest.raises(ConversionError, match=said):
        converted(tmp_path / "b", folders[name], **given)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("with_config", [True, False])
def test_history_embeddings_that_are_missing_are_named(with_config, folders) -> None:
    folder = folders["helios"]
    file = folder / "diffusion_pytorch_model.safetensors"
    checkpoint = weight_files.open_checkpoint(folder)
    state = {n: torch.from_numpy(checkpoint.read(n)) for n in checkpoint.names()}
    save_file({n: t for n, t in state.items() if not n.startswith("patch_mid")}, file)
    if not with_config:
        # Without a config, heads have the width of the release.
        (folder / "config.json").unlink()
    said = r"has no tensor patch_mid\.weight, but patch_.*Helios embeds its history .*whole"
    source = tables.recognise(weight_files.open_checkpoint(folder), "transformer")
    cfg = dataclasses.replace(wan_transformer.HELIOS, head_dim=12)
    with pytest.raises(ConversionError, match=said):
        engine.make_job(dataclasses.replace(source, like=cfg))


def strangers(state: State) -> dict[str, tuple[State, str]]:
    """Tensors of models that are near to Wan -> what the message says."""
    patch = state["patch_embedding.weight"]
    norm = "condition_embedder.image_embedder.norm1.weight"
    wide = {"patch_embedding.weight": patch.repeat(1, 3, 1, 1, 1)[:, :36]}
    larger = {
        "patch_embedding.weight": patch.repeat(1, 3, 1, 1, 1),
        "proj_out.weight": state["proj_out.weight"].repeat(3, 1),
        "proj_out.bias": state["proj_out.bias"].repeat(3),
    }
    return {
        "vace": ({"vace_patch_embedding.weight": patch}, "is a VACE model"),
        "i2v": (wide | {norm: patch[:, 0, 0, 0, 0]}, "is an image-to-video model of Wan"),
        "i2v 2.2": (wide, "reads 36 channels and predicts 16: it is an image-to-video"),
        "5B": (larger, "has 48 latent channels: it is Wan 2.2's model of 5B"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vace", "i2v", "i2v 2.2", "5B"])
@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_models_that_are_near_are_refused_by_name(name, naming, tmp_path) -> None:
    module = WanTransformer3DModel(**SMALL | {"attention_head_dim": 128})
    state = module.state_dict()
    added, said = strangers(state)[name]
    state |= added
    state = original_names(state) if naming == "original" else state
    if naming == "original":
        state = {n.replace("condition_embedder.image_embedder.norm1", "img_emb.proj.0"): t
                 for n, t in state.items()}  # fmt: skip
    source = tables.recognise(abstract_checkpoint(state, tmp_path), "transformer")
    with pytest.raises(ConversionError, match=f"{said}.* not supported; take a text-to-video"):
        engine.make_job(source)


def test_a_wrong_shard_is_named(modules, tmp_path) -> None:
    """One alone, and that of another model among the others."""
    folder, other = tmp_path / "m", tmp_path / "other"
    modules["wan"].save_pretrained(folder, max_shard_size="60KB")
    randomize(WanTransformer3DModel(**SMALL | {"ffn_dim": 30}), 2).save_pretrained(
        other, max_shard_size="60KB"
    )
    shards = [sorted(each.glob("*.safetensors")) for each in (folder, other)]
    names, others = ([file.name for file in files] for files in shards)
    assert names == others and len(names) > 2
    with pytest.raises(
        ConversionError, match=rf"is shard 2 of {len(names)}; give its folder, {folder}"
    ):
        converted(tmp_path / "b", shards[0][1])
    shards[0][1].write_bytes(shards[1][1].read_bytes())
    with pytest.raises(ConversionError, match=r"do not hold|another shape") as error:
        converted(tmp_path / "b", folder)
    assert str(folder) in str(error.value) and "blocks." in str(error.value)


def test_pipelines_of_wan_22_are_named(folders, tmp_path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folders["wan"], pipeline / "transformer")
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False,
    }  # fmt: skip

    def convert(output: str, from_base: bool, **fields):
        (pipeline / "model_index.json").write_text(json.dumps(index | fields))
        given = {"pipeline": pipeline, "from_base": from_base}
        return make_bundle(BundleRequest(output=str(tmp_path / output), **given))

    for from_base in (False, True):
        for field, value in (("boundary_ratio", 0.875), ("expand_timesteps", True)):
            with pytest.raises(ConversionError, match=f"Wan 2.2 .*{field} = {value}.*take Wan 2.1"):
                convert("refused", from_base, **{field: value})
    # How a base model is sampled says nothing about the packed model.
    assert str(convert("base", from_base=False).schedule) == "g21"
    packed = convert("packed", from_base=True)
    assert str(packed.schedule) == FORWARD and packed.sampling.decode_alone


def test_gguf_files_are_named(tmp_path) -> None:
    (tmp_path / "hub").mkdir()
    for file, content in (
        ("wan.gguf", b"GGUF" + bytes(64)), ("wan.safetensors", b"GGUF" + bytes(64)),
        ("cut.gguf", bytes(64)), ("hub/wan-Q4_K_M.gguf", b"GGUF" + bytes(64)),
    ):  # fmt: skip
        (tmp_path / file).write_bytes(content)
        given = tmp_path / "hub" if file.startswith("hub") else tmp_path / file
        with pytest.raises(ConversionError, match=f"{file} is a GGUF file.*take the same weights"):
            converted(tmp_path / "b", given)


def test_a_bundle_of_another_family_is_named(folders, framepack, tmp_path) -> None:
    converted(tmp_path / "b", folders["wan"])
    hunyuan = write_folder(framepack, tmp_path / "hunyuan")
    with pytest.raises(ConversionError, match=r"hunyuan_packed_dit.* is a wan_packed_dit"):
        verify.compare(hunyuan, tmp_path / "b")


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("float8_e4m3fn", 0.1)])
def test_8_bit_weights(dtype: str, bound: float, modules, folders, tmp_path) -> None:
    manifest, cfg = converted(tmp_path / "b", folders["helios"], dtype=dtype)
    stored = bundle.stored_dtypes(tmp_path / "b", manifest, "transformer")
    kernels = {path for path in stored if path.startswith("blocks/") and path.endswith("/kernel")}
    assert {path for path, kind in stored.items() if kind == dtype} == kernels
    assert len(kernels) == 2 * 7
    params = bundle.load_params(tmp_path / "b", manifest, "transformer")
    tensors = draw(4, 6, cfg.text_dim)
    out = transformer.velocity(cfg, params, *arguments(cfg, tensors))
    assert 1e-4 < relative_error(out, torch_velocity(modules["helios"], tensors)) < bound


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_8_bit_weights_of_comfyui(prefix: str, modules, tmp_path) -> None:
    stored, meant = scaled(original_names(modules["wan"].state_dict()), "()")
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    (tmp_path / "config.json").write_text(RELEASE_CONFIG)
    expected = leaves_of(write(meant, tmp_path / "meant.safetensors"))
    file = write(stored, tmp_path / "wan2.1_fp8_scaled.safetensors", prefix)
    plan = plan_of(file)
    assert_same(dict(plan.leaves()), expected)
    assert "20 of them scaled, read as bfloat16" in plan.source.checkpoint.format


def test_a_file_without_config_has_heads_of_the_release(tmp_path) -> None:
    state = WanTransformer3DModel(**SMALL).state_dict()
    source = tables.recognise(abstract_checkpoint(state, tmp_path), "transformer")
    with pytest.raises(ConversionError, match=r"no whole number of heads of 128; put its config"):
        engine.make_job(source)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ConversionError, match="belongs to another model"):
        engine.make_job(source)
