"""Packed networks from the weights of base models, without PyTorch."""

import dataclasses

import numpy as np
import pytest

from framepack_jax.conversion import engine, tables, transformer, wan_transformer
from framepack_jax.conversion.weight_files import Checkpoint, ConversionError, Entry
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.wan.config import WanConfig

HUNYUAN = TransformerConfig(
    heads=1, head_dim=16, double_layers=1, single_layers=1, refiner_layers=1, mlp_ratio=1.0,
    text_dim=3, pooled_dim=3, image_dim=None, rope_axes=(4, 6, 6), context_kernels=(),
)  # fmt: skip
WAN = WanConfig(heads=1, head_dim=128, layers=1, mlp_dim=8, text_dim=3, time_dim=4)
CASES = {
    "hunyuan": (transformer.DIFFUSERS, HUNYUAN, {"image_dim": 5}),
    "wan": (wan_transformer.ORIGINAL, WAN, {"clean_context": True, "prompt_to_target": True}),
}


def source_of(table: engine.Table, cfg, path) -> engine.Source:
    """A checkpoint of random numbers without a config.json."""
    random, entries = np.random.default_rng(0), {}
    for step in engine.steps_of(table, cfg):
        for name, shape in zip(step.sources, step.source_shapes(), strict=True):
            array = random.standard_normal(shape, np.float32)
            entries[name] = Entry(shape, "float32", lambda array=array: array)
    given = {"rope_axes": cfg.rope_axes}
    return engine.Source(Checkpoint(path / "x", [], entries), table, overrides=given)


@pytest.mark.parametrize("name", CASES)
def test_all_but_the_new_leaves_are_those_of_the_base(name: str, tmp_path) -> None:
    table, cfg, added = CASES[name]
    source = source_of(table, cfg, tmp_path)
    packed = tables.FROM_BASE[table.kind](table, ("k1", "k8"), added.get("image_dim"))
    job = engine.make_job(dataclasses.replace(source, table=packed))
    assert job.cfg == dataclasses.replace(cfg, context_kernels=("k1", "k8"), **added)
    leaves, plain = dict(job.leaves()), dict(engine.make_job(source).leaves())
    new = leaves.keys() - plain.keys()
    assert new and all(path.startswith(("embed/context_", "embed/image_")) for path in new)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    for kernel in ("k1", "k8"):
        np.testing.assert_array_equal(
            leaves[f"embed/context_{kernel}/bias"], plain["embed/patch/bias"]
        )
    # A sum over all cells of a kernel that each have the same share of the patch's.
    paths = (f"embed/{name}/kernel" for name in ("context_k8", "patch"))
    sums = (leaves[path].sum(0, dtype=np.float64) for path in paths)
    np.testing.assert_allclose(*sums, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_packed_model_is_refused(name: str, tmp_path) -> None:
    table, cfg, added = CASES[name]
    fields = added | {"context_kernels": ("k1", "k2", "k4")}
    given = dataclasses.replace(cfg, **fields)
    source = source_of(table, given, tmp_path)
    packed = tables.FROM_BASE[table.kind](table, ("k1",), None)
    with pytest.raises(ConversionError, match="packed model already; remove --from-base"):
        engine.make_job(dataclasses.replace(source, table=packed))


@pytest.mark.parametrize("kernel", ["k64h1w1", "k3h3w5"])
def test_a_kernel_that_patches_do_not_divide_embeds_a_constant_alike(kernel: str, tmp_path) -> None:
    """Latents that are the same everywhere have the embedding of one patch of them."""
    table, cfg, _ = CASES["wan"]
    packed = tables.FROM_BASE[table.kind](table, (kernel,), None)
    source = dataclasses.replace(source_of(table, cfg, tmp_path), table=packed)
    leaves = dict(engine.make_job(source).leaves())
    channels = cfg.in_channels
    ours, patch = (
        leaves[f"embed/{name}/kernel"].reshape(-1, channels, cfg.width).sum(0, dtype=np.float64)
        for name in (f"context_{kernel}", "patch")
    )
    np.testing.assert_allclose(ours, patch, atol=1e-4)
