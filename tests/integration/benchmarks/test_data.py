"""Benchmarks of conversion, loading and preparing run and count right; no time is asserted."""

import json

import pytest

from benchmarks import (
    conversion,
)
from benchmarks import loader as loading
from benchmarks import prepare as preparing
from framepack_jax.models import registry

TRANSFORMER = "hunyuan_packed_dit"


def test_a_conversion_is_measured_and_cleaned_up(tmp_path, capfd) -> None:
    """Verified by the command itself, whose exit code would stop the benchmark."""
    figures = conversion.main(["--scale", "toy", "--folder", str(tmp_path), "--no-loading"])
    parameters = sum(
        leaf.size for leaf in registry.abstract_leaves(TRANSFORMER, conversion.TOY).values()
    )
    assert figures["bytes"] == 2 * parameters
    assert figures["times_copy"] == figures["convert_seconds"] / figures["copy_seconds"]
    # JAX alone takes more than the toy model does.
    assert 100e6 < figures["convert_peak"] < 4e9 and 100e6 < figures["verify_peak"] < 4e9
    assert list(tmp_path.iterdir()) == []


def test_the_deepest_model_leaves_room_on_the_disk() -> None:
    whole = conversion._deepest(10**12)
    assert (whole.double_layers, whole.single_layers) == (20, 40)
    cfg = conversion._deepest(40 * 10**9)
    size = 2 * sum(leaf.size for leaf in registry.abstract_leaves(TRANSFORMER, cfg).values())
    assert 0 < 40e9 - 2 * size - conversion.SHARD - conversion.SPARE < 2 * 1.3e9
    assert (cfg.heads, cfg.single_layers) == (24, 2 * cfg.double_layers)
    with pytest.raises(SystemExit, match="too few for one layer"):
        conversion._deepest(conversion.SPARE)


def test_loading_is_measured(tmp_path) -> None:
    file = tmp_path / "figures.json"
    args = ["--scale", "toy", "--clips", "3", "--batch", "2", "--seconds", "0.2"]
    figures = loading.main([*args, "--json", str(file)])
    assert json.loads(file.read_text()) == figures
    # 29 latent frames of 8 x 10 x 16 in bfloat16, and text, image and numbers beside them.
    assert 29 * 8 * 10 * 16 * 2 < figures["sample_bytes"] < 30 * 8 * 10 * 16 * 2 + 256 * 70
    assert figures["samples_per_second"] > 0 and figures["floor_samples_per_second"] > 0


def test_preparing_is_measured_by_stage(tmp_path) -> None:
    args = ["--scale", "toy", "--clips", "1", "--no-encode", "--json", str(tmp_path / "f.json")]
    figures = preparing.main(args)
    stages = {name for name in figures if name.endswith("clips_per_second")}
    assert stages == {"read_clips_per_second", "read_cut_and_score_clips_per_second"}
    assert all(figures[name] > 0 for name in stages)
