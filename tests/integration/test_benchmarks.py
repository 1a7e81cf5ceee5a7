"""The benchmarks run and count right; what they time is asserted nowhere."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from benchmarks import (
    bench,
    capped,
    captions,
    conversion,
    gpu,
    lengths,
    peers,
    sampling,
    step_profile,
    summary,
)
from benchmarks import loader as loading
from benchmarks import prepare as preparing
from framepack_jax import bundle, packing
from framepack_jax.conversion import engine
from framepack_jax.data.precompute import Encoder
from framepack_jax.models import quantization, registry, scan
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.flops import forward_flops
from framepack_jax.models.quantization import cast_params
from framepack_jax.parallel import hardware

SECTIONS, STEPS, SIDE = 5, 2, 32
F1 = "f1k1_x_f16k4f2k2f1k1_g1"
TRANSFORMER = "hunyuan_packed_dit"
UNNAMED = step_profile.UNNAMED


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


@pytest.fixture
def briefly(monkeypatch) -> Iterator[None]:
    """A call a round; one thread, as torch's wait for each other where a core has other work; and
    rates as shares of an H100's."""
    monkeypatch.setattr(bench, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(peers, "ROUNDS", 1)
    monkeypatch.setattr(bench, "chip_of", lambda device: hardware.CHIPS["h100"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_what_a_gpu_does_is_measured(tmp_path, briefly) -> None:
    """By the same way, on this machine."""
    document = tmp_path / "document.md"
    figures = measured_parts(tmp_path / "figures.json", "matmul", "copy", "attention", "conv",
                             "streaming", "step", "peer-error", document=document)  # fmt: skip
    step, *small = figures["step"]
    assert step["tflop_s"] * step["ms"] == pytest.approx(bench.step_flops(bench.TOY) / 1e9)
    assert step["mfu"] == pytest.approx(step["tflop_s"] / 989)
    assert len(small) == len(quantization.QUANTIZED)
    for row in small:
        assert row["weights"] < step["weights"] and 0 < row["relative_error"] < 0.05
    (errors,) = figures["peer-error"]
    assert 0 < errors["ours_bfloat16"] < 0.03 and 0 < errors["diffusers_bfloat16"] < 0.03
    for row in figures["attention"]:
        assert max(row.get("relative_errors_qkv", [0])) < 0.02
    text = document.read_text()
    names = {row["name"] for part in ("matmul", "streaming") for row in figures[part]}
    assert {f"mlp_in {kind} weights alone" for kind in ("fp8", "int8")} <= names
    assert "layers from the host, stack.run" in names
    assert "cpu, " in text and ", toy sizes; python " in text
    for row in (row for part in figures.values() if isinstance(part, list) for row in part):
        assert f"| {row['name']} | " in text
    (line,) = (line for line in text.splitlines() if line.startswith("| denoising step |"))
    assert f"weights {step['weights'] / 1e9:.3g} GB, " in line
    assert float(line.split(" | ")[3]) > 0, "there are floors"


def test_kernels_that_diffusers_cannot_take_are_rows(tmp_path, monkeypatch, briefly) -> None:
    """The others are measured; masks, which some cannot take, are not their matter."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def maskless(*args: Any, attn_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        assert attn_mask is None or torch.backends.cuda.math_sdp_enabled()
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", maskless)
    monkeypatch.setitem(peers.BACKENDS, "cpu", ("CUDNN_ATTENTION", "FLASH_ATTENTION"))
    figures = gpu.main(["--parts", "peer-step", "--scale", "toy", "--here"])
    refused, ran = figures["peer-step"]
    assert refused["name"] == "diffusers, eager, cudnn attention"
    assert "No viable backend" in refused["error"]
    assert ran["name"] == "diffusers, eager, flash attention"
    assert ran["tflop_s"] * ran["ms"] == pytest.approx(bench.step_flops(bench.TOY) / 1e9)


def test_the_vae_of_diffusers_is_measured(briefly) -> None:
    scale = dataclasses.replace(bench.TOY, pixels=(16, 16))
    rows: list[bench.Row] = []
    peers.measure_vae(bench.Bench(scale, rows, lambda: None))
    assert len(rows) == 6 and all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", quantization.QUANTIZED)
def test_weights_in_8_bits_are_those_of_a_converted_bundle(dtype: str) -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 16, 4, 6)).astype("bfloat16")
    # Channels of zeros, of what the type itself holds, and whose largest is its largest.
    kernel[:, :, 0, 0], kernel[:, :, 0, 1], kernel[0, 0, 0, 2] = 0, 2, 448
    params = {
        "single": {"qkv": {"kernel": jnp.asarray(kernel), "bias": jnp.ones((3, 4, 6))}},
        "head": {"kernel": jnp.ones((4, 4))},
    }
    got = gpu.quantized(params, dtype)
    for i, layer in enumerate(kernel):
        numbers, scale = engine.quantize("kernel", layer, dtype)
        found = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), got["single"]["qkv"])
        assert found["kernel"].dtype == numbers.dtype
        np.testing.assert_array_equal(found["kernel"], numbers)
        used = numbers.any(axis=0)
        tolerance = 1e-6 if dtype == "int8" else 0
        np.testing.assert_allclose(found[quantization.SCALE][used], scale[used], rtol=tolerance)
        assert found[quantization.SCALE].all() and np.count_nonzero(~used) == 1
    assert params["single"]["qkv"]["kernel"].is_deleted()
    assert got["head"]["kernel"].dtype == jnp.float32 and set(got["single"]["qkv"]) == {
        "kernel", "bias", quantization.SCALE
    }  # fmt: skip


def test_rows_say_what_memory_they_took(monkeypatch) -> None:
    """Where the peak of the process rose; those that know their own keep it."""
    rows: list[bench.Row] = []
    made = bench.Bench(bench.TOY, rows, lambda: None)
    for name, peak, more in (("a", 5, {}), ("b", 5, {}), ("c", 6, {"peak_bytes": 9}), ("d", 7, {})):
        monkeypatch.setattr(bench, "peak_memory", lambda peak=peak: peak)
        made.add(name, seconds=1.0, **more)
    assert [row.get("peak_bytes") for row in rows] == [5, None, 9, 7]


def test_the_largest_batch_is_found() -> None:
    def tried(wanted: int, most: int) -> list[int]:
        numbers: list[int] = []
        assert gpu.largest(lambda n: numbers.append(n) or n <= wanted, most) == wanted
        assert len(set(numbers)) == len(numbers)
        return numbers

    for most in (1, 6, 16):
        assert all(set(tried(n, most)) <= set(range(1, most + 1)) for n in range(most + 1))
    assert tried(5, 16) == [1, 2, 4, 8, 6, 5] and tried(16, 16) == [1, 2, 4, 8, 16]


@pytest.mark.slow
def test_sections_and_training_on_a_gpu_are_measured(tmp_path, briefly) -> None:
    """The parts that compile most."""
    figures = measured_parts(tmp_path / "figures.json", "section", "vae", "train")
    plain, tea, _, *small = figures["section"]
    assert 0 < tea["blocks_run"] < 1 and len(small) == 2
    assert plain["seconds_a_frame"] == pytest.approx(plain["ms"] / 36e3)
    (step,) = figures["train"]
    assert step["mfu"] == pytest.approx(step["tflop_s"] / 989)


def measured_parts(file: Path, *parts: str, document: Path | None = None) -> dict[str, Any]:
    """Figures of parts of the benchmark of a GPU, none of which failed."""
    flags = ["--parts", *parts, "--scale", "toy", "--here", "--json", str(file)]
    figures = gpu.main([*flags, *(["--document", str(document)] if document else [])])
    assert json.loads(file.read_text()) == figures
    rows = [row for part in parts for row in figures[part]]
    assert [row for row in rows if "error" in row] == []
    assert all(row["ms"] > 0 for row in rows if "ms" in row)
    return figures


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, capfd) -> None:
    file = tmp_path / "figures.json"
    flags = ["--parts", "copy", "step", "--scale", "toy", "--limit", "0.01", "--json", str(file)]
    with pytest.raises(SystemExit, match="error: nothing could be measured"):
        gpu.main(flags)
    figures = json.loads(file.read_text())
    for part in ("copy", "step"):
        assert "timed out" in figures[part][0]["error"]
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "cpoy"])
    assert "expected some of matmul, copy" in capfd.readouterr().err


def test_figures_are_of_one_device_and_have_a_place(tmp_path, monkeypatch, briefly) -> None:
    """Those of parts that are not measured again stay; what cannot be kept is told at once."""
    file, document = tmp_path / "figures.json", tmp_path / "document.md"

    def run(part: str, **files: Path) -> dict[str, Any]:
        flags = [text for name, path in files.items() for text in (f"--{name}", str(path))]
        return gpu.main(["--parts", part, "--scale", "toy", "--here", *flags])

    first = run("copy", json=file)
    second = run("conv", json=file, document=document)
    assert second["copy"] == first["copy"] and second == json.loads(file.read_text())
    assert "| x + 1 |" in document.read_text()

    def too_late(_: bench.Bench) -> None:
        """Is not reached."""
        raise AssertionError("measured")

    monkeypatch.setitem(gpu.MEASURES, "copy", too_late)

    def refused(match: str, **files: Path) -> None:
        before = {path: path.read_text() for path in tmp_path.iterdir()}
        with pytest.raises(SystemExit, match=match):
            run("copy", **files)
        assert {path: path.read_text() for path in tmp_path.iterdir()} == before

    file.write_text(json.dumps(second | {"device": "Card A"}))
    refused("^error: .* has figures of Card A at scale toy, and this is cpu at", json=file)
    file.write_text(json.dumps(second | {"scale": "full"}))
    refused("of cpu at scale full, and this is cpu at scale toy", json=file)
    file.write_text("[]")
    refused("^error: .* has no figures of this benchmark", json=file)
    refused("there is no folder .*nowhere", json=tmp_path / "nowhere" / "figures.json")
    refused("there is no folder .*nowhere", document=tmp_path / "nowhere" / "document.md")
    document.write_text("<!-- cpu -->\n")
    refused("^error: .* no <!-- end of cpu --> after it", document=document)
    document.write_text("<!-- end of cpu -->\n<!-- cpu -->\n<!-- end of cpu -->\n")
    refused("more than once, or the second alone", document=document)


def test_the_tables_of_a_gpu(tmp_path) -> None:
    """Floors by the best rates, failures by name, and a document in which other devices stay."""
    work = {"attention": 4e12, "products": 6e12}
    results = {
        "device": "Card A", "date": "2026-01-01", "jax": "1.2.3",
        "matmul": [
            {"name": "square bf16", "ms": 1.0, "tflop_s": 100.0},
            {"name": "mlp_in bf16", "ms": 1.0, "tflop_s": 200.0},
            {"name": "mlp_in int8", "ms": 1.0, "tflop_s": 400.0},
        ],
        "attention": [
            {"name": "attend, 9 tokens", "ms": 1.0, "tflop_s": 50.0},
            {"name": "attend with gradient, 9 tokens", "ms": 1.0, "tflop_s": 80.0},
            {"name": "gradient, attend, 2 of 3 tokens", "ms": 1.0},
        ],
        "step": [
            {
                "name": "denoising step", "ms": 220.0, "work": work, "program_bytes": 27e9,
                "peak_bytes": 54e9, "weights": 25749000000,
            }
        ],
        "section": [{"name": "section", "peak_bytes": 29e9}],
        "train": [{"name": "LoRA step, batch 4", "error": "XlaRuntimeError: a|b\nmore"}],
    }  # fmt: skip
    rates = summary.best_rates(results)
    assert rates == {"products": 200.0, "attention": 50.0, "attention both ways": 80.0}
    # 4 / 50 + 6 / 200 seconds.
    assert summary.roofline_seconds(work, rates) == pytest.approx(0.11)
    assert summary.roofline_seconds(work, {"products": 1.0}) is None
    document = tmp_path / "document.md"
    document.write_text("# Title\n")
    summary.put(document, results)
    summary.put(document, results | {"device": "Card B"})
    results["step"][0]["ms"] = 330.0
    summary.put(document, results)
    first, second = document.read_text().split("<!-- end of Card A -->\n")
    assert first.startswith("# Title\n\n<!-- Card A -->\nCard A, 2026-01-01; jax 1.2.3.")
    assert "| denoising step | 330 ms |  | 3.00 | 27.0 GB | weights 25.7 GB |" in first
    assert "| section |  |  |  | 29.0 GB |  |" in first
    assert "| LoRA step, batch 4 |  |  |  |  | XlaRuntimeError: a/b |" in first
    assert "| denoising step | 220 ms |  | 2.00 | 27.0 GB | weights 25.7 GB |" in second
    document.write_text("<!-- Card A -->\n")
    with pytest.raises(ValueError, match="no <!-- end of Card A -->"):
        summary.put(document, results)
    assert document.read_text() == "<!-- Card A -->\n"


def test_what_captions_decide_is_measured(tmp_path) -> None:
    """Of two videos that begin alike and go on otherwise, and their captions."""
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
    small = ("schedule=f1k1_x_f16k4f2k2f1k1_g2", "height=32", "width=32")
    config = lengths.LengthBenchmark(bundle="random", steps=1, flags=small)
    made = lengths.measure(config, 1.4)
    assert made["sections"] == 5 and made["memory"] > 1e8
    assert made["section"] > 0
    head, _, row = lengths.table([made]).splitlines()
    assert head.count("|") == row.count("|") and row.startswith("| 1.4 s | 5 |")
    with pytest.raises(SystemExit, match=r"error: sample.py ended with 1: .*nowhere is no bundle"):
        lengths.main(["--bundle", "nowhere", "--seconds", "1"])


def test_sections_at_the_ends_of_a_video_are_left_out() -> None:
    # Compilation, six sections of which the last two take half as long again, the last section.
    sections = [18, 10, 0.5, *[1.0] * 4, *[1.5] * 2, 14]
    found = lengths.figures({"section_seconds": sections, "peak_memory_bytes": 12})
    assert found == {
        "sections": 10, "section": 1.0, "growth": 1.5, "memory": 12,
    }  # fmt: skip
    with pytest.raises(ValueError, match="a video of 4 sections: expected 5 at least"):
        lengths.figures({"section_seconds": sections[:4], "peak_memory_bytes": 12})


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> step_profile.Profile:
    """Of two products in a loop, under a name, and of their gradient."""

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            with jax.named_scope("layer"):
                return jnp.tanh(x @ w), None

        return jnp.square(jax.lax.scan(layer, x, w)[0]).sum()

    args = jnp.ones((256, 256)), jnp.ones((2, 256, 256))
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
    program = step_profile.Program(compiled, lambda: jax.block_until_ready(compiled(*args)))
    return step_profile.measure(program, tmp_path_factory.mktemp("trace"), runs=2)


def test_a_profile_knows_what_the_device_was_at(profile) -> None:
    assert profile.wall > 0 and all(seconds >= 0 for seconds in profile.by_operation.values())
    kinds = {operation.kind for operation in profile.by_operation}
    assert "matrix product" in kinds and "without a name" not in kinds
    paths = {operation.path for operation in profile.by_operation}
    assert {("layer",), ("backward", "layer")} <= paths


def test_a_step_is_traced(tmp_path, capsys) -> None:
    flags = ["--program", "denoise", "--scale", "toy", "--runs", "1", "--trace", str(tmp_path)]
    found = step_profile.main(flags)
    assert found.wall > 0 and list(tmp_path.rglob("*.xplane.pb"))
    text = capsys.readouterr().out
    assert text.startswith("denoise on cpu, ") and step_profile.table(found) in text
    for words in ("| matrix product |", "| SingleBlock/attention |", "DoubleBlock"):
        assert words in text


def test_the_table_of_a_profile() -> None:
    operation = step_profile.operations.Operation
    product, add = operation("matrix product", ("Block", "qkv")), operation("arithmetic", ())
    found = step_profile.Profile(0.004, {product: 0.003, add: 0.000995, UNNAMED: 0.000005})
    lines = step_profile.table(found).splitlines()
    assert lines[0] == "4.000 ms a run; instructions 4.000 ms in the trace"
    assert "| matrix product | 3.000 | 75.0% |" in lines
    assert "| Block/qkv | matrix product | 3.000 | 75.0% |" in lines
    assert lines[-1] == "| 1 smaller |  | 0.005 | 0.1% |"


def test_instructions_are_those_of_one_device() -> None:
    """Traces of GPUs, whose kernels carry the instruction, and of TPUs, whose events are it."""

    def plane(name: str, **lines: list[tuple[str, dict[str, str]]]) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            lines=[
                SimpleNamespace(
                    name=title.replace("_", " "),
                    events=[
                        SimpleNamespace(name=event, stats=stats.items(), duration_ns=1000)
                        for event, stats in events
                    ],
                )
                for title, events in lines.items()
            ],
        )

    host = plane("/host:CPU", python=[("dot.1", {"hlo_op": "dot.1"})])
    kernels = [("sm90_gemm", {"hlo_op": "dot.1"}), ("MemcpyD2D", {})]
    gpus = [plane(f"/device:GPU:{i}", Stream_1=kernels, Steps=[("0", {})]) for i in range(2)]
    found = list(step_profile.instructions(SimpleNamespace(planes=[host, *gpus])))
    assert found == [("dot.1", 1e-6), ("MemcpyD2D", 1e-6)]
    tpu = plane("/device:TPU:0", XLA_Ops=[("%fusion.3 = bf16[8]{0} fusion(...)", {})], Steps=[])
    found = list(step_profile.instructions(SimpleNamespace(planes=[host, tpu])))
    assert found == [("fusion.3", 1e-6)]


@pytest.mark.parametrize("dtype", quantization.QUANTIZED)
def test_a_bundle_for_videos_under_caps(tmp_path, monkeypatch, capsys, dtype: str) -> None:
    """Which takes no other's place; and the order of the runs, which are stood in for."""
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
    assert "nowhere is no bundle" in failed["error"]
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
