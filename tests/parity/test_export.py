"""Bundles out again as PyTorch checkpoints: the libraries load them, and no bit is lost."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest, Role
from framepack_jax.conversion import engine, export, export_configs, lora, tables, weight_files
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import registry
from framepack_jax.models.encoders import clip, siglip
from framepack_jax.models.hunyuan.config import TransformerConfig, VaeConfig
from tests.fixtures.checkpoints import CLIP, SIGLIP, SIZES
from tests.fixtures.paths import ROOT
from tests.fixtures.torch_reference import randomize

FRAMEPACK = {"has_image_proj": True, "image_proj_dim": 10, "has_clean_x_embedder": True}
VAE = {
    "block_out_channels": (4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
    "latent_channels": 5, "scaling_factor": 0.476986, "spatial_compression_ratio": 4,
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
}  # fmt: skip
CLIP_CONFIG = transformers.CLIPTextConfig(**CLIP)
SIGLIP_CONFIG = transformers.SiglipVisionConfig(**SIGLIP, vision_use_head=False)
# Name -> role in a bundle, and how to make one.
MODULES = {
    "framepack": (
        "transformer", lambda: HunyuanVideoFramepackTransformer3DModel(**SIZES, **FRAMEPACK)
    ),
    "base": ("transformer", lambda: HunyuanVideoTransformer3DModel(**SIZES)),
    "vae": ("vae", lambda: AutoencoderKLHunyuanVideo(**VAE)),
    "clip": ("text_encoder_2", lambda: transformers.CLIPTextModel(CLIP_CONFIG)),
    "siglip": ("image_encoder", lambda: transformers.SiglipVisionModel(SIGLIP_CONFIG)),
}  # fmt: skip


def module_of(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    _, make = MODULES[name]
    return randomize(make(), 1).to(dtype)


def bundle_of(module: torch.nn.Module, name: str, folder: Path) -> str:
    """The module converted by the command's own function."""
    module.save_pretrained(folder / "source")
    source = folder / "source"
    for file in ("tokenizer_config.json", "preprocessor_config.json"):
        (source / file).write_text("{}")
    make_bundle(BundleRequest(output=str(folder / "bundle"), **{MODULES[name][0]: source}))
    return str(folder / "bundle")


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(
        ours[k].dtype == theirs[k].dtype
        and ours[k].shape == theirs[k].shape
        and torch.equal(ours[k].view(torch.uint8), theirs[k].view(torch.uint8))
        for k in ours
    )


# What the libraries make of it


@pytest.mark.parametrize("name", MODULES)
def test_the_libraries_load_a_folder(name: str, tmp_path, monkeypatch) -> None:
    module = module_of(name)
    root = bundle_of(module, name, tmp_path)
    target = tmp_path / "deep" / "out"
    role = MODULES[name][0]
    shard = bundle.stored_bytes(root, bundle.read_manifest(root), role) // 4
    monkeypatch.setattr(export, "SHARD", shard)
    cli.main(["export", str(target), "--bundle", root, "--role", role])
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2
    for tensors in map(load_file, shards):
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard
    # diffusers and transformers name the flag differently.
    flag = "dtype" if isinstance(module, transformers.PreTrainedModel) else "torch_dtype"
    loaded, info = type(module).from_pretrained(
        target, output_loading_info=True, **{flag: torch.bfloat16}
    )
    assert not any(info.values()), info
    assert same_bits(loaded.state_dict(), module.state_dict())
    assert config_of(loaded) == config_of(module)


def config_of(module: torch.nn.Module) -> dict[str, Any]:
    """Without notes about where it was loaded from, and by which version."""
    config = module.config
    fields = config if isinstance(config, dict) else config.to_dict()
    notes = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype",
             "_use_default_values")  # fmt: skip
    return json.loads(json.dumps({k: v for k, v in fields.items() if k not in notes}))


