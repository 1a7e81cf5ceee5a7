"""Bundles with missing and changed files."""

import json
import shutil

import numpy as np
import pytest

from framepack_jax import bundle
from framepack_jax.bundle.hashes import stored_hash
from framepack_jax.doctor import bundles


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(bundle.resolve("random"), tmp_path / "mine")
    return tmp_path / "mine"


def test_a_whole_bundle(copied) -> None:
    (found,) = bundles.whole(str(copied))
    assert found.status == "ok" and "transformer, vae" in found.text


def test_files_that_are_missing(copied) -> None:
    shutil.rmtree(copied / "vae")
    (found,) = bundles.whole(str(copied))
    assert found.status == "problem" and "parameters of vae are missing" in found.text
    (copied / "bundle.json").unlink()
    (found,) = bundles.whole(str(copied))
    assert found.status == "problem" and str(copied) in found.text
    (found,) = bundles.whole("no-such-bundle")
    assert found.status == "problem"


def test_files_that_were_cut_off(copied) -> None:
    files = [f for f in (copied / "transformer").rglob("*") if f.is_file() and f.parent.name == "d"]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert files and [each.status for each in bundles.whole(str(copied))] == ["problem"]


def test_parameters_of_another_network(copied) -> None:
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["roles"]["vae"]["source"]["sha256"] = 64 * "0"
    (copied / "bundle.json").write_text(json.dumps(manifest))
    (found,) = bundles.whole(str(copied))
    assert found.status == "problem"
    assert found.text == "the parameters of vae are not those that were written"


def test_the_hash_is_that_of_the_writer(tmp_path) -> None:
    """With 8-bit weights too, whatever the order on the disk."""
    root = bundle.resolve("random")
    manifest = bundle.read_manifest(root)
    names = [*bundle.stored_dtypes(root, manifest, "vae")]
    arrays = dict(bundle.read_leaves(root, manifest, "vae", names))
    first = next(name for name in names if name.endswith("/kernel"))
    arrays[first] = np.nextafter(arrays[first], 1)
    shutil.copytree(root, tmp_path / "mine")
    bundle.write_params(tmp_path / "mine" / "vae", [(name, arrays[name]) for name in names])
    assert stored_hash(root, manifest, "vae") == manifest.roles["vae"].source["sha256"]
    assert stored_hash(tmp_path / "mine", manifest, "vae") != manifest.roles["vae"].source["sha256"]
