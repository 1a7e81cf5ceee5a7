"""Export and conversion back keep config, types and bits."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest, Role
from framepack_jax.conversion import engine, export, tables, weight_files
from framepack_jax.models import registry
from framepack_jax.models.encoders import clip, siglip
from framepack_jax.models.hunyuan.config import TransformerConfig, VaeConfig
from framepack_jax.models.wan.vae_config import WanVaeConfig

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


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
    plan = engine.make_job(dataclasses.replace(source, overrides={"rope_axes": (4, 6, 6)}))
    assert plan.cfg == cfg if form == "folder" else plan.cfg.width == cfg.width
    again = dict(plan.leaves())
    assert again.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert again[path].dtype == leaf.dtype, path
        assert again[path].tobytes() == leaf.tobytes(), path


@st.composite
def other_configs(draw, kind: str) -> Any:
    """Small networks of the other kinds, in the shapes that their configs allow."""
    size = st.integers(1, 3)
    match kind:
        case "wan_vae":
            levels = draw(st.integers(2, 4))
            return WanVaeConfig(
                latent_channels=draw(size), width=draw(st.sampled_from([2, 4])),
                multipliers=tuple(draw(size) for _ in range(levels)), layers_per_block=draw(size),
                halves_time=tuple(draw(st.booleans()) for _ in range(levels - 1)),
            )  # fmt: skip
        case "hunyuan_vae":
            widths = draw(st.lists(st.sampled_from([4, 8, 12]), min_size=3, max_size=4))
            return VaeConfig(
                latent_channels=draw(st.sampled_from([4, 16])), channels=tuple(widths),
                layers_per_block=draw(size), norm_groups=draw(st.sampled_from([2, 4])),
                space_compression=draw(st.sampled_from([4, 8])),
                time_compression=draw(st.sampled_from([2, 4])),
            )  # fmt: skip
        case "clip_text":
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


OTHERS = {
    "hunyuan_vae": "vae", "wan_vae": "vae", "clip_text": "text_encoder_2",
    "siglip_vision": "image_encoder",
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_other_networks_lose_no_bit_either(kind, data, seed, tmp_path_factory) -> None:
    """A folder of any size, in again: config, types and bits."""
    cfg, role = data.draw(other_configs(kind)), OTHERS[kind]
    root, random = tmp_path_factory.mktemp("random"), np.random.default_rng(seed)
    leaves = {
        path: random.standard_normal(leaf.shape, np.float32).astype(
            jnp.dtype("float32" if "norm" in path else "bfloat16")
        )
        for path, leaf in registry.abstract_leaves(kind, cfg).items()
    }
    bundle.write_params(root / role, leaves.items())
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))
    roles = {role: Role(kind, fields, role)}
    channels = cfg.latent_channels if role == "vae" else 1
    bundle.write_manifest(
        root, Manifest(roles, (0.0,) * channels, (2.0,) * channels, "{}", packing.parse("g9"))
    )
    files = {"tokenizer_2": "tokenizer_config.json", "image_processor": "preprocessor_config.json"}
    for name, file in files.items():
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    export.Export(root, bundle.read_manifest(root), role, "diffusers").folder(root / "out")
    plan = engine.make_job(tables.recognise(weight_files.open_checkpoint(root / "out"), role))
    assert plan.cfg == cfg
    again = dict(plan.leaves())
    assert again.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert again[path].dtype == leaf.dtype, path
        assert again[path].tobytes() == leaf.tobytes(), path


def test_names_of_a_single_file(tmp_path) -> None:
    """A base model goes out in the original names, a FramePack model, which has none, does not."""
    cfg = TransformerConfig(
        heads=1, head_dim=16, double_layers=1, single_layers=1, refiner_layers=1, text_dim=2,
        pooled_dim=2, image_dim=3, rope_axes=(4, 6, 6),
    )  # fmt: skip
    random_bundle(tmp_path, cfg, 0)
    cli.main(["export", str(tmp_path / "a.safetensors"), "--bundle", str(tmp_path)])
    assert "clean_x_embedder.proj_4x.weight" in load_file(tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match="export a FramePack model in diffusers' names"):
        args = ["export", str(tmp_path / "b.safetensors"), "--bundle", str(tmp_path)]
        cli.main([*args, "--key-format", "original"])
    assert not (tmp_path / "b.safetensors").exists()


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
