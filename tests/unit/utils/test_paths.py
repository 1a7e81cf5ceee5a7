"""Every path flag names a place that its command can use, or is refused by name."""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from etils import epath

from framepack_jax.__main__ import COMMANDS
from framepack_jax.utils import paths
from framepack_jax.utils.flags import ADDRESSES, TEXTS, parse, tidied
from framepack_jax.utils.paths import FILES_IN_STORES, IN_STORES, Stores, check_place


@pytest.fixture
def no_packages(monkeypatch) -> None:
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)


def refused(flag: str, place: str, stores=None) -> str:
    with pytest.raises(ValueError) as error:
        check_place(flag, place, stores)
    assert str(error.value).startswith(f"{flag} {place}")
    return str(error.value)


def test_what_cannot_be_used_is_named(no_packages) -> None:
    assert "a path on a disk" in refused("--image", "gs://b/x.png")
    assert "or gs://" in refused("--output", "s3://b/x", IN_STORES)
    assert "or gs://" in refused("--output", "hdfs://b/x", IN_STORES)
    assert refused("--output", "s3://b/x", FILES_IN_STORES).endswith(
        'needs s3fs: pip install "framepack-jax[s3]"'
    )
    assert refused("--output", "gs://b/x", IN_STORES).endswith(
        'needs gcsfs: pip install "framepack-jax[gcs]"'
    )
    for place in ("/a/b", "a:b/c", "tiny", "C:", "run@3", "v5e:4x4", "", "a b://c"):
        check_place("--output", place)


def test_what_other_hosts_write_is_seen(bucket) -> None:
    """Also in a folder that was listed before."""
    gcsfs = pytest.importorskip("gcsfs")
    folder = epath.Path(bucket) / "run"
    (folder / "a.txt").write_text("a")
    assert [file.name for file in folder.iterdir()] == ["a.txt"]
    other = gcsfs.GCSFileSystem(skip_instance_cache=True)
    other.pipe(f"{folder}/b.txt", b"b")
    assert (folder / "b.txt").exists()
    other.rm(f"{folder}/a.txt")
    assert not (folder / "a.txt").exists()


def test_a_bucket_needs_a_name(monkeypatch) -> None:
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: name)
    assert "gs://BUCKET/FOLDER" in refused("--output", "gs://", IN_STORES)
    check_place("--output", "gs://b", IN_STORES)


def test_flags_of_a_disk_refuse_every_scheme(capsys) -> None:
    """Also of type pathlib.Path, which drops a slash."""
    from framepack_jax.cli.synthetic import Synthetic

    for scheme in ("gs", "s3", "hdfs"):
        with pytest.raises(SystemExit, match=f"error: --output {scheme}://b/x: expected a path on"):
            parse(Synthetic, ["--output", f"{scheme}://b/x"], "framepack synthetic")


# What a command reads or writes in object stores; every other flag of a path is of a disk.
GS = {
    "sample": {"model.bundle"},
    "resume": {"bundle"},
    "decode": {"bundle"},
    "convert": {"output", "networks.encoders_from"},
    "export": {"bundle"},
    "verify": {"bundle"},
    "doctor": {"bundle"},
    "serve": {"model.bundle"},
    "bench": {"bundle"},
    "prepare": {"bundle"},
    "train-vae": {"bundle", "output", "init"},
    "train": {"bundle", "output", "init", "codebook"},
    "evaluate": {"bundle"},
    "export-run": {"run", "output", "bundle"},
    "ablation": {f"train.{name}" for name in ("bundle", "output", "init", "codebook")},
}
GS_AND_S3 = {
    "sample": {"output"},
    "resume": {"folder"},
    "decode": {"folder"},
    "prepare": {"output"},
    "train": {"data.path"},
    "fit-codebook": {"data", "output"},
    "ablation": {"train.data.path"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_that_take_a_bucket(command, no_packages) -> None:
    """An address in any other flag is refused before the command starts, texts excepted."""
    module = importlib.import_module(f"framepack_jax.cli.{command.replace('-', '_')}")
    kind = getattr(module, command.title().replace("-", ""))
    marked: dict[Any, set[str]] = {IN_STORES: set(), FILES_IN_STORES: set(), None: set()}
    for name, hint in flags_of(kind):
        stores = next((m for m in get_args(hint)[1:] if isinstance(m, Stores)), None)
        marked[stores].add(name)
        if name.rpartition(".")[2] not in (*TEXTS, *ADDRESSES):
            with pytest.raises(ValueError, match="gs://b/x"):
                tidied(name, "gs://b/x", stores)
    assert marked[IN_STORES] == GS.get(command, set())
    assert marked[FILES_IN_STORES] == GS_AND_S3.get(command, set())


def flags_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of each flag that holds texts or paths."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(inner):
            yield from flags_of(inner, f"{prefix}{name}.")
        elif any(kind in str(inner) for kind in ("str", "Path")):
            yield f"{prefix}{name}", hint
