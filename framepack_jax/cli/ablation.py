"""`framepack ablation`: train methods from one starting point, and compare them in one table."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from framepack_jax.cli import fit_codebook, prepare, synthetic
from framepack_jax.cli.common import ALONE, cli_errors, configure_jax
from framepack_jax.cli.config_file import defaults
from framepack_jax.cli.evaluate import Suites, check_suites, config_of, settings_of
from framepack_jax.toy.methods import Method
from framepack_jax.training.config import TrainConfig
from framepack_jax.utils.flags import parse

# Nothing of the demo world is to be left out: sprites stay, and start images are plain.
EVERYTHING = (
    "--scene-threshold=1", "--min-motion=0", "--min-sharpness=0", "--max-still=1",
    "--min-seconds=1", "--keep-duplicates",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Methods, and what they have in common."""

    output: Path | None = None
    """Folder of the dataset, the training runs, the evaluation and the report."""
    methods: tyro.conf.Suppress[tuple[Method, ...]] = ()
    """Rows of the table."""
    only: tuple[str, ...] = ()
    """Names of the methods to train and evaluate; default: all of the configuration."""
    clips: int = 256
    """Number of videos of the demo world to train on, of the size of the evaluation."""
    seconds: float = 5.0
    """Length of each of these videos."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Settings of training that all methods share. --train.init is their starting point; with
    --train.data.path, they train on that dataset."""
    evaluate: Suites = dataclasses.field(default_factory=Suites)


@dataclasses.dataclass(frozen=True)
class Ablation(AblationConfig):
    """Train methods from one starting point, evaluate them with the same first frames, captions and
    noise, and compare them in one table.

    The methods are those of a configuration: --config ablation. One after the other is trained and
    evaluated, and the report is written after each. The output folder holds report.md and
    report.json (results with standard errors, and costs), runs/ and evaluation/ (plots, contact
    sheets and videos). Run the same command again to resume: finished methods are not made again,
    and more may be added. Needs the extra [eval].
    """

    config: Path | None = None
    """Name of a configuration of this package, ablation, or a Python file that defines
    get_config(), which returns an AblationConfig."""


def main(args: list[str] | None = None, prog: str = "framepack ablation") -> None:
    """Parse flags and run; user errors end with one line and exit code 1."""
    args = sys.argv[1:] if args is None else args
    with cli_errors():
        flags = parse(Ablation, args, prog, defaults(Ablation, AblationConfig, args))
    from framepack_jax.cli import training
    from framepack_jax.utils import extras

    with training.training_errors():
        extras.require("eval", extras.EVAL, prog)
        print(_run(flags))


def _run(cfg: AblationConfig) -> Path:
    """Train and evaluate each method; return the path of the report. Raises ValueError, OSError."""
    if cfg.output is None:
        raise ValueError("give --output, a folder for the results")
    methods, size = _chosen(cfg), check_suites(cfg.evaluate)
    from framepack_jax.toy import ablation, evaluation, rows

    configure_jax(training=True)
    common = cfg.train
    if not common.data.paths:
        data = dataclasses.replace(common.data, path=str(cfg.output / "dataset"))
        common = dataclasses.replace(common, data=data)
    runs = ablation.runs_of(methods, common, cfg.output)
    file = ablation.write_rows(cfg.output, methods, runs)
    specs = rows.read(file, (), (), settings_of(cfg.evaluate))
    for method, run in zip(methods, runs, strict=True):
        ablation.check(method, run)
    if not cfg.train.data.paths:
        _make_dataset(cfg, size)
    results = cfg.output / ablation.EVALUATION
    reported = ablation.reported(cfg.output)
    for number, (method, run) in enumerate(zip(methods, runs, strict=True), start=1):
        trained = _make(run, cfg.output)
        if trained or method.name not in reported or number == len(runs):
            made = specs[:number]
            evaluation.evaluate(config_of(cfg.evaluate, size, results, made))
            each = zip(made, runs, strict=False)
            costs = {s.label: ablation.cost(s, r.output, results, size) for s, r in each}
            report = ablation.write_report(cfg.output, methods[:number], runs[:number], costs)
    return report


def _chosen(cfg: AblationConfig) -> Sequence[Method]:
    """Return the methods of --only. Raises ValueError if there is none."""
    names = [method.name for method in cfg.methods]
    if not names:
        raise ValueError("there are no methods; give --config, for example ablation")
    if unknown := [name for name in cfg.only if name not in names]:
        raise ValueError(f"--only {unknown[0]!r}: expected one of {', '.join(map(repr, names))}")
    return [method for method in cfg.methods if not cfg.only or method.name in cfg.only]


def _make(run: TrainConfig, output: Path) -> bool:
    """Fit the codebook of a run, train and export it; return False if that is done already."""
    from framepack_jax.cli import training
    from framepack_jax.toy import ablation

    if ablation.is_trained(run):
        return False
    entries = ablation.entries_of(run)
    fitted = None if entries is None else ablation.codebook_file(output, entries)
    if run.codebook == fitted and fitted is not None and not Path(fitted).exists():
        data = run.data.paths[0]
        fit_codebook.main([f"--data={data}", f"--output={fitted}", f"--entries={entries}"])
    training.train(run, None, ALONE, resume=True, export=True)
    return True


def _make_dataset(cfg: AblationConfig, size: tuple[int, int]) -> None:
    """Draw and encode the videos to train on, unless they are there. Raises ValueError if others
    are."""
    from framepack_jax.data.records import INDEX
    from framepack_jax.toy import ablation

    assert cfg.output is not None
    pixels = f"{size[0]}x{size[1]}"
    made_with = {"clips": cfg.clips, "seconds": cfg.seconds, "size": pixels}
    ablation.note_world(cfg.output, made_with | {"bundle": cfg.train.bundle})
    videos, dataset = f"{cfg.output}/videos", f"{cfg.output}/dataset"
    if (Path(dataset) / INDEX).exists():
        return
    synthetic.main([
        "--output", videos, "--clips", str(cfg.clips), "--seconds", str(cfg.seconds),
        "--size", pixels,
    ])  # fmt: skip
    prepare.main([
        "--videos", videos, "--bundle", cfg.train.bundle, "--output", dataset,
        "--buckets", pixels, *EVERYTHING,
    ])  # fmt: skip
