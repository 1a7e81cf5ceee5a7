"""Flags of the compilers: the table, the user's own, and what is set on this machine."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from framepack_jax.parallel import hardware, xla_flags


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> None:
    monkeypatch.setattr(xla_flags.os, "environ", {})


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_flag_has_a_reason_and_occurs_once(platform: str) -> None:
    flags = xla_flags.missing(platform, training=True)
    assert flags and len({flag.name for flag in flags}) == len(flags)
    assert all(len(flag.reason) > 20 for flag in flags)


def test_a_flag_of_the_user_wins() -> None:
    first, *others = xla_flags.missing("tpu")
    xla_flags.os.environ["LIBTPU_INIT_ARGS"] = f"--xla_other=3 --{first.name}=mine"
    assert xla_flags.missing("tpu") == others
    options = xla_flags.compiler_options(SimpleNamespace(platform="tpu"))
    assert options == {flag.name: flag.value for flag in others}


def test_a_machine_that_is_not_in_the_table_has_no_options() -> None:
    assert xla_flags.compiler_options(SimpleNamespace(platform="cpu"), training=True) == {}
    assert xla_flags.compiler_options(SimpleNamespace(platform="gpu"), training=True)


def test_some_flags_serve_training_only() -> None:
    more = {*xla_flags.missing("tpu", training=True)} - {*xla_flags.missing("tpu")}
    assert {flag.name for flag in more} == {"xla_jf_spmd_threshold_for_windowed_einsum_mib"}


def test_all_flags_can_be_left_out() -> None:
    xla_flags.os.environ["FRAMEPACK_XLA_FLAGS"] = "0"
    assert xla_flags.missing("tpu") == xla_flags.missing("cuda") == []


def test_commands_add_the_flags_of_this_machine(monkeypatch, tmp_path: Path, caplog) -> None:
    """libtpu would end the process on a flag that it does not know."""
    first, second, *_ = (
        xla_flags.Flag("tpu", name, "true", "For the test.") for name in ("known", "unknown")
    )
    library = tmp_path / "libtpu.so"
    library.write_bytes(b"\0known\0")
    monkeypatch.setattr(xla_flags, "FLAGS", (first, second))
    monkeypatch.setattr(xla_flags, "_platforms", lambda: ["tpu"])
    environment = {"LIBTPU_INIT_ARGS": "--mine=1", "TPU_LIBRARY_PATH": str(library)}
    monkeypatch.setattr(xla_flags.os, "environ", environment)
    with caplog.at_level(logging.INFO):
        xla_flags.apply()
    assert environment["LIBTPU_INIT_ARGS"] == "--mine=1 --known=true"
    assert "LIBTPU_INIT_ARGS --known=true" in caplog.text


def test_a_machine_without_accelerator_sets_none() -> None:
    environment = xla_flags.os.environ = {"TPU_SKIP_MDS_QUERY": "1"}
    xla_flags.apply()
    assert environment == {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize(("gpus", "found"), [(0, []), (1, []), (8, ["cuda"])])
def test_one_gpu_has_nothing_to_exchange(monkeypatch, gpus: int, found: list[str]) -> None:
    xla_flags.os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    values = {**xla_flags.jax.config.values, "jax_platforms": None}
    monkeypatch.setattr(xla_flags.jax, "config", SimpleNamespace(values=values))
    monkeypatch.setattr(xla_flags, "_count_gpus", lambda: gpus)
    assert xla_flags._platforms() == found


def test_the_installed_libtpu_knows_the_flags_of_the_table() -> None:
    flags = xla_flags.missing("tpu", training=True)
    assert xla_flags.known(flags, xla_flags._libtpu()) == flags
    assert {*xla_flags.VARIABLES} == {chip.platform for chip in hardware.CHIPS.values()}
