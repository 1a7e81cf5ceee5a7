"""FramePack models that begin from a HunyuanVideo model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import bundle
from framepack_jax.conversion import engine, tables, transformer, weight_files
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.packed_video import ContextEmbed
from framepack_jax.packing import kernel_shape
from tests.fixtures.checkpoints import CFG, plan_of, write_folder
from tests.fixtures.torch_reference import relative_error

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


@pytest.mark.parametrize("kernel", ["k1", "k2", "k4", "k8", "k1h4w4"])
def test_from_base_embeds_enlarged_latents_alike(kernel: str, base, tmp_path) -> None:
    source = tables.recognise(
        weight_files.open_checkpoint(write_folder(base, tmp_path / "m")), "transformer"
    )
    table = transformer.from_base(source.table, (kernel,), 10)
    plan = engine.make_job(dataclasses.replace(source, table=table))
    leaves = dict(plan.leaves())
    assert plan.cfg == dataclasses.replace(CFG, context_kernels=(kernel,))
    shape = kernel_shape(kernel)
    small = np.random.default_rng(0).standard_normal((1, 3, 4, 6, 16)).astype(np.float32)
    times = (shape[0], shape[1] // 2, shape[2] // 2)
    large = small
    for axis, n in enumerate(times, 1):
        large = np.repeat(large, n, axis=axis)
    embed = ContextEmbed(plan.cfg)

    def tokens(name: str, latents: np.ndarray, kernel: str) -> jax.Array:
        params = {k: jnp.asarray(leaves[f"embed/{name}/{k}"]) for k in ("kernel", "bias")}
        return embed.apply({"params": params}, jnp.asarray(latents), kernel)

    ours, theirs = tokens(f"context_{kernel}", large, kernel), tokens("patch", small, "k1")
    assert relative_error(ours, theirs) < 1e-5


def test_from_base_keeps_the_rest(base, framepack, tmp_path) -> None:
    path = write_folder(base, tmp_path / "base")
    make_bundle(
        BundleRequest(output=f"{tmp_path}/b", transformer=path, from_base=True, image_dim=10)
    )
    manifest = bundle.read_manifest(tmp_path / "b")
    _, cfg = bundle.role_config(manifest, "transformer")
    assert cfg == CFG
    params = bundle.load_params(tmp_path / "b", manifest, "transformer")
    plain = dict(plan_of(path).leaves())
    embed = params["embed"]
    np.testing.assert_array_equal(embed["context_k1"]["kernel"], plain["embed/patch/kernel"])
    np.testing.assert_array_equal(embed["context_k4"]["bias"], plain["embed/patch/bias"])
    np.testing.assert_array_equal(
        params["double"]["img_mod"]["bias"][1], plain["double/01/img_mod/bias"]
    )
    for name in ("image_up", "image_down"):
        kernel = embed[name]["kernel"]
        assert not np.any(embed[name]["bias"])
        assert 0.8 < np.std(kernel) * math.sqrt(len(kernel)) < 1.2
    with pytest.raises(ConversionError, match="packed model already"):
        path = write_folder(framepack, tmp_path / "framepack")
        make_bundle(BundleRequest(output=f"{tmp_path}/c", transformer=path, from_base=True))
