"""Compare a packed Wan model that is trained with its history to one that is trained without.

    python -m benchmarks.history [--output outputs/history] [--json FILE]

Draws clips of the toy world, trains a tiny base Wan on single sections of them, makes a packed
model of it with `framepack convert --from-base`, and trains that twice from the same seeds: with
history, and with all of it missing. Then compares losses on held-out clips, paired by clip and
noise. Every step is a command of the package, and is skipped if it is complete: run it again to
continue after an interruption.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro

from framepack_jax import bundle, packing
from framepack_jax.cli import convert, export, prepare, synthetic, train
from framepack_jax.data.batch import Batch
from framepack_jax.data.holdout import FIRST_ELEMENT
from framepack_jax.data.samples import conditions_of, latent_sample, make_meta
from framepack_jax.parallel import sharding
from framepack_jax.training import checkpoints
from framepack_jax.training.export import read_config
from framepack_jax.training.flow_matching_task import FlowMatchingTask, Networks, open_task
from scripts import make_toy_bundle

ROOT = Path(__file__).parent.parent
# Sections of a clip: the first reads nothing.
SECTIONS = 4
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# All clips of the toy world are to be kept.
KEEP_ALL = (
    "--scene-threshold", "1", "--min-motion", "0", "--min-sharpness", "0", "--max-still", "1",
    "--min-seconds", "1", "--keep-duplicates",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HistoryBenchmark:
    """Train both models and compare them."""

    output: Path = Path("outputs/history")
    """Folder of videos, dataset, runs and bundles."""
    config: Path = ROOT / "configs" / "tiny_wan.py"
    """Configuration of the three runs."""
    clips: int = 400
    """Number of videos."""
    seconds: float = 5.6
    """Length of a video; four sections of 33 frames take 5.5 s at 24 frames a second."""
    seed: int = 3
    """Seed of the videos."""
    steps: int = 300
    """Steps of the base model."""
    packed_steps: int = 80
    """Steps of each packed model."""
    flags: tuple[str, ...] = ()
    """More flags of train.py, for all runs, without their dashes: data.holdout=8."""
    json: Path | None = None
    """Keep the losses of each clip here."""


class Compared(NamedTuple):
    """Difference of paired losses in the mean over clips, and its standard error."""

    mean: float
    error: float


def main(args: list[str] | None = None) -> dict[str, np.ndarray]:
    """Make what is missing, print the table, and return losses (sections, clips) by model."""
    config = tyro.cli(HistoryBenchmark, prog="benchmarks.history", args=args)
    config.output.mkdir(parents=True, exist_ok=True)
    make_data(config)
    make_models(config)
    losses = {
        "without": losses_of(config.output / "without", "blank"),
        "with": losses_of(config.output / "with"),
        "blanked": losses_of(config.output / "with", "blank"),
        "exchanged": losses_of(config.output / "with", "other"),
    }
    print(table(losses))
    if config.json is not None:
        config.json.write_text(json.dumps({name: x.tolist() for name, x in losses.items()}))
    return losses


def make_data(config: HistoryBenchmark) -> None:
    """Write the untrained bundle and the dataset."""
    place = config.output
    if not (place / "untrained" / bundle.MANIFEST).exists():
        make_toy_bundle.write_wan(make_toy_bundle.WAN, place / "untrained")
    if (place / "dataset" / "dataset.json").exists():
        return
    if len(list(place.glob("videos/*.mp4"))) < config.clips:
        height, width = make_toy_bundle.SIZE
        synthetic.main([
            f"--output={place / 'videos'}", f"--clips={config.clips}", f"--seed={config.seed}",
            f"--seconds={config.seconds}", f"--size={height}x{width}",
        ])  # fmt: skip
    prepare.main([
        f"--videos={place / 'videos'}", f"--bundle={place / 'untrained'}",
        f"--output={place / 'dataset'}", *KEEP_ALL,
    ])  # fmt: skip


def make_models(config: HistoryBenchmark) -> None:
    """Train the base model, make it a packed one, and train that with and without history."""
    place = config.output
    base, packed = place / "base" / "bundle", place / "packed"
    run(config, place / "untrained", "base", config.steps)
    if not (packed / bundle.MANIFEST).exists():
        if not (place / "transformer").exists():
            export.main([str(place / "transformer"), f"--bundle={base}"])
        convert.main([
            f"--transformer={place / 'transformer'}", "--from-base", f"--encoders-from={base}",
            f"--output={packed}", "--overwrite",
        ])  # fmt: skip
    run(config, packed, "with", config.packed_steps)
    run(config, packed, "without", config.packed_steps, "--history.drop-all=1")


def run(config: HistoryBenchmark, source: Path, name: str, steps: int, *more: str) -> None:
    """Train a bundle in a run of this name, unless that is complete."""
    output = config.output / name
    if (output / "bundle" / bundle.MANIFEST).exists():
        return
    train.main([
        f"--config={config.config}", f"--bundle={source}", f"--output={output}",
        f"--data.path={config.output / 'dataset'}", f"--steps={steps}", *more,
        *(f"--{flag}" for flag in config.flags),
    ])  # fmt: skip


def losses_of(run: Path, change: str | None = None) -> np.ndarray:
    """Return the losses (sections, clips) of held-out clips by a run's moving average, in the mean
    over noise levels. The same clips have the same noise for every run. `change` blanks the history
    ("blank"), or exchanges it for that of another clip ("other")."""
    folder, step = checkpoints.parse_run(str(run))
    cfg = read_config(checkpoints.read_record(folder)["config"])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    task = open_task(cfg, bundle.resolve(cfg.bundle), mesh)
    params = checkpoints.restore_params(folder, step, task.abstract.params, "ema")
    compute = jax.jit(task.losses_at)
    losses = []
    with jax.set_mesh(mesh), task.precision():
        for batch in sections_of(task):
            others = jax.tree.map(lambda x: np.roll(x, 1, axis=0), batch)
            groups = len(batch.context.kernels)
            blank, other = (np.full(groups, change == name) for name in ("blank", "other"))
            each = [
                compute(params, Networks({}, {}), batch, others, np.float32(s), blank, other)
                for s in SIGMAS
            ]
            losses.append(np.mean(jax.device_get(each), axis=0))
    return np.stack(losses)


def sections_of(task: FlowMatchingTask) -> Iterator[Batch]:
    """Yield a batch of all held-out clips for each section of their plan."""
    plan = packing.plan(task.schedule, SECTIONS, before=0, alone=True)
    records = task.loader.held_out_records(len(task.loader.held))
    for number, section in enumerate(plan):
        samples = [
            latent_sample(
                record, section, conditions_of(record, task.manifest.text_tokens),
                make_meta(FIRST_ELEMENT + clip * SECTIONS + number, number, SECTIONS, clip),
            )
            for clip, record in enumerate(records)
        ]  # fmt: skip
        yield jax.tree.map(lambda *x: np.stack(x), *samples)


def compared(worse: np.ndarray, better: np.ndarray) -> Compared:
    """Compare losses (sections, clips), paired by clip."""
    each = (worse - better).mean(axis=0)
    return Compared(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))))


def table(losses: dict[str, np.ndarray]) -> str:
    """Return a Markdown table with a row for each section, and one for those with history."""
    lines = [
        "| sections | without history | with history | less, ± standard error | errors | blanked |"
        " exchanged |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows = [(str(n), slice(n, n + 1)) for n in range(SECTIONS)]
    for name, rows_of in [*rows, (f"1 to {SECTIONS - 1}", slice(1, None))]:
        part = {model: values[rows_of] for model, values in losses.items()}
        found = compared(part["without"], part["with"])
        errors = found.mean / found.error if found.error else math.inf
        cells = [f"{part[model].mean():.4f}" for model in ("without", "with")]
        cells += [f"{found.mean:.4f} ± {found.error:.4f}", f"{errors:.1f}"]
        cells += [f"{part[model].mean():.4f}" for model in ("blanked", "exchanged")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