def test_the_loaded_model_gives_the_same_output(tmp_path) -> None:
    module = module_of("framepack", torch.float32)
    root = bundle_of(module, "framepack", tmp_path)
    cli.main(["export", str(tmp_path / "out"), "--bundle", root])
    loaded = type(module).from_pretrained(tmp_path / "out").eval()
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    inputs = {
        "hidden_states": normal(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": normal(1, 3, 20),
        "encoder_attention_mask": torch.ones(1, 3, dtype=torch.long),
        "pooled_projections": normal(1, 12),
        "image_embeds": normal(1, 4, 10),
        "indices_latents": torch.tensor([9, 10]),
        "guidance": torch.tensor([6000.0]),
        "latents_clean": normal(1, 16, 1, 4, 4),
        "indices_latents_clean": torch.tensor([0]),
        "latents_history_2x": normal(1, 16, 2, 4, 4),
        "indices_latents_history_2x": torch.tensor([1, 2]),
        "latents_history_4x": normal(1, 16, 4, 4, 4),
        "indices_latents_history_4x": torch.tensor([3, 4, 5, 6]),
    }
    with torch.no_grad():
        theirs, ours = (m(**inputs, return_dict=False)[0] for m in (module, loaded))
    assert theirs.std() > 0.1
    assert torch.equal(ours, theirs)


@pytest.mark.golden
def test_the_original_file_comes_back(golden, tmp_path) -> None:
    """Tencent's own file -> bundle -> one safetensors file: the same tensors, the final modulation
    with its halves in the original order."""
    file = golden / "hunyuan_original" / "mp_rank_00_model_states.pt"
    root = str(tmp_path / "bundle")
    make_bundle(BundleRequest(output=root, transformer=file, rope_axes="4,6,6"))
    target = tmp_path / "out.safetensors"
    cli.main(["export", str(target), "--bundle", root])
    theirs = torch.load(file, weights_only=True)["module"]
    assert same_bits(load_file(target), dict(theirs))


# In and out again


@st.composite
def configs(draw, framepack: bool) -> TransformerConfig:
    """Small transformers of every shape that the tables tell apart."""
    return TransformerConfig(
        in_channels=draw(st.sampled_from([4, 16])),
        out_channels=draw(st.sampled_from([4, 16])),
        heads=draw(st.integers(1, 3)),
        head_dim=16,
        double_layers=draw(st.integers(1, 3)),
        single_layers=draw(st.integers(1, 12)),
        refiner_layers=draw(st.integers(1, 2)),
        mlp_ratio=draw(st.sampled_from([1.0, 2.5, 4.0])),
        text_dim=draw(st.integers(1, 9)),
        pooled_dim=draw(st.integers(1, 9)),
        image_dim=draw(st.integers(1, 9)) if framepack else None,
        guidance=draw(st.booleans()),
        rope_axes=(4, 6, 6),
        context_kernels=("k1", "k2", "k4") if framepack else (),
    )


def random_bundle(
    root: Path, cfg: TransformerConfig, seed: int, scale: float = 1
) -> dict[str, np.ndarray]:
    """A bundle of random bits in several dtypes; returns its leaves."""
    random = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in registry.abstract_leaves("hunyuan_packed_dit", cfg).items():
        half = "mod" in path and scale == 1
        dtype = "float32" if "norm" in path else "float16" if half else "bfloat16"
        values = scale * random.standard_normal(leaf.shape, np.float32)
        leaves[path] = values.astype(jnp.dtype(dtype))
    bundle.write_params(root / "transformer", leaves.items())
    role = Role("hunyuan_packed_dit", json.loads(json.dumps(vars(cfg))), "transformer")
    bundle.write_manifest(
        root, Manifest({"transformer": role}, (0.0,), (2.0,), "{}", packing.parse("g9"))
    )
    return leaves


@pytest.mark.parametrize(
    ("form", "framepack"),
    [("folder", True), ("folder", False), ("diffusers", True), ("diffusers", False),
     ("original", False), ("comfyui", False)],
)  # fmt: skip
@settings(max_examples=4, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_in_and_out_again_no_bit_is_lost(form, framepack, data, seed, tmp_path_factory) -> None:
    """Out in some form, in again: the same types and bits. The forms: every naming of a file, and a
    folder in shards."""
    cfg = data.draw(configs(framepack))
    root = tmp_path_factory.mktemp("random")
    leaves = random_bundle(root, cfg, seed)
    naming = "diffusers" if form == "folder" else form
    network = export.Export(root, bundle.read_manifest(root), "transformer", naming)
    target = root / (form if form == "folder" else "out.safetensors")
    with mock.patch.object(export, "SHARD", 20_000):
        (network.folder if form == "folder" else network.single)(target)
    source = tables.recognise(weight_files.open_checkpoint(target), "transformer")
    plan = engine.plan(dataclasses.replace(source, overrides={"rope_axes": (4, 6, 6)}))
    assert plan.cfg == cfg if form == "folder" else plan.cfg.width == cfg.width
    again = dict(plan.leaves())
    assert again.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert again[path].dtype == leaf.dtype, path
        assert again[path].tobytes() == leaf.tobytes(), path


@st.composite
def other_configs(draw, role: str) -> Any:
    """Small networks of the other roles, in the shapes that their configs allow."""
    size = st.integers(1, 3)
    match role:
        case "vae":
            widths = draw(st.lists(st.sampled_from([4, 8, 12]), min_size=3, max_size=4))
            return VaeConfig(
                latent_channels=draw(st.sampled_from([4, 16])), channels=tuple(widths),
                layers_per_block=draw(size), norm_groups=draw(st.sampled_from([2, 4])),
                space_compression=draw(st.sampled_from([4, 8])),
                time_compression=draw(st.sampled_from([2, 4])),
            )  # fmt: skip
        case "text_encoder_2":
            heads = draw(size)
            return clip.ClipConfig(
                vocab_size=draw(st.integers(10, 40)), width=4 * heads, layers=draw(size),
                heads=heads, mlp_width=draw(st.integers(1, 9)), eos_token_id=1,
            )  # fmt: skip
        case _:
            heads, patch = draw(size), draw(st.sampled_from([2, 7]))
            return siglip.SiglipConfig(
                width=4 * heads, layers=draw(size), heads=heads,
                mlp_width=draw(st.integers(1, 9)), image_size=patch * draw(size), patch_size=patch,
            )  # fmt: skip


OTHERS = {"vae": "hunyuan_vae", "text_encoder_2": "clip_text", "image_encoder": "siglip_vision"}


@pytest.mark.parametrize("role", OTHERS)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_other_networks_lose_no_bit_either(role, data, seed, tmp_path_factory) -> None:
    """A folder of any size, in again: config, types and bits."""
    cfg = data.draw(other_configs(role))
    root, random = tmp_path_factory.mktemp("random"), np.random.default_rng(seed)
    leaves = {
        path: random.standard_normal(leaf.shape, np.float32).astype(
            jnp.dtype("float32" if "norm" in path else "bfloat16")
        )
        for path, leaf in registry.abstract_leaves(OTHERS[role], cfg).items()
    }
    bundle.write_params(root / role, leaves.items())
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))
    roles = {role: Role(OTHERS[role], fields, role)}
    channels = cfg.latent_channels if role == "vae" else 1
    bundle.write_manifest(
        root, Manifest(roles, (0.0,) * channels, (2.0,) * channels, "{}", packing.parse("g9"))
    )
    files = {"tokenizer_2": "tokenizer_config.json", "image_processor": "preprocessor_config.json"}
    for name, file in files.items():
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    naming = export.default_naming(bundle.read_manifest(root), role)
    export.Export(root, bundle.read_manifest(root), role, naming).folder(root / "out")
    plan = engine.plan(tables.recognise(weight_files.open_checkpoint(root / "out"), role))
    assert plan.cfg == cfg
    again = dict(plan.leaves())
    assert again.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert again[path].dtype == leaf.dtype, path
        assert again[path].tobytes() == leaf.tobytes(), path


