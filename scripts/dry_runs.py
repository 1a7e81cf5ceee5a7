"""Write the tables of docs/measurements/memory.md.

python scripts/dry_runs.py [--no-decoding] [MACHINE ...]     # sampling
python scripts/dry_runs.py --models [ROW ...]                # sampling with other models
python scripts/dry_runs.py --training [ROW ...]              # training
python scripts/dry_runs.py --model-training [ROW ...]        # training of other models
python scripts/dry_runs.py --meshes [ROW ...]                # training on default meshes

Compile the released model's programs for each machine, print each report, and replace the rows of
these machines between the markers of the document. Rows of other machines stay. `make dry-runs`
writes all rows of sampling. If the compiler of a machine is not installed, its rows stay and the
exit code is 1.
"""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA writes of programs that do not fit; so do the rows.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from framepack_jax import bundle, packing
from framepack_jax.cli.config_file import read_config
from framepack_jax.generation.layout import make_layout
from framepack_jax.generation.pipeline import Settings
from framepack_jax.generation.request import Request
from framepack_jax.jobs.loading import open_pipe
from framepack_jax.parallel import hardware
from framepack_jax.planning import hlo
from framepack_jax.planning.programs import Program
from framepack_jax.planning.report import Report
from framepack_jax.planning.sampling import dry_run
from framepack_jax.planning.training import TrainingReport, dry_run_training
from framepack_jax.training.config import TrainConfig

BUNDLE, HEIGHT, WIDTH = "framepack_i2v", 608, 640
FITS = (
    "v5e:4x4", "v5p:2x4x4", "v6e:2x2", "v6e:2x4", "v6e:8x8", "a100-80g:8", "h100:8", "h100:64",
    "h200:1", "rtx4090:1",
)  # fmt: skip
CURVE = (
    "v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:2x2", "v6e:2x4", "h100:1", "h100:2", "h100:4", "h100:8",
    "h100:64",
)  # fmt: skip
# For a TPU the decoder takes minutes to compile.
DECODE = ("v5e:2x2", "v5e:4x4", "h100:8", "h200:1", "rtx4090:1")
# Bundle and machine of a step with the bundle's own settings, at its own size.
MODELS = {
    f"{model} {machine}": (model, machine)
    for model in ("helios_14b", "wan_14b", "wan_1.3b")
    for machine in ("v5e:2x4", "v5e:4x4", "v6e:2x2", "v5p:2x2x4", "h100:1", "h100:8")
}
# Configuration, schedule or that of the bundle, machine, a batch, or None for the largest, and what
# the gradient keeps where it is not what the configuration says.
LATENT_2, LATENT_3 = "f1k1_x_g2_f1k1f2k2f16k4_td", "f1k1_x_g3_f1k1f2k2f16k4_td"
TRAINING = {
    "lora w=2 a100-80g:8": ("lora_i2v", LATENT_2, "a100-80g:8", 64),
    "lora w=3 a100-80g:8": ("lora_i2v", LATENT_3, "a100-80g:8", 64),
    "lora a100-80g:8": ("lora_i2v", None, "a100-80g:8", None),
    "lora h100:8": ("lora_i2v", None, "h100:8", None),
    "lora h100:8, full": ("lora_i2v", None, "h100:8", None, "full"),
    "lora h100:1": ("lora_i2v", None, "h100:1", None),
    **{
        f"lora h200:1, {r}": ("lora_i2v", None, "h200:1", 1, r)
        for r in ("full", "attention", "dots")
    },
    "finetune h100:8": ("finetune_i2v", None, "h100:8", None),
    "finetune h100:64": ("finetune_i2v", None, "h100:64", None),
    "finetune a100-80g:8": ("finetune_i2v", None, "a100-80g:8", None),
    "finetune v5p-64": ("finetune_i2v", None, "v5p-64", 160),
    "finetune v5p:8x8x4": ("finetune_i2v", None, "v5p:8x8x4", 1536),
    "finetune v6e:16x16": ("finetune_i2v", None, "v6e:16x16", 512),
    "from_hunyuan v5p-64": ("from_hunyuan", None, "v5p-64", 160),
    "distill h100:8": ("distill_i2v", None, "h100:8", 32),
    "distill v5p-64": ("distill_i2v", None, "v5p-64", 160),
}
# Configuration, machine and batch of training steps on the default mesh.
MESHES = {
    f"{name.partition('_')[0]} {machine}": (name, machine, batch)
    for machine, batch in (
        ("v5p-64", 32), ("h100:64", 64), ("v5p-256", 128), ("2*v5e-256", 512), ("v6e-256", 256)
    )
    for name in ("finetune_i2v", "lora_i2v")
}  # fmt: skip
# Configuration, machine and batch of training steps of Helios, at its own size.
HELIOS_SIZE = (384, 640)
MODEL_TRAINING = {
    f"{name} {machine}": (name, machine, batch)
    for machine, batch in (
        ("h100:1", 1), ("h100:8", 8), ("v5e:2x4", 8), ("v5e:4x4", 16), ("v6e:2x2", 4),
        ("v5p:2x2x4", 16), ("v5p-64", 32),
    )
    for name in ("lora_helios", "finetune_helios", "from_wan")
}  # fmt: skip
DOCUMENT = Path(__file__).parent.parent / "docs" / "measurements" / "memory.md"
CONFIGS = Path(__file__).parent.parent / "configs"
GB = 1e9


