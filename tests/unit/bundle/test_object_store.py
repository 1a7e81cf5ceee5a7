"""Bundles in an object store, and on a disk that cannot rename folders."""

from pathlib import Path

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax import bundle
from framepack_jax.bundle import contexts
from framepack_jax.utils import storage

LEAVES = {f"double/{i:02d}/x/kernel": np.full((64, 32), i, np.float32) for i in range(3)}


def check_written(folder: str) -> None:
    """Write parameters twice, in several parts; read them back."""
    path = epath.Path(folder) / "transformer"
    bundle.write_params(path, [("old", np.ones(3, np.float32))])
    written = bundle.write_params(path, LEAVES.items())
    assert written.bytes == sum(leaf.nbytes for leaf in LEAVES.values())
    with contexts.reading():
        read = flatten_dict(ocp.load(path, ocp.metadata(path).metadata), sep="/")
    assert read.keys() == LEAVES.keys()
    for name, leaf in LEAVES.items():
        np.testing.assert_array_equal(read[name], leaf)


def test_parameters_are_written_to_a_bucket(bucket) -> None:
    check_written(f"{bucket}/new")


def test_parameters_are_written_where_folders_cannot_be_renamed(mount) -> None:
    assert not storage.renames_folders(mount)
    check_written(str(mount))
    assert [path.name for path in mount.iterdir()] == ["transformer"]


def test_a_disk_renames_folders(tmp_path) -> None:
    assert storage.renames_folders(tmp_path) and not list(tmp_path.iterdir())
    assert not storage.is_fuse(tmp_path)


def test_a_shipped_bundle_opens_from_a_bucket(bucket) -> None:
    """It has no file that marks its folders as complete checkpoints."""
    shipped = Path(bundle.resolve("random"))
    assert not list(shipped.rglob("commit_success.txt"))
    storage.copy_tree(shipped, f"{bucket}/random")
    manifest = bundle.read_manifest(f"{bucket}/random")
    assert manifest == bundle.read_manifest(shipped)
    bundle.check_present(f"{bucket}/random")
    there, here = (
        bundle.load_params(root, manifest, "vae") for root in (f"{bucket}/random", shipped)
    )
    assert all(map(np.array_equal, *map(bundle.loader.jax.tree.leaves, (there, here))))
