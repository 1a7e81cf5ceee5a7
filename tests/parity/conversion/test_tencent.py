"""Tencent's own files: converted networks give the original outputs."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from framepack_jax import bundle
from framepack_jax.cli.convert import main
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.hunyuan import vae
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.tiling import Tiling
from framepack_jax.packing import PackedContext
from tests.fixtures.checkpoints import assert_every_number_moved_once, plan_of
from tests.fixtures.lora import PARITY
from tests.fixtures.torch_reference import relative_error


@pytest.fixture(scope="module")
def original(golden, tmp_path_factory) -> Path:
    """A bundle of Tencent's own files."""
    output = tmp_path_factory.mktemp("original") / "bundle"
    folder = golden / "hunyuan_original"
    args = ["--transformer", str(folder / "mp_rank_00_model_states.pt"), "--rope-axes", "4,6,6"]
    args += ["--vae", str(folder / "pytorch_model.pt"), "--output", str(output)]
    main(args)
    return output


@pytest.mark.golden
def test_original_transformer_agrees(original, golden) -> None:
    reference = load_file(golden / "hunyuan_original" / "reference.safetensors")
    manifest = bundle.read_manifest(original)
    _, cfg = bundle.role_config(manifest, "transformer")
    assert cfg.context_kernels == () and cfg.image_dim is None and cfg.guidance
    params = bundle.load_params(original, manifest, "transformer")
    x = np.moveaxis(reference["latents"], 1, -1)
    conditions = Conditions(
        jnp.asarray(reference["text"]), jnp.asarray(reference["text_mask"] != 0),
        jnp.asarray(reference["pooled"]), None, jnp.asarray(reference["guidance"] / 1000),
    )  # fmt: skip
    context = PackedContext((), (), jnp.arange(x.shape[1])[None, :], ())
    sigma = jnp.asarray(reference["timestep"] / 1000)
    ours = TRANSFORMER.velocity(cfg, params, jnp.asarray(x), sigma, context, conditions)
    assert relative_error(np.moveaxis(ours, -1, 1), reference["output"]) <= PARITY


@pytest.mark.golden
def test_original_vae_agrees(original, golden) -> None:
    reference = load_file(golden / "hunyuan_original" / "reference.safetensors")
    manifest = bundle.read_manifest(original)
    _, cfg = bundle.role_config(manifest, "vae")
    params = bundle.load_params(original, manifest, "vae")
    whole = Tiling(frames=None)
    pixels = jnp.asarray(np.moveaxis(reference["vae_pixels"], 1, -1))
    mean, logvar = vae.encode(cfg, params, pixels, whole)
    decoded = vae.decode(cfg, params, jnp.asarray(np.moveaxis(reference["vae_mean"], 1, -1)), whole)
    ours = {"vae_mean": mean, "vae_logvar": logvar, "vae_decoded": decoded}
    for name, value in ours.items():
        assert relative_error(np.moveaxis(value, -1, 1), reference[name]) <= PARITY, name
    np.testing.assert_allclose(manifest.latent_std, [1 / 0.476986] * 16)


@pytest.mark.golden
def test_original_weights_are_all_used(golden) -> None:
    folder = golden / "hunyuan_original"
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    plan = plan_of(folder / "mp_rank_00_model_states.pt", rope_axes=(4, 6, 6))
    leaves = dict(plan.leaves())
    assert_every_number_moved_once(leaves, tensors)
    shift, scale = np.split(tensors["final_layer.adaLN_modulation.1.weight"], 2)
    np.testing.assert_array_equal(leaves["head/mod/kernel"], np.concatenate([scale, shift]).T)
    linear1 = tensors["single_blocks.2.linear1.weight"]
    np.testing.assert_array_equal(leaves["single/02/mlp_in/kernel"], linear1[96:].T)
    np.testing.assert_array_equal(leaves["single/02/qkv/kernel"][:, 1, 1, 0], linear1[32 + 16])
    linear2 = tensors["single_blocks.0.linear2.weight"]
    np.testing.assert_array_equal(leaves["single/00/attn_out/kernel"], linear2[:, :32].T)
    state = torch.load(folder / "pytorch_model.pt", weights_only=True)["state_dict"]
    leaves = dict(plan_of(folder / "pytorch_model.pt", "vae").leaves())
    assert_every_number_moved_once(leaves, {name: t.numpy() for name, t in state.items()})


@pytest.mark.golden
def test_narrow_heads_need_their_rope_axes(golden) -> None:
    with pytest.raises(ConversionError, match="--rope-axes"):
        plan_of(golden / "hunyuan_original" / "mp_rank_00_model_states.pt")