def test_types_can_be_changed_on_the_way_out(tmp_path) -> None:
    module = module_of("base")
    root = bundle_of(module, "base", tmp_path)
    target = tmp_path / "wide.safetensors"
    cli.main(
        ["export", str(target), "--bundle", root, "--dtype", "float32", "--key-format", "diffusers"]
    )
    wide = {name: tensor.float() for name, tensor in module.state_dict().items()}
    assert same_bits(load_file(target), wide)


def test_names_of_a_single_file(tmp_path) -> None:
    """A base model goes out in the original names, a FramePack model, which has none, does not."""
    cfg = TransformerConfig(
        heads=1, head_dim=16, double_layers=1, single_layers=1, refiner_layers=1, text_dim=2,
        pooled_dim=2, image_dim=3, rope_axes=(4, 6, 6),
    )  # fmt: skip
    random_bundle(tmp_path, cfg, 0)
    cli.main(["export", str(tmp_path / "a.safetensors"), "--bundle", str(tmp_path)])
    assert "clean_x_embedder.proj_4x.weight" in load_file(tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match="goes out in diffusers' names"):
        args = ["export", str(tmp_path / "b.safetensors"), "--bundle", str(tmp_path)]
        cli.main([*args, "--key-format", "original"])
    assert not (tmp_path / "b.safetensors").exists()


