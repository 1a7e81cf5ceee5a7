"""Dry runs of sampling and training: by the compilers of other machines, and on devices of this CPU
in place of another machine's."""

import math

import jax
import pytest

from framepack_jax import bundle
from framepack_jax.cli import sample, train, training
from framepack_jax.generation.layout import make_layout
from framepack_jax.generation.pipeline import Settings
from framepack_jax.generation.request import Request
from framepack_jax.jobs.loading import open_pipe
from framepack_jax.parallel import hardware, sharding
from framepack_jax.planning import sampling
from framepack_jax.planning.report import Report
from framepack_jax.planning.training import TrainingReport

# A program for a machine that is not present cannot be read from the cache.
pytestmark = pytest.mark.usefixtures("compiled_anew")


@pytest.fixture
def this_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "compile_devices", lambda machine: jax.devices()[: machine.count])


@pytest.fixture
def reports(monkeypatch) -> list[Report]:
    """Reports of dry runs of `sample`, in order."""
    made = []
    real = sampling.dry_run
    monkeypatch.setattr(sampling, "dry_run", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    return made


FLAGS = ("--bundle", "random", "--height", "64", "--width", "80")


def test_a_step_of_streamed_blocks_is_the_programs_that_it_runs(this_cpu, reports, capsys) -> None:
    flags = (*FLAGS, "--dtype", "float32", "--dry-run", "h200:1")
    sample.main([*flags, "--offload", "full", "--cfg-scale", "3"])
    sample.main(flags)
    low, high = reports
    runs = {program.name: program.runs for program in low.programs}
    assert runs == {"double block": 4, "single block": 4, "embedding": 2, "head": 2}
    # On the chip there are two of the larger blocks, and what is no block.
    double, single, *rest = (program.weights for program in low.programs)
    assert low.networks["transformer"].bytes == 2 * double + sum(rest)
    assert low.hosted == 2 * double + 2 * single
    assert low.hosted + sum(rest) == high.networks["transformer"].bytes
    assert set(low.networks) == {"transformer", "vae"}
    assert low.total < high.total and low.flops == 2 * high.flops
    assert "GB of blocks a chip and step" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_slice_takes_the_released_model_block_by_block(reports) -> None:
    sample.main(
        ["--bundle", "framepack_i2v", "--height", "608", "--width", "640", "--offload", "full",
         "--dry-run", "v5e:2x2"]
    )  # fmt: skip
    (made,) = reports
    for program in made.programs:
        assert program.arguments <= 0.3e9 and program.temporaries <= 1.5e9
    assert made.fits and made.hosted == pytest.approx(2 * 12.45e9 / 4, rel=0.01)


@pytest.mark.parametrize(
    "more",
    [(), ("--step-cache", "tea"), ("--cfg-scale", "3", "--batch", "2", "--history-noise", "0.5")],
)
def test_the_real_step_is_compiled(this_cpu, capsys, more) -> None:
    sample.main([*FLAGS, "--dtype", "float32", "--dry-run", "h200:1", *more])
    printed = capsys.readouterr().out
    assert "331,168" in printed and ": fits" in printed
    assert "64 x 80 pixels" in printed and "counted from the config" in printed


@pytest.mark.parametrize(("batch", "more"), [(1, 8), (12, 16)])
def test_chips_that_would_repeat_work_are_refused(monkeypatch, batch: int, more: int) -> None:
    monkeypatch.setattr(hardware, "compile_devices", lambda machine: jax.devices()[:1] * 8)
    path = bundle.resolve("random")
    pipe = open_pipe(path, "float32", None, None)
    layout = make_layout(pipe.geometry, Request("", None), sections=1, height=64, width=64)
    run = pipe, path, layout, Settings(), hardware.parse("h200:8"), {"data": -1}, batch
    with pytest.raises(ValueError, match=rf"batch = {batch} on data=8: .* give --batch {more}, "):
        sampling.dry_run(*run)


def test_decoding_is_compiled_for_the_largest_tile() -> None:
    """The decoder takes 5 of 10 latents at once, and squares if tiles are given."""
    path = bundle.resolve("random")
    temporaries = []
    for tile in (None, 32):
        pipe = open_pipe(path, "float32", None, tile)
        layout = make_layout(pipe.geometry, Request("", None), sections=1, height=64, width=64)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        weights = sampling.abstract_params(*pipe.vae[:2], "float32", mesh)
        decoding = sampling._decode(pipe, weights, layout, 1, mesh)
        side = tile or 64
        assert decoding.outputs == 17 * side**2 * 3 * 4
        assert decoding.held == 2 * 37 * 64**2 * 3 * 4
        # All that is read are the decoder's weights, and the latents.
        read = sum(leaf.size * 4 for leaf in jax.tree.leaves(weights["decoder"]))
        assert decoding.weights == read
        assert decoding.arguments == read + 4 * math.prod((5, side // 8, side // 8, 16))
        temporaries.append(decoding.temporaries)
    assert temporaries[1] < temporaries[0] / 3


def test_what_does_not_fit_ends_with_code_1(this_cpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Report, "total", property(lambda report: 200 * 10**9))
    with pytest.raises(SystemExit) as ended:
        sample.main([*FLAGS, "--dry-run", "h200:1"])
    assert ended.value.code == 1
    assert "does not fit, 49.9 GB too much" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--dry-run", "h300:1"), "machine 'h300:1' is unknown"),
        (("--dry-run", "h200:1", "--mesh", "fsdp=2"), "multiply to 2, but there are 1 devices"),
        (("--dry-run", "h200:1", "--mesh", "fspd=1"), "'fspd=1' is not AXIS=SIZE"),
        (("--dry-run", "h200:1", "--lora", "a.st", "--gif", "--output", "b"), "--output, --lora"),
    ],
)
def test_errors_name_what_is_wrong(this_cpu, more, named) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        sample.main([*FLAGS, *more])


def test_the_tpu_compiler_takes_a_tiny_step(reports, capsys) -> None:
    sample.main([*FLAGS, "--dtype", "bfloat16", "--dry-run", "v5e:2x2"])
    (made,) = reports
    assert made.networks["transformer"].parameters == 331_168
    assert made.step.collectives["all-gather"].bytes > 0 and made.fits
    assert "v5e:2x2: 4 chips of 16.0 GB" in capsys.readouterr().out


def test_the_tpu_compiler_takes_the_released_model(reports, capsys) -> None:
    """13B on 16 chips: what is counted here again is counted by hand."""
    sample.main(
        ["--bundle", "framepack_i2v", "--height", "608", "--width", "640", "--dry-run", "v5e:4x4"]
    )
    (made,) = reports
    step, fsdp = made.step, made.mesh["fsdp"]
    parameters = {name: network.parameters for name, network in made.networks.items()}
    assert parameters["transformer"] == 12_874_314_816
    assert parameters["vae"] == 246_478_803
    assert parameters["text_encoder"] == 7_068_958_720

    # The compiler's own figure: weights in pieces, some small ones whole, and little else.
    pieces = 2 * 12_874_314_816 / fsdp
    assert pieces < step.arguments < 1.05 * pieces
    rest = 2 * (7_068_958_720 + 123_060_480 + 412_987_248) / fsdp + 4 * 246_478_803
    assert made.resident - made.networks["transformer"].bytes == pytest.approx(rest, rel=0.01)
    assert made.total >= step.arguments + rest and made.fits

    # 60 blocks, each token by four d x d and two d x 4d products, and all tokens by each other.
    tokens, width = 17500 + 729 + 256, 3072
    blocks = 60 * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)
    assert made.flops == pytest.approx(blocks, rel=0.005)

    assert set(step.kernels) == {"flash_forward"}
    assert sum(step.kernels.values()) == 60
    # Weights of 40 single and of both halves of 20 double blocks are gathered, but for modulations.
    gathered = 2 * (40 + 2 * 20) * 12 * width**2 * (fsdp - 1) / fsdp
    assert gathered <= step.collectives["all-gather"].bytes < 1.5 * gathered
    assert "modelled" in capsys.readouterr().out