def main(flags: list[str]) -> None:
    """Compile for the machines named on the command line, or for all."""
    if "--training" in flags:
        return training([flag for flag in flags if flag != "--training"] or list(TRAINING))
    if "--models" in flags:
        return models([flag for flag in flags if flag != "--models"] or list(MODELS))
    if "--model-training" in flags:
        rows = [flag for flag in flags if flag != "--model-training"]
        return model_training(rows or list(MODEL_TRAINING))
    if "--meshes" in flags:
        return meshes([flag for flag in flags if flag != "--meshes"] or list(MESHES))
    decode = DECODE if "--no-decoding" not in flags else ()
    names = [flag for flag in flags if flag != "--no-decoding"]
    names = names or list(dict.fromkeys([*FITS, *CURVE]))
    if unknown := set(names) - {*FITS, *CURVE}:
        raise SystemExit(f"error: no rows for {sorted(unknown)}; there are {FITS + CURVE}")
    for name, report in reports(names, lambda name: report_of(name, name in decode)):
        if name in FITS:
            write_row("fits", name, FITS, fits_cells(report))
        if name in CURVE:
            write_row("curve", name, CURVE, curve_cells(report))
        if name in decode:
            write_row("decoding", name, DECODE, memory_cells(report, report.programs[1]))


def reports(rows: Iterable[str], report_of: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Yield (row, report) of each row that can be compiled; exit at the end, naming the others."""
    problems = []
    for row in rows:
        try:
            report = report_of(row)
        except ValueError as error:
            problems.append(f"{row}: {error}")
            continue
        print(f"{row}\n{report}\n", flush=True)
        yield row, report
    if problems:
        raise SystemExit("\n".join(["error: not compiled:", *problems]))


def models(rows: list[str]) -> None:
    """Compile denoising steps of other models, and write their rows."""

    def report_of(row: str) -> Report:
        name, machine = MODELS[row]
        path = bundle.resolve(name)
        pipe = open_pipe(path, "bfloat16", None, None)
        layout = make_layout(pipe.geometry, Request("", None), sections=1)
        settings = Settings.of(pipe.sampling)
        return dry_run(pipe, path, layout, settings, hardware.parse(machine))

    for row, report in reports(rows, report_of):
        write_row("models", row, tuple(MODELS), model_cells(report))


def model_cells(report: Report) -> list[str]:
    total, memory = report.step.total(report.resident), report.machine.chip.memory
    section = report.step_seconds * report.steps
    return [
        divided(report),
        gigabytes(report.resident),
        f"{total / GB:.1f} of {memory / GB:.1f} GB",
        "yes" if total <= memory else f"**no**, {(total - memory) / GB:.1f} GB too much",
        f"{report.roofline_seconds:.2f} s",
        f"{report.step_seconds:.2f} s",
        f"{report.steps} steps, {section:.0f} s, {report.frames} frames",
        f"{section / report.frames:.2f} s",
        compiled(report, report.step.compile_seconds),
    ]


def training(rows: list[str]) -> None:
    """Compile training steps, and write their rows."""

    def report_of(row: str) -> TrainingReport:
        name, schedule, machine, batch, *remat = TRAINING[row]
        cfg = read_config(CONFIGS / f"{name}.py", TrainConfig)
        cfg = dataclasses.replace(
            cfg, schedule=schedule or cfg.schedule, remat=(remat or [cfg.remat])[0]
        )
        return largest(cfg, machine) if batch is None else training_report(cfg, machine, batch)

    for row, report in reports(rows, report_of):
        write_row("training", row, tuple(TRAINING), training_cells(report))


def meshes(rows: list[str]) -> None:
    """Compile training steps on default meshes, and write their rows."""

    def report_of(row: str) -> TrainingReport:
        name, machine, batch = MESHES[row]
        return training_report(read_config(CONFIGS / f"{name}.py", TrainConfig), machine, batch)

    for row, report in reports(rows, report_of):
        write_row("meshes", row, tuple(MESHES), mesh_cells(report))


def mesh_cells(report: TrainingReport) -> list[str]:
    moved = functools.reduce(hlo.add, report.collectives.values())
    reduced = sorted(report.program.reduced.items(), key=lambda item: -item[1])
    return [
        divided(report),
        f"{report.cfg.batch}",
        f"{report.total / GB:.1f} of {report.machine.chip.memory / GB:.0f} GB",
        f"{moved.overlapped} of {moved.runs}",
        gigabytes(moved.bytes),
        gigabytes(moved.inter_node_bytes),
        f"{gigabytes(reduced[0][1])} {reduced[0][0]}" if reduced else "none",
        f"{report.roofline_seconds:.2f} s",
        f"{report.step_seconds:.2f} s",
        compiled(report, report.program.compile_seconds),
    ]


def model_training(rows: list[str]) -> None:
    """Compile training steps of other models on default meshes, and write their rows."""

    def report_of(row: str) -> TrainingReport:
        name, machine, batch = MODEL_TRAINING[row]
        cfg = read_config(CONFIGS / f"{name}.py", TrainConfig)
        return training_report(cfg, machine, batch, HELIOS_SIZE)

    for row, report in reports(rows, report_of):
        write_row("model training", row, tuple(MODEL_TRAINING), model_training_cells(report))


def model_training_cells(report: TrainingReport) -> list[str]:
    total, memory = report.total, report.machine.chip.memory
    return [
        divided(report),
        f"{report.cfg.batch}",
        f"{gigabytes(report.state)} + {gigabytes(report.frozen)}",
        f"{total / GB:.1f} of {memory / GB:.1f} GB",
        "yes" if report.fits else f"**no**, {(total - memory) / GB:.1f} GB too much",
        f"{report.roofline_seconds:.2f} s",
        f"{report.step_seconds:.2f} s",
        f"{report.step_seconds / report.cfg.batch:.2f} s",
        compiled(report, report.program.compile_seconds),
    ]


def training_report(
    cfg: TrainConfig, machine: str, batch: int, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> TrainingReport:
    cfg = dataclasses.replace(cfg, batch=batch)
    path = bundle.resolve(cfg.bundle)
    return dry_run_training(cfg, path, hardware.parse(machine), size=size)


def largest(cfg: TrainConfig, machine: str) -> TrainingReport:
    """With as many samples a chip as fit: memory grows by as much with each, so two compilations
    tell how many, and a third shows it."""
    chips = hardware.parse(machine).count
    one, two = (training_report(cfg, machine, n * chips) for n in (1, 2))
    print(f"  {one.total / GB:.1f} and {two.total / GB:.1f} GB with 1 and 2 samples", flush=True)
    if not two.fits:
        return one
    each, room = two.total - one.total, one.machine.chip.memory - one.total
    count = max(2, 1 + int(room / each)) if each > 0 else 2
    while count > 2:
        report = training_report(cfg, machine, count * chips)
        if report.fits:
            return report
        count -= 1
    return two


def training_cells(report: TrainingReport) -> list[str]:
    cfg = report.cfg
    moved = sum(traffic.bytes for traffic in report.program.collectives.values())
    return [
        f"{packing.parse(cfg.schedule or packing.RELEASED_INVERTED).window}",
        divided(report),
        f"{cfg.batch}",
        f"{cfg.optimizer.name}, {cfg.remat}",
        f"{gigabytes(report.state)} + {gigabytes(report.frozen)}",
        gigabytes(report.program.temporaries),
        f"{report.total / GB:.1f} of {report.machine.chip.memory / GB:.1f} GB",
        "yes" if report.fits else "**no**",
        f"{report.roofline_seconds:.2f} s",
        gigabytes(moved),
        compiled(report, report.program.compile_seconds),
    ]


def report_of(name: str, decode: bool) -> Report:
    """Return the report of `sample.py --dry-run` for a machine. Raises ValueError."""
    path = bundle.resolve(BUNDLE)
    pipe = open_pipe(path, "bfloat16", None, None)
    layout = make_layout(pipe.geometry, Request("", None), sections=1, height=HEIGHT, width=WIDTH)
    return dry_run(pipe, path, layout, Settings(), hardware.parse(name), decode=decode)


def fits_cells(report: Report) -> list[str]:
    return [divided(report), gigabytes(report.resident), *memory_cells(report, report.step)]


def memory_cells(report: Report, program: Program) -> list[str]:
    total, capacity = program.total(report.resident), report.machine.chip.memory
    return [
        gigabytes(program.temporaries),
        f"{total / GB:.1f} of {capacity / GB:.1f} GB",
        "yes" if total <= capacity else f"**no**, {(total - capacity) / GB:.1f} GB too much",
        compiled(report, program.compile_seconds),
    ]


def curve_cells(report: Report) -> list[str]:
    traffic = ", ".join(
        f"{kind} {moved.bytes / GB:.1f}"
        for kind, moved in report.step.collectives.items()
        if moved.bytes >= 0.05 * GB
    )
    links, step = report.communication_seconds, report.step_seconds
    section = step * report.steps
    return [
        divided(report),
        "yes" if report.step.total(report.resident) <= report.machine.chip.memory else "no",
        f"{report.roofline_seconds:.3f} s",
        traffic or "none",
        f"{links:.3f} s",
        f"{step:.3f} s",
        f"{section:.1f} s",
        f"{section / report.frames:.2f} s",
    ]


def divided(report: Report | TrainingReport) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1) or "one chip"


def gigabytes(size: int) -> str:
    return f"{size / GB:.2f} GB"


def compiled(report: Report | TrainingReport, seconds: float) -> str:
    package = "libtpu" if report.machine.chip.dims else "jax-cuda13-plugin"
    return f"{seconds:.0f} s, {package} {metadata.version(package)}"


def write_row(table: str, name: str, order: tuple[str, ...], cells: list[str]) -> None:
    """Replace a row of a table of the document."""
    text = DOCUMENT.read_text()
    start, end = f"<!-- {table} -->\n", f"<!-- end of {table} -->\n"
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"error: {DOCUMENT} needs the lines {start.strip()} and {end.strip()}")
    before, rest = text.split(start)
    body, after = rest.split(end)
    lines = body.splitlines()
    rows = {re.match(r"\| `([^`]+)`", line)[1]: line for line in lines[2:]}
    rows[name] = f"| `{name}` | " + " | ".join(cells) + " |"
    body = "\n".join([*lines[:2], *(rows[each] for each in order if each in rows)])
    partial = DOCUMENT.with_suffix(".partial")
    partial.write_text(f"{before}{start}{body}\n{end}{after}")
    partial.replace(DOCUMENT)


if __name__ == "__main__":
    main(sys.argv[1:])