def test_a_vae_file_has_bare_names(tmp_path) -> None:
    """As the VAE loaders of ComfyUI and Tencent look for them."""
    module = module_of("vae")
    root = bundle_of(module, "vae", tmp_path)
    cli.main(["export", str(tmp_path / "vae.safetensors"), "--bundle", root, "--role", "vae"])
    assert same_bits(load_file(tmp_path / "vae.safetensors"), module.state_dict())


def test_a_lora_goes_out_in_other_names(framepack_bundle, tmp_path, capsys) -> None:
    manifest = bundle.read_manifest(framepack_bundle)
    _, cfg = bundle.role_config(manifest, "transformer")
    random = np.random.default_rng(0)
    module = "transformer.transformer_blocks.0.attn.to_out.0"
    down, up = (random.standard_normal(s).astype(np.float32) for s in ((3, 32), (32, 3)))
    factors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(factors, tmp_path / "in.safetensors")
    args = ["--bundle", framepack_bundle, "--lora", str(tmp_path / "in.safetensors")]
    target = tmp_path / "out.safetensors"
    cli.main(["export", str(target), *args, "--key-format", "kohya"])
    assert "1 of 1 modules apply" in capsys.readouterr().out
    flat = "lora_unet_transformer_blocks_0_attn_to_out_0"
    made = load_file(target)
    assert made.keys() == {f"{flat}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    np.testing.assert_array_equal(made[f"{flat}.lora_up.weight"], up)
    theirs, ours = (lora.read(tmp_path / f"{n}.safetensors", cfg).lora for n in ("in", "out"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(SystemExit, match="exists already"):
        cli.main(["export", str(target), *args, "--key-format", "kohya"])
    with pytest.raises(SystemExit, match="expected one of diffusers, original, kohya"):
        cli.main(["export", str(tmp_path / "x.safetensors"), *args, "--key-format", "tencent"])


def test_numbers_that_a_type_cannot_hold_do_not_go_out(tmp_path) -> None:
    cfg = TransformerConfig(
        heads=1, head_dim=16, double_layers=1, single_layers=1, refiner_layers=1, text_dim=2,
        pooled_dim=2, image_dim=3, rope_axes=(4, 6, 6),
    )  # fmt: skip
    random_bundle(tmp_path, cfg, 0, scale=1e5)
    with pytest.raises(SystemExit, match=r"weight holds \d+ numbers .* float16 cannot hold"):
        cli.main(["export", str(tmp_path / "a.safetensors"), "--bundle", str(tmp_path),
              "--dtype", "fp16"])  # fmt: skip
    assert not (tmp_path / "a.safetensors").exists()


# What is refused, and what is left behind


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "framepack export needs --bundle"),
        (["--bundle", "{absent}"], "is not a bundle"),
        (["--bundle", "{bundle}", "--role", "vae"], "has no vae"),
        (["--bundle", "{bundle}", "--dtype", "int8"], "int8"),
        (["--bundle", "{bundle}", "--key-format", "original"], "ends in .safetensors"),
        (["--bundle", "{bundle}", "--key-format", "theirs"], "expected one of diffusers, original"),
    ],
)
def test_export_errors_are_one_message(args, said, framepack_bundle, tmp_path) -> None:
    paths = {"bundle": framepack_bundle, "absent": tmp_path / "absent"}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(tmp_path / "out"), *(arg.format(**paths) for arg in args)])
    assert stopped.value.code.startswith("error: ") and said in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_to_an_object_store(framepack_bundle) -> None:
    with pytest.raises(SystemExit, match="not written to gs://"):
        cli.main(["export", "gs://there/x", "--bundle", framepack_bundle])


@pytest.fixture(scope="module")
def framepack_bundle(tmp_path_factory) -> str:
    return bundle_of(module_of("framepack"), "framepack", tmp_path_factory.mktemp("framepack"))