TRAIN = ("--bundle", "random", "--dry-run-size", "64x80", "--batch", "4", "--remat", "full")


@pytest.fixture
def training_reports(monkeypatch) -> list[TrainingReport]:
    made = []
    real = training.dry_run_training
    monkeypatch.setattr(
        training, "dry_run_training", lambda *a, **k: made.append(real(*a, **k)) or made[-1]
    )
    return made


def test_the_tpu_compiler_takes_a_tiny_training_step(training_reports, capsys) -> None:
    """All that a step holds is divided, and counted by hand."""
    train.main([*TRAIN, "--ema", "0.9", "--dry-run", "v5e:2x2", "--mesh", "fsdp=4"])
    (made,) = training_reports
    assert made.parameters == made.trained == 331_168 and made.frozen == 0
    # float32 parameters, two moments and an average, almost all of it in four parts.
    assert 4 * made.trained < made.state < 1.2 * 4 * made.trained
    assert made.program.arguments >= made.state
    # 9 frames of 4 x 5 patches, 2 under k1, 2 under k2 (2 x 3 patches), 16 under k4 (1 x 2 x 4).
    assert made.tokens == 11 * 20 + 6 + 8 + 9 + 256
    assert made.fits
    # Gradients of blocks are added up in float32. Those of the embedding of context, a third of
    # this small network, are not.
    assert made.program.reduced["f32"] > 2 * made.program.reduced["bf16"]
    # Weights are gathered whole, some beside products, and gradients of blocks are scattered;
    # without flags, gathers become rings of exchanges.
    gathers = made.collectives["all-gather"]
    assert gathers.overlapped > 0 and made.collectives["reduce-scatter"].runs > 0
    assert "collective-permute" not in made.collectives
    printed = capsys.readouterr().out
    assert "331,168 trained by adamw" in printed and ": fits" in printed
    assert f"{gathers.runs} a step, {gathers.overlapped} of them asynchronous, " in printed
    assert "by all-reduce and reduce-scatter" in printed


def test_training_that_does_not_fit_ends_with_code_1(this_cpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(TrainingReport, "total", property(lambda report: 200 * 10**9))
    flags = (
        "--trainable",
        "lora",
        "--lora.rank",
        "2",
        "--init",
        "bundle",
        "--grad-accum-steps",
        "2",
    )
    with pytest.raises(SystemExit) as ended:
        train.main([*TRAIN, *flags, "--dry-run", "h200:1"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "does not fit, 49.9 GB too much; a smaller --batch" in printed
    assert "in 2 parts" in printed


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--dry-run", "h300:1"), "machine 'h300:1' is unknown"),
        (("--dry-run", "h200:1", "--dry-run-size", "wide"), "--dry-run-size wide"),
        (("--dry-run", "h200:1", "--mesh", "fsdp=2"), "multiply to 2"),
    ],
)
def test_errors_of_training_dry_runs(this_cpu, more, named) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        train.main([*TRAIN, *more])
