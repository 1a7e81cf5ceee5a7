"""An ablation: methods that are trained from one starting point and evaluated alike.

Source of the methods: arXiv 2504.12626, tables 1 and 2.

    OUTPUT/videos, dataset         the demo world, unless --train.data.path names a dataset
    OUTPUT/world.json              the settings that it was made with
    OUTPUT/codebooks              the codebook of schedules with +DK
    OUTPUT/runs/METHOD             training runs; methods with equal settings of training share one
    OUTPUT/rows.jsonl              the methods as `framepack evaluate --rows` reads them
    OUTPUT/evaluation              the evaluation of all methods
    OUTPUT/report.md, report.json  methods, results and costs
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax import bundle, packing
from framepack_jax.evaluation import tables
from framepack_jax.evaluation.drift import Estimate
from framepack_jax.evaluation.metrics import Metric
from framepack_jax.evaluation.tables import Table
from framepack_jax.toy import results
from framepack_jax.toy.methods import Method
from framepack_jax.toy.rows import RowSpec, open_row
from framepack_jax.training import checkpoints, goodput
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.export import read_config
from framepack_jax.utils import compare
from framepack_jax.utils.files import atomic_write

ROWS, REPORT, EVALUATION, WORLD = "rows.jsonl", "report", "evaluation", "world.json"
COSTS = {
    "training": Metric("Training steps", "s", 0, 0),
    "overhead": Metric("Loading, compiling, saving", "s", 0, 0),
    "sampling": Metric("Sampling a second of video", "s", 0, 1),
    "flops": Metric("Work of a section", "GFLOP", 0, 1),
    "context": Metric("Context", "tokens", 0, 0),
    "target": Metric("Target", "tokens", 0, 0),
}


def training_of(method: Method, common: TrainConfig, output: Path) -> TrainConfig:
    """Return the settings of the training run of a method. Raises ValueError that names it."""
    try:
        cfg = common
        for name, value in method.train.items():
            cfg = _changed(cfg, name.replace("-", "_"), value)
        cfg = dataclasses.replace(cfg, schedule=method.schedule or cfg.schedule)
        entries = entries_of(cfg)
        if entries is not None and cfg.codebook is None:
            cfg = dataclasses.replace(cfg, codebook=codebook_file(output, entries))
    except (ValueError, TypeError) as error:
        raise ValueError(f"method {method.name!r}: {error}") from error
    run = output / "runs" / results.file_name(method.name)
    return dataclasses.replace(cfg, output=str(run))


def entries_of(cfg: TrainConfig) -> int | None:
    """Return the number of codebook entries of a run's own schedule; None without +D."""
    return packing.parse(cfg.schedule).codebook if cfg.schedule else None


def codebook_file(output: Path, entries: int) -> str:
    """Return the file of the codebook that the ablation fits."""
    return str(output / "codebooks" / f"{entries}.safetensors")


def _changed(cfg: Any, name: str, value: Any) -> Any:
    """Return settings with another value of a field, which may be one of a group: history.noisy."""
    first, _, rest = name.partition(".")
    known = [field.name for field in dataclasses.fields(cfg)]
    if first not in known or bool(rest) > dataclasses.is_dataclass(getattr(cfg, first)):
        raise ValueError(f"train: unknown setting {name!r}; known are {', '.join(known)}")
    value = _changed(getattr(cfg, first), rest, value) if rest else value
    return dataclasses.replace(cfg, **{first: value})


def runs_of(methods: Sequence[Method], common: TrainConfig, output: Path) -> list[TrainConfig]:
    """Return the training run of each method: that of an earlier one if their settings are equal.

    Raises ValueError that names the method.
    """
    runs: list[TrainConfig] = []
    for method in methods:
        cfg = training_of(method, common, output)
        same = (run for run in runs if dataclasses.replace(run, output=cfg.output) == cfg)
        runs.append(next(same, cfg))
    return runs


def check(method: Method, cfg: TrainConfig) -> None:
    """Raise ValueError that names the method if its schedule does not fit the network."""
    manifest = bundle.read_manifest(bundle.resolve(cfg.bundle))
    spec, network = bundle.denoiser_config(manifest)
    schedule = packing.parse(cfg.schedule) if cfg.schedule else manifest.schedule
    try:
        how = manifest.sampling
        packing.plan(schedule, 1, apart=how.anchor_apart, alone=how.decode_alone)
        if cfg.init == "bundle":
            spec.check_kernels(network, spec.context_kernels(schedule))
    except ValueError as error:
        raise ValueError(f"method {method.name!r}: {error}") from error


def note_world(output: Path, made_with: Mapping[str, Any]) -> None:
    """Note the settings of the videos to train on. Raises ValueError if there are other videos."""
    file = output / WORLD
    if not file.exists():
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(made_with) + "\n")
    if found := compare.differences(json.loads(file.read_text()), made_with):
        raise ValueError(
            f"{output} has videos that were made otherwise ({'; '.join(found)}); give the settings"
            " of then, or another --output"
        )


