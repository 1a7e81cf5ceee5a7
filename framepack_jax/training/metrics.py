"""Metrics of a run: log.jsonl, and on request TensorBoard and Weights & Biases.

The metrics of a step are fetched while the next step runs, so the device never waits for the log.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from PIL import Image

from framepack_jax import packing
from framepack_jax.parallel.chips import chip_of
from framepack_jax.parallel.multihost import is_primary
from framepack_jax.training import log_file
from framepack_jax.training.config import RunConfig
from framepack_jax.training.log_file import LogFile, LogParts
from framepack_jax.training.state import Model
from framepack_jax.training.task import Cost, StepMetrics
from framepack_jax.utils import storage
from framepack_jax.utils.paths import is_remote
from framepack_jax.utils.uploads import Uploads

# Groups of the losses: ranges of the noise level from low to high, sections in sampling order.
BINS = 5
SECTIONS = 4
# Cost of a step in forward passes. The backward pass costs two, for the gradients of weights and of
# activations; frozen weights need only the second.
COST = {"all": 3, "context": 2, "lora": 2}


class Writer(Protocol):
    """A destination of metrics, and of the contact sheets and videos of validations."""

    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def show(self, step: int, name: str, sheet: np.ndarray, video: epath.Path) -> None: ...

    def flush(self) -> None:
        """Keep what was written, whatever happens to this process."""

    def close(self) -> None: ...


class Jsonl:
    """Write one JSON object a line to the log."""

    def __init__(self, file: LogFile | LogParts) -> None:
        self.file = file

    def write(self, step: int, figures: dict[str, float]) -> None:
        # JSON has no NaN and no infinity.
        self.file.write(step, {n: x if math.isfinite(x) else None for n, x in figures.items()})

    def show(self, step: int, name: str, sheet: np.ndarray, video: epath.Path) -> None:
        """Do nothing: the run has the files."""

    def flush(self) -> None:
        """Do nothing: each line is flushed."""

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Write event files to RUN/tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, name: str, sheet: np.ndarray, video: epath.Path) -> None:
        self.writer.add_image(f"validation/{name}", sheet, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Uploaded:
    """Copy the files of other writers to the run, every few seconds and at the end."""

    def __init__(self, run: epath.Path, uploads: Uploads) -> None:
        self.run, self.uploads = run, uploads

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Do nothing: the files are copied in the background."""

    def show(self, step: int, name: str, sheet: np.ndarray, video: epath.Path) -> None:
        """Do nothing: the run has the files."""

    def flush(self) -> None:
        self.uploads.copy()

    def close(self) -> None:
        if self.uploads.close():
            log_file.join(self.run)


