"""Bundles: what is written comes back, and what is damaged is named."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from framepack_jax import bundle, packing
from framepack_jax.bundle import BundleError, Manifest, Role, loader, writer
from framepack_jax.models import registry
from framepack_jax.models.encoders import clip
from framepack_jax.models.params import unstack_layers
from framepack_jax.parallel import sharding

CFG = clip.ClipConfig(vocab_size=7, width=4, layers=3, heads=2, mlp_width=6, max_tokens=5)


def leaves(dtype=ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = registry.abstract_leaves("clip_text", CFG)
    return {name: random.standard_normal(leaf.shape).astype(dtype) for name, leaf in shapes.items()}


def manifest(**changes) -> Manifest:
    fields = {"vocab_size": 7, "width": 4, "layers": 3, "heads": 2, "mlp_width": 6, "max_tokens": 5}
    fields |= changes
    return Manifest(
        roles={"text_encoder_2": Role("clip_text", fields, "text_encoder_2")},
        latent_mean=(0.0,), latent_std=(2.0,), prompt_template="a {}",
        schedule=packing.parse("g9"),
    )  # fmt: skip


@pytest.fixture
def root(tmp_path):
    bundle.write_params(tmp_path / "text_encoder_2", leaves().items())
    bundle.write_manifest(tmp_path, manifest())
    return tmp_path


def test_round_trip_is_bitwise(root) -> None:
    assert bundle.read_manifest(root) == manifest()
    small = dataclasses.replace(manifest(), buckets=((64, 96), (96, 64)))
    bundle.write_manifest(root, small)
    assert bundle.read_manifest(root) == small
    # One that was written before bundles had sizes is of the released models.
    fields = json.loads((root / bundle.MANIFEST).read_text())
    del fields["buckets"]
    (root / bundle.MANIFEST).write_text(json.dumps(fields))
    assert bundle.read_manifest(root) == manifest()
    params = bundle.load_params(root, manifest(), "text_encoder_2")
    stored = leaves()
    kernel = np.asarray(params["layers"]["mlp_in"]["kernel"])
    assert kernel.dtype == ml_dtypes.bfloat16 and kernel.shape == (3, 4, 6)
    for i in range(3):
        np.testing.assert_array_equal(kernel[i], stored[f"layers/{i:02d}/mlp_in/kernel"])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == sum(leaf.size for leaf in stored.values())
    wide = bundle.load_params(root, manifest(), "text_encoder_2", dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


def test_many_small_writes_are_one_checkpoint(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "WRITE_CHUNK", 100)
    written = bundle.write_params(tmp_path / "text_encoder_2", leaves().items())
    assert written.bytes == sum(leaf.nbytes for leaf in leaves().values())
    params = bundle.load_params(tmp_path, manifest(), "text_encoder_2")
    assert unstack_layers(params, clip.STACKS).keys() == leaves().keys()


@pytest.mark.parametrize("mesh", [None, {"fsdp": 1}])
def test_weights_are_read_a_few_at_a_time(root, monkeypatch, mesh) -> None:
    mesh = mesh and sharding.make_mesh(**mesh, devices=jax.devices()[:1])
    whole = bundle.load_params(root, manifest(), "text_encoder_2")
    asked, load = [], loader._load

    def watched(root, name, path, wanted):
        asked.append(sorted(wanted))
        return load(root, name, path, wanted)

    monkeypatch.setattr(loader, "_load", watched)
    monkeypatch.setattr(loader, "LOAD_CHUNK", 100)
    parts = bundle.load_params(root, manifest(), "text_encoder_2", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    # All layers of a leaf together, every leaf once, and never much more than was asked for.
    assert sorted(key for keys in asked for key in keys) == sorted(leaves())
    assert len(asked) > 5
    kernels = [keys for keys in asked if "layers/00/mlp_in/kernel" in keys]
    assert len(kernels) == 1 and "layers/02/mlp_in/kernel" in kernels[0]


def test_an_interrupted_write_leaves_nothing_that_looks_finished(tmp_path) -> None:
    def half():
        yield from list(leaves().items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle.write_params(tmp_path / "text_encoder_2", half())
    assert not (tmp_path / "text_encoder_2").exists()
    with pytest.raises(BundleError, match="is not a bundle"):
        bundle.read_manifest(tmp_path)
    with pytest.raises(BundleError, match="are missing at"):
        bundle.load_params(tmp_path, manifest(), "text_encoder_2")


def test_a_reference_to_replaced_weights_is_refused(root, tmp_path) -> None:
    other = tmp_path / "other"
    there = bundle.read_manifest(root).roles["text_encoder_2"]
    pointing = Manifest(
        {"text_encoder_2": dataclasses.replace(there, path="../text_encoder_2")},
        (0.0,), (2.0,), "a {}", packing.parse("g9"),
    )  # fmt: skip
    other.mkdir()
    bundle.load_params(other, pointing, "text_encoder_2")
    changed = dataclasses.replace(there, source={"sha256": "other"})
    bundle.write_manifest(
        root, Manifest({"text_encoder_2": changed}, (), (), "", packing.parse("g9"))
    )
    with pytest.raises(BundleError, match="has been replaced by other weights"):
        bundle.load_params(other, pointing, "text_encoder_2")
    (root / bundle.MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"is not a complete bundle .*finish its conversion"):
        bundle.load_params(other, pointing, "text_encoder_2")
    lost = {"text_encoder_2": dataclasses.replace(there, path="../gone/text_encoder_2")}
    with pytest.raises(BundleError, match=r"missing at .*: move both together"):
        bundle.load_params(other, dataclasses.replace(pointing, roles=lost), "text_encoder_2")


def test_a_manifest_is_whole_or_not_there(root, monkeypatch) -> None:
    before = (root / bundle.MANIFEST).read_text()

    def torn(path, text: str) -> None:
        with open(path, "w") as file:
            file.write(text[:40])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        bundle.write_manifest(
            root, dataclasses.replace(manifest(), schedule=packing.parse("g9", "inverted"))
        )
    assert (root / bundle.MANIFEST).read_text() == before


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda text: text[:40], "is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "format 9"),
        (lambda text: text.replace('"order"', '"ordr"'), "ordr"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace("416", "-416", 1), r"buckets = .*-416.* each a list of 2"),
        (lambda text: text.replace("416", '"wide"', 1), "is damaged"),
    ],
)
def test_damaged_manifests(root, damage, named) -> None:
    file = root / bundle.MANIFEST
    file.write_text(damage(file.read_text()))
    with pytest.raises(BundleError, match=named):
        bundle.read_manifest(root)


@pytest.mark.parametrize(
    "changes",
    [{"width": "4"}, {"width": -4}, {"width": None}, {"layers": 10**9}, {"heads": True},
     {"mlp_width": 0}, {"width": [4]}, {"activation": "none"}, {"activation": [[1]]}],
)  # fmt: skip
def test_configs_that_make_no_network(changes) -> None:
    with pytest.raises(BundleError, match=next(iter(changes))):
        bundle.role_config(manifest(**changes), "text_encoder_2")


def test_roles_that_do_not_fit(root) -> None:
    with pytest.raises(BundleError, match="has no vae"):
        bundle.role_config(manifest(), "vae")
    with pytest.raises(BundleError, match=r"unknown fields \['widht'\]"):
        bundle.role_config(manifest(widht=4), "text_encoder_2")
    with pytest.raises(BundleError, match=r"12 missing \(layers/03"):
        bundle.load_params(root, manifest(layers=4), "text_encoder_2")
    with pytest.raises(BundleError, match=r"final_norm/bias is \(4,\), expected \(6,\)"):
        bundle.load_params(root, manifest(width=6), "text_encoder_2")
    other = json.loads((root / bundle.MANIFEST).read_text())["roles"]["text_encoder_2"]
    strange = Manifest({"vae": Role(**{**other, "kind": "gan"})}, (), (), "", packing.parse("g9"))
    with pytest.raises(BundleError, match="kind 'gan'"):
        bundle.role_config(strange, "vae")


def test_names_of_bundles_in_the_package() -> None:
    for name in bundle.BUILTIN_BUNDLES:
        assert bundle.read_manifest(bundle.resolve(name)).roles
    assert bundle.resolve("weights/mine") == "weights/mine"