def is_trained(cfg: TrainConfig) -> bool:
    """Return True if a run with these settings is finished and exported."""
    if not (epath.Path(cfg.output) / "bundle" / bundle.MANIFEST).exists():
        return False
    made = read_config(checkpoints.read_record(cfg.output)["config"])
    # The record of a run spells out the default layers of adapters.
    targets = cfg.lora.targets or made.lora.targets
    return made == dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, targets=targets))


def write_rows(output: Path, methods: Sequence[Method], runs: Sequence[TrainConfig]) -> Path:
    """Write the methods as rows of an evaluation; return the file."""
    lines = [
        {"name": method.name, "bundle": f"{cfg.output}/bundle", **method.sample}
        for method, cfg in zip(methods, runs, strict=True)
    ]
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / ROWS) as partial:
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return output / ROWS


def cost(row: RowSpec, run: str, evaluation: Path, size: tuple[int, int]) -> dict[str, Estimate]:
    """Return the costs of a trained and evaluated row: those of its run, and of its videos of
    `size` (height, width) in pixels. FLOPs are those of the longest section of the order."""
    model = open_row(row, None)
    manifest = bundle.read_manifest(model.path)
    spec, cfg, _ = model.pipe.transformer
    schedule, compression = model.pipe.schedule, model.pipe.vae.cfg.space_compression
    latents = tuple(side // compression for side in size)
    vision = manifest.roles.get("image_encoder")
    image = 0 if vision is None else bundle.role_config(manifest, "image_encoder")[1].grid ** 2
    work = spec.forward_flops(cfg, schedule, *latents, manifest.text_tokens, image)
    steps = sum(row.settings.stage_steps(model.pipe.sampling, 1)) * row.settings.passes
    spent = goodput.summarize(goodput.read_lives(run))
    found = {
        "training": spent["step"],
        "overhead": sum(spent.values()) - spent["step"] - spent["down"],
        "sampling": results.seconds_per_frame(evaluation, row.label) * manifest.sampling.fps,
        "flops": work * steps / 1e9,
        "context": sum(tokens for _, tokens in packing.context_tokens(schedule, *latents)),
        "target": packing.target_tokens(schedule, *latents),
    }
    return {name: Estimate(float(value), None, 1) for name, value in found.items()}


def reported(output: Path) -> list[str]:
    """Return the names of the methods in the report, which are evaluated."""
    file = output / f"{REPORT}.json"
    return list(json.loads(file.read_text())["methods"]) if file.exists() else []


def write_report(
    output: Path,
    methods: Sequence[Method],
    runs: Sequence[TrainConfig],
    costs: Mapping[str, Mapping[str, Estimate]],
) -> Path:
    """Write the report of the methods in `costs`, which are evaluated; return its path."""
    evaluated = json.loads((output / EVALUATION / "report.json").read_text())
    summary = tables.parse(evaluated["summary"])
    spent = Table(
        "Costs",
        "Seconds of training without and with the steps; of sampling and decoding in the fastest"
        " batch; matrix products of all steps of a section.",
        COSTS,
        costs,
    )
    links = {name: f"evaluation/{sheet}" for name, sheet in evaluated["sheets"].items()}
    text = [
        "# Ablation", "", _methods_table(methods, runs),
        tables.markdown(summary, links=links),
        "![Estimates and standard errors](evaluation/plots/summary.png)", "",
        "[All tables, plots and contact sheets](evaluation/report.md)", "",
        tables.markdown(spent),
    ]  # fmt: skip
    plain = {"methods": _plain(methods, runs), "summary": tables.plain(summary)}
    with atomic_write(output / f"{REPORT}.json") as partial:
        costs_json = tables.plain(spent)
        partial.write_text(json.dumps(plain | {"costs": costs_json}, indent=2) + "\n")
    with atomic_write(output / f"{REPORT}.md") as partial:
        partial.write_text("\n".join(text))
    return output / f"{REPORT}.md"


def _plain(methods: Sequence[Method], runs: Sequence[TrainConfig]) -> dict[str, Any]:
    return {
        method.name: {
            "schedule": cfg.schedule, "train": dict(method.train), "sample": dict(method.sample),
            "run": cfg.output, "steps": cfg.steps,
        }
        for method, cfg in zip(methods, runs, strict=True)
    }  # fmt: skip


def _methods_table(methods: Sequence[Method], runs: Sequence[TrainConfig]) -> str:
    lines = ["| method | schedule | steps | training | sampling |", "|---|---|--:|---|---|"]
    for method, cfg in zip(methods, runs, strict=True):
        train, sample = (
            ", ".join(f"{name} {value}" for name, value in changes.items())
            for changes in (method.train, method.sample)
        )
        schedule = cfg.schedule or "that of the bundle"
        lines.append(f"| {method.name} | `{schedule}` | {cfg.steps} | {train} | {sample} |")
    return "\n".join([*lines, ""])
