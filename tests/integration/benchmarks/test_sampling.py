"""Benchmarks of sampling run and count right; no time is asserted."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from benchmarks import (
    capped,
    captions,
    lengths,
    sampling,
)
from framepack_jax import bundle, packing
from framepack_jax.data.precompute import Encoder
from framepack_jax.models import quantization, scan
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.flops import forward_flops
from framepack_jax.models.quantization import cast_params

SECTIONS, STEPS, SIDE = 5, 2, 32
F1 = "f1k1_x_f16k4f2k2f1k1_g1"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, Any]:
    figures = tmp_path_factory.mktemp("benchmark") / "figures.json"
    flags = {"schedule": F1, "sections": SECTIONS, "steps": STEPS, "height": SIDE, "width": SIDE}
    args = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    sampling.main([*args, "--no-fresh", "--json", str(figures)])
    (result,) = json.loads(figures.read_text())["runs"]
    return result


def test_nothing_is_compiled_from_section_to_section(measured) -> None:
    compilations = measured["compilations"]
    assert compilations["step"] == 1
    assert compilations["settled"] == []
    assert compilations["all"] > 10


def test_the_parts_of_a_section(measured) -> None:
    seconds = {name: np.asarray(values) for name, values in measured["seconds"].items()}
    assert all(values.shape == (SECTIONS - 1,) for values in seconds.values())
    assert all((values > 0).all() for values in seconds.values())
    # Sections 2 to 5, of which 4 is neither among the first three nor the last.
    expected = {name: seconds[name][2] for name in ("all", *sampling.PARTS)}
    assert measured["settled"] == pytest.approx(expected)
    assert (seconds["joining"] < seconds["files"]).all()
    assert (seconds["files"] + seconds["preview"] < seconds["all"]).all()
    assert measured["growth"].keys() == seconds.keys()


def test_first_frames_and_memory(measured) -> None:
    first = measured["first_frames"]
    assert first["section"] == 1, "forward, each section has frames of its own"
    assert 0 < first["loading"] < first["with_compilation"]
    assert first["without"] > 0
    assert measured["memory"].keys() == {str(SECTIONS)}
    memory = measured["memory"][str(SECTIONS)]
    # The start latent and one a section, 4 x 4 cells of 16 channels in float32.
    least = (1 + SECTIONS) * 4 * 4 * 16 * 4
    assert least < memory["saved_latents"] < memory["peak"]


def test_nothing_is_kept_from_section_to_section(measured) -> None:
    first, *others = measured["device_bytes"][sampling.SETTLED - 1 : -1]
    assert others and max(others) <= first


def test_the_pieces_of_a_step(measured) -> None:
    step = measured["step"]
    assert all(math.isfinite(value) and value > 0 for value in step.values())
    assert step["floor_ms"] == pytest.approx(1e3 * step["flops"] / step["matmul_flops_a_second"])
    assert step["times_floor"] == pytest.approx(step["alone_ms"] / step["floor_ms"])


def test_the_table_says_what_was_measured(measured) -> None:
    text = sampling.table(measured)
    for words in (F1, f"2..{SECTIONS}", "1 of the denoising step", "host overhead", "GFLOP/s"):
        assert words in text


def test_too_few_sections_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        sampling.main(["--sections", "4"])
    assert "sections = 4: expected at least 5" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", [F1, "f1k1_x_g2_f1k1f2k2f16k4_td"])
def test_flops_are_those_of_the_traced_network(schedule: str) -> None:
    cfg = TransformerConfig(
        heads=2, head_dim=16, double_layers=3, single_layers=2, refiner_layers=2,
        text_dim=20, pooled_dim=12, image_dim=28, rope_axes=(4, 6, 6),
    )  # fmt: skip
    rows, columns, text, image = 6, 8, 7, 5
    parsed = packing.parse(schedule)
    traced = jax.make_jaxpr(transformer.velocity, static_argnums=0)(
        cfg, *_abstract(cfg, parsed, rows, columns, text, image)
    )
    counted = forward_flops(cfg, parsed, rows, columns, text, image)
    assert counted == _matmul_flops(traced.jaxpr)


def _abstract(
    cfg, schedule: packing.Schedule, rows: int, columns: int, text: int, image: int
) -> tuple:
    """Shapes of (params, x, sigma, context, conditions) for one sample."""
    window = schedule.window
    plan = packing.plan(schedule, 1)
    timeline = packing.Timeline(packing.length(plan), (rows, columns, cfg.in_channels))
    timeline.known[:] = True
    params = jax.eval_shape(lambda key: transformer.init(cfg, key), jax.random.key(0))
    conditions = Conditions(
        jnp.zeros((1, text, cfg.text_dim)), jnp.ones((1, text), bool),
        jnp.zeros((1, cfg.pooled_dim)), jnp.zeros((1, image, cfg.image_dim)), jnp.ones(1),
    )  # fmt: skip
    x = jnp.zeros((1, window, rows, columns, cfg.in_channels))
    context = packing.read_context(plan[0], timeline)
    return params, x, jnp.ones(1), context, conditions


def _matmul_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a program, those of its loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(lhs[i] for i in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(_matmul_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


def test_what_captions_decide_is_measured(tmp_path) -> None:
    """Two videos begin alike, then differ, as their captions do."""
    file = tmp_path / "figures.json"
    figures = captions.main([
        "--bundle", "random", "--size", "32x32", "--pairs", "1", "--sigmas", "0.5",
        "--json", str(file),
    ])  # fmt: skip
    assert json.loads(file.read_text()) == figures
    (found,) = figures["sigmas"].values()
    assert found["loss"] > 0 and 0 < abs(found["rise"]) < found["loss"]
    flags = captions.CaptionBenchmark(bundle="random", pairs=1)
    manifest = bundle.read_manifest(bundle.resolve("random"))
    encoder = Encoder.load(bundle.resolve("random"), manifest, pixels=False)
    batch = captions.batch_of(flags, (32, 32), encoder, manifest)
    for start in batch.context.latents:
        np.testing.assert_array_equal(start[0], start[1])
    assert any(np.any(start) for start in batch.context.latents)
    difference = batch.target[0].astype(np.float32) - batch.target[1].astype(np.float32)
    assert figures["no_doubt"] == pytest.approx(np.mean(difference**2)) and difference.any()
    assert np.any(batch.conditions.text[0] != batch.conditions.text[1])


def test_a_video_of_some_length_is_measured(tmp_path, capsys) -> None:
    # Sections of 8 frames.
    small, schedule = ("height=32", "width=32"), "f1k1_x_f16k4f2k2f1k1_g2"
    config = lengths.LengthBenchmark(bundle="random", steps=1, flags=small)
    made = lengths.median_of(config, 1.4, schedule)
    assert made["sections"] == 5 and made["memory"] > 1e8 and made["programs"] == 1
    assert made["each"] == [made["section"]] and made["section"] > 0
    head, _, row = lengths.table([made]).splitlines()
    assert head.count("|") == row.count("|") and row.startswith(f"| {schedule} | 1.4 s | 5 |")
    with pytest.raises(
        SystemExit, match=r"error: sample.py ended with 1: .*nowhere is not a bundle"
    ):
        lengths.main(["--bundle", "nowhere", "--seconds", "1"])


def test_figures_of_several_videos_are_medians(monkeypatch) -> None:
    same = {"sections": 50, "programs": 1, "memory": 7}
    rows = iter([same | {"section": x, "growth": 2 - x} for x in (3, 1, 2)])
    monkeypatch.setattr(lengths, "measure", lambda config, seconds, schedule: next(rows))
    made = lengths.median_of(lengths.LengthBenchmark(image=None, repeats=3), 60)
    assert made == same | {"section": 2, "growth": 0, "each": [3, 1, 2]}
    assert "| 2.00 s | 1.00 to 3.00 s |" in lengths.table([made | {"seconds": 60}])


def test_sections_at_the_ends_of_a_video_are_left_out() -> None:
    # Compilation, six sections of which the last two take half as long again, the last section.
    sections = [18, 10, 0.5, *[1.0] * 4, *[1.5] * 2, 14]
    found = lengths.figures({"section_seconds": sections, "peak_memory_bytes": 12})
    assert found == {
        "sections": 10, "section": 1.0, "growth": 1.5, "memory": 12,
    }  # fmt: skip
    with pytest.raises(ValueError, match="a video of 4 sections: expected 5 at least"):
        lengths.figures({"section_seconds": sections[:4], "peak_memory_bytes": 12})


@pytest.mark.parametrize("dtype", quantization.QUANTIZED)
def test_a_bundle_for_videos_under_caps(tmp_path, monkeypatch, capsys, dtype: str) -> None:
    """It replaces no other bundle; the order of the runs, whose work is faked, is as documented."""
    row = {"cap": None, "host_bytes": 1, "error": "none"}
    monkeypatch.setattr(capped, "measure", lambda config, cap, total: row | {"cap": cap})
    monkeypatch.setattr(capped, "device_bytes", lambda: 0)
    file = tmp_path / "figures.json"
    flags = ["--folder", str(tmp_path / "bundle"), "--scale", "toy", "--json", str(file)]
    made = capped.main([*flags, "--weights", dtype, "--caps", "24", "6"])
    assert [row["cap"] for row in made] == [None, 24, 6] == [
        row["cap"] for row in json.loads(file.read_text())["runs"]
    ]  # fmt: skip
    assert capped.table(made) in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"has another bundle .*{dtype}.; give each --weights"):
        capped.main(flags)
    manifest = bundle.read_manifest(tmp_path / "bundle")
    params = bundle.load_params(tmp_path / "bundle", manifest, "transformer")
    qkv = scan.get_layer(params["single"]["qkv"], 0)
    assert qkv["kernel"].dtype == dtype and len(np.unique(qkv["kernel"])) > 100
    assert float(np.std(cast_params(qkv, "float32")["kernel"])) == pytest.approx(32**-0.5, rel=0.05)
    assert params["single"]["q_norm"]["scale"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_video_under_a_cap_is_measured(tmp_path) -> None:
    """On a CPU, which has no caps, with as little memory as can be."""
    folder = tmp_path / "bundle"
    small = ("schedule=f1k1_x_f16k4f2k2f1k1_g2", "height=32", "width=32")
    flags = ["--folder", str(folder), "--scale", "toy", "--caps", "6", "--steps", "1"]
    whole, made = capped.main([*flags, "--flags", *small])
    assert whole["offload"] == "none" and whole["section"] > 0
    config = capped.CapBenchmark(folder, steps=1, flags=small)
    assert made["plan"].startswith("offload full: 0 of 4 blocks stay")
    assert made["section"] > 0 and made["host_bytes"] > 1e8
    failed = capped.measure(dataclasses.replace(config, folder=tmp_path / "nowhere"), None, total=0)
    assert "nowhere is not a bundle" in failed["error"]
    head, _, first, last = capped.table([made, failed]).splitlines()
    assert head.count("|") == first.count("|") and first.startswith("| 6 GB |")
    assert "failed: error: " in last


def test_sections_of_a_capped_run_are_read() -> None:
    timings = {
        "section_seconds": [18, 8, 1, 3, 4, 14], "load_seconds": 3.0, "encode_seconds": 4.0,
        "peak_memory_bytes": 5,
    }  # fmt: skip
    found = capped.figures(timings)
    assert found == {"section": 3.5, "loading": 3.0, "encoding": 4.0, "device_bytes": 5}
    row = found | {"cap": None, "host_bytes": 1}
    *_, last = capped.table([row, row | {"cap": 12.0, "section": 7.0}]).splitlines()
    assert last.startswith("| 12 GB | 7.00 s | 2.00 |")