def test_nothing_is_written_over(framepack_bundle, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    (tmp_path / "there.safetensors").write_text("mine")
    for target in ("there", "there.safetensors"):
        with pytest.raises(SystemExit, match="is there"):
            cli.main(["export", str(tmp_path / target), "--bundle", framepack_bundle])
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_llama_and_other_kernels_do_not_go_out(framepack_bundle, tmp_path) -> None:
    manifest = bundle.read_manifest(framepack_bundle)
    with pytest.raises(ConversionError, match="make no whole model"):
        export._steps("text_encoder", "diffusers", None)
    role = manifest.roles["transformer"]
    cfg = bundle.config_from_json(TransformerConfig, {**role.config, "context_kernels": ["k1"]})
    with pytest.raises(ConversionError, match="embeds context with k1; diffusers'"):
        export_configs.CONFIGS["transformer"](cfg, manifest)


def test_a_full_disk_is_told_before(framepack_bundle, tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda folder: usage)
    for target in ("out", "out.safetensors"):
        with pytest.raises(SystemExit, match=r"needs 0\.0\d* GB, and 0\.0\d* GB are free"):
            cli.main(["export", str(tmp_path / "deep" / target), "--bundle", framepack_bundle])
    source = Path(framepack_bundle).parent / "source"
    with pytest.raises(ConversionError, match="are free there"):
        make_bundle(BundleRequest(output=str(tmp_path / "bundle"), transformer=source))
    assert list(tmp_path.iterdir()) == []
    size = bundle.stored_bytes(
        framepack_bundle, bundle.read_manifest(framepack_bundle), "transformer"
    )
    usage.free = size
    make_bundle(BundleRequest(output=str(tmp_path / "bundle"), transformer=source))
    # What an old bundle takes comes back before its place is needed.
    usage.free = 10_000
    make_bundle(BundleRequest(output=str(tmp_path / "bundle"), transformer=source, overwrite=True))


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_what_a_stopped_export_left_makes_room(
    target, framepack_bundle, tmp_path, monkeypatch
) -> None:
    partial = tmp_path / f".{target}.partial"
    if target == "out":
        partial.mkdir()
    else:
        partial.write_bytes(b"half")
    there = []
    monkeypatch.setattr(engine, "check_space", lambda *_: there.append(partial.exists()))
    cli.main(["export", str(tmp_path / target), "--bundle", framepack_bundle])
    assert there == [False]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_an_interrupted_export_leaves_nothing_with_its_name(
    target, framepack_bundle, tmp_path, monkeypatch
) -> None:
    args = ["export", str(tmp_path / target), "--bundle", framepack_bundle]
    monkeypatch.setattr(export, "SHARD", 30_000)
    invert, calls = export.invert, iter(range(60))

    def power_cut(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return invert(*args)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr(export, "invert", power_cut)
        cli.main(args)
    assert not (tmp_path / target).exists()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name == f".{target}.partial"
    cli.main(args)
    assert [path.name for path in tmp_path.iterdir()] == [target]


# Children of one process, each killed at a write of its own: the leaves of a plan are counted.
KILLED = """
import os, random, sys
from pathlib import Path
from framepack_jax import bundle
from framepack_jax.bundle import writer
from framepack_jax.conversion import engine
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest

source, output = sys.argv[1:]
request = BundleRequest(output=output, transformer=Path(source))
leaves = engine.ConversionJob.leaves
writer.WRITE_CHUNK = 5_000

def cut_after(count):
    def cut(self, dtype=None):
        for number, leaf in enumerate(leaves(self, dtype)):
            if number == count:
                os.kill(os.getpid(), 9)
            yield leaf
        if count < 0:
            bundle.write_manifest = lambda *_: os.kill(os.getpid(), 9)
    return cut

points = [*random.Random(0).sample(range(76), 2), -1]
for point in points:
    child = os.fork()
    if child == 0:
        engine.ConversionJob.leaves = cut_after(point)
        make_bundle(request)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"not killed at {point}"
    try:
        bundle.read_manifest(output)
    except bundle.BundleError:
        continue
    raise AssertionError(f"killed at {point}, it looks finished")
make_bundle(request)
"""


def test_killed_at_any_point_nothing_looks_finished(framepack_bundle, tmp_path) -> None:
    source = Path(framepack_bundle).parent / "source"
    output = tmp_path / "bundle"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(source), str(output)],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True, timeout=300,
    )  # fmt: skip
    ours, whole = (
        bundle.read_manifest(root).roles["transformer"] for root in (output, framepack_bundle)
    )
    assert ours.source["sha256"] == whole.source["sha256"]