class WandB:
    """Log to a run of Weights & Biases; the same run folder resumes the same run."""

    def __init__(self, run: epath.Path, project: str, record: dict[str, Any]) -> None:
        import wandb

        # A run folder always resumes the same wandb run; another folder gets another run.
        path = str(run) if is_remote(run) else os.path.realpath(run)
        place, name = hashlib.sha256(path.encode()).hexdigest()[:8], os.path.basename(path)
        self.run = wandb.init(
            project=project, id=f"{name}-{place}", name=name, config=record, resume="allow"
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def show(self, step: int, name: str, sheet: np.ndarray, video: epath.Path) -> None:
        import wandb

        shown = {f"validation/{name}_sheet": wandb.Image(sheet)}
        if not is_remote(video) and video.exists():
            shown[f"validation/{name}"] = wandb.Video(os.fspath(video), format="mp4")
        self.run.log(shown, step=step)

    def flush(self) -> None:
        """Do nothing: a process of its own sends the metrics."""

    def close(self) -> None:
        self.run.finish()


def validation_folder(run: epath.PathLike, step: int) -> epath.Path:
    """Return the folder with the videos of the validation after a step."""
    return epath.Path(run) / "validation" / f"step_{step:07d}"


def writers(cfg: RunConfig, step: int, record: dict[str, Any]) -> list[Writer]:
    """Return the metrics of a run that resumes after `step`, in the first process. Raises
    ValueError."""
    if not is_primary():
        return []
    run = epath.Path(cfg.output)
    run.mkdir(parents=True, exist_ok=True)
    # Where folders cannot be renamed, files cannot be appended to either.
    if storage.renames_folders(run):
        found: list[Writer] = [Jsonl(LogFile(Path(run), step))]
        found += [TensorBoard(Path(run), step)] if cfg.tensorboard else []
    else:
        uploads = Uploads(run)
        found = [Jsonl(LogParts(run, uploads, step))]
        found += [TensorBoard(uploads.folder, step)] if cfg.tensorboard else []
        found += [Uploaded(run, uploads)]
    return found + ([WandB(run, cfg.wandb, record)] if cfg.wandb else [])


@dataclasses.dataclass
class Log:
    """Collect the metrics of steps and write a line every `cfg.log_every` steps.

    `rate` gives the learning rate of a step, from 0; `figures` summarises the figures of the task;
    `flops_factor` is the cost of a step in forward passes. A line covers the steps since the line
    before it, and so do its rates. Time spent in `paused` (validation, checkpoints) is not counted.
    """

    cfg: RunConfig
    rate: Callable[[int], Any]
    writers: list[Writer]
    figures: Callable[[Sequence[StepMetrics]], dict[str, float]]
    flops_factor: int = 1
    began: float = dataclasses.field(default_factory=time.monotonic)
    held: list[tuple[int, StepMetrics, Cost | None]] = dataclasses.field(default_factory=list)
    waited: float = 0.0

    def wait(self, seconds: float) -> None:
        """Count seconds just waited for a batch."""
        self.waited += seconds

    def add(self, step: int, metrics: StepMetrics, cost: Cost | None) -> None:
        """Add the metrics (numpy) of a finished step, counted from 1."""
        self.held.append((step, metrics, cost))

    def line(self, **more: float) -> None:
        """Write a line for the collected steps, with the metrics `more`."""
        if not self.held:
            return
        steps, metrics, costs = zip(*self.held, strict=True)
        seconds = max(time.monotonic() - self.began, 1e-9)
        samples = self.cfg.batch / seconds
        figures = {
            "loss": float(np.mean([m.loss for m in metrics])),
            "grad_norm": float(np.mean([m.grad_norm for m in metrics])),
            "skipped": float(sum(bool(m.skipped) for m in metrics)),
            **self.figures(metrics),
            "learning_rate": float(self.rate(steps[-1] - 1)),
            "samples_per_second": len(steps) * samples,
            "seconds_per_step": seconds / len(steps),
            "data_wait_fraction": self.waited / seconds,
            **self._throughput([cost for cost in costs if cost], samples),
            **_memory(),
            **more,
        }
        self.write(steps[-1], figures)
        self.begin()

    def _throughput(self, costs: Sequence[Cost], samples: float) -> dict[str, float]:
        """Return tokens and model FLOPs a second, and the fraction of the chips' peak if known."""
        if not costs:
            return {}
        flops = (self.flops_factor * cost.flops + cost.more_flops for cost in costs)
        work = sum(flops) * samples
        figures = {
            "tokens_per_second": sum(cost.tokens for cost in costs) * samples,
            "model_flops_per_second": work,
        }
        if chip := chip_of(jax.devices()[0]):
            figures["mfu"] = work / (chip.flops * jax.device_count())
        return figures

    def begin(self) -> None:
        """Start a new line."""
        self.held, self.waited = [], 0.0
        self.began = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time in this context from the time of the steps."""
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write metrics that do not belong to the collected steps."""
        for writer in self.writers:
            writer.write(step, figures)

    def show(self, step: int) -> None:
        """Show the pictures and videos that the validation after a step has written."""
        if not self.writers:
            return
        folder = validation_folder(self.cfg.output, step)
        sheets = {"sheet": folder.parent / f"{folder.name}.png"}
        sheets |= {file.stem: file for file in folder.glob("*.png")} if folder.exists() else {}
        for name, sheet in sheets.items():
            if sheet.exists():
                with sheet.open("rb") as file, Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
                for writer in self.writers:
                    writer.show(step, name, pixels, sheet.with_suffix(".mp4"))

    def flush(self) -> None:
        """Keep the lines written so far, whatever happens to this process."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        self.line()
        for writer in self.writers:
            writer.close()


def by_group(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Return mean losses by noise level and by section, of the groups that occur."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(m.figures[name]) for m in steps])

    losses = joined("losses")
    bins = np.minimum((joined("sigmas") * BINS).astype(int), BINS - 1)
    sections = np.minimum(joined("sections"), SECTIONS - 1)
    groups: dict[str, list[float]] = defaultdict(list)
    for loss, level, section in zip(losses.tolist(), bins, sections, strict=True):
        groups[f"loss/sigma_{level / BINS:.1f}_{(level + 1) / BINS:.1f}"].append(loss)
        groups[f"loss/section_{section}{'_on' if section == SECTIONS - 1 else ''}"].append(loss)
    return {name: float(np.mean(values)) for name, values in sorted(groups.items())}


def _memory() -> dict[str, float]:
    """Return the peak memory of a chip so far, if the backend reports it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in stats:
        return {}
    return {"peak_memory_bytes": float(stats["peak_bytes_in_use"])}


def sample_cost(
    model: Model, schedule: packing.Schedule, batch: Any, size: tuple[int, int]
) -> Cost:
    """Return the cost of a sample of a batch, which may be abstract; latents have `size` (rows,
    columns)."""
    text, states = batch.conditions.text.shape[1], batch.conditions.image
    image = 0 if states is None else states.shape[1]
    packed = sum(tokens for _, tokens in packing.context_tokens(schedule, *size))
    tokens = packed + packing.target_tokens(schedule, *size) + image + text
    return Cost(model.spec.forward_flops(model.cfg, schedule, *size, text, image), tokens)


def is_quiet() -> bool:
    """Return True if progress bars are off: by request, or in other processes than the first."""
    return not is_primary() or bool(os.environ.get("FRAMEPACK_NO_PROGRESS"))
