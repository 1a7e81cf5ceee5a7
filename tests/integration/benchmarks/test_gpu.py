"""Benchmarks of one GPU run and count right; no time is asserted."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import (
    bench,
    gpu,
    peers,
    summary,
)
from framepack_jax.bench import timing
from framepack_jax.conversion import arrays
from framepack_jax.models import quantization
from framepack_jax.parallel import chips


@pytest.fixture
def briefly(monkeypatch) -> Iterator[None]:
    """A call a round; one thread, as torch's wait for each other where a core has other work; and
    rates as shares of an H100's."""
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(peers, "ROUNDS", 1)
    monkeypatch.setattr(bench, "chip_of", lambda device: chips.CHIPS["h100"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
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
        numbers, scale = arrays.quantize("kernel", layer, dtype)
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
    """Rows have the peak of the process if it rose; rows with a peak of their own keep it."""
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
    """Figures of parts that are not measured again stay; an error names one that cannot stay."""
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
