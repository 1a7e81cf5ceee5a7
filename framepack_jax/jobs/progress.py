"""Progress bars and the live preview of a sampling job."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from framepack_jax import video
from framepack_jax.jobs.task import Task
from framepack_jax.parallel.multihost import is_primary, on_primary, stop_if_asked
from framepack_jax.utils.progress import Bar

PREVIEWS_PER_SECTION = 4


class Progress:
    """Progress bars for sections and steps, and for the `blocks` of a step if they are offloaded;
    and the live preview of the section that is being sampled."""

    def __init__(
        self,
        tasks: Sequence[Task],
        done: int,
        blocks: int,
        steps: Callable[[int], int],
        preview: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Begin after `done` sections; `steps(section)` is the number of steps of a section, and
        `preview` the fit of colours to latents (`VaeSpec`)."""
        self.preview = preview
        self.tasks, self.steps_of, self.steps = tasks, steps, steps(done)
        self.sections = len(tasks[0].layout.plan)
        quiet = not is_primary()
        self.bars = [
            Bar(total=self.sections, initial=done, desc="sections", unit="section", disable=quiet),
            Bar(total=self.steps, desc="steps", unit="step", leave=False, disable=quiet),
            Bar(
                total=blocks, desc="blocks", unit="block", leave=False, disable=quiet or not blocks
            ),
        ]

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in reversed(self.bars):
            bar.close()

    def block(self) -> None:
        """Count a block of an offloaded step."""
        self.bars[2].update()

    def step(self, section: int, step: int, x0: jax.Array) -> None:
        """Count a step, and show its prediction (B, w, H, W, C). Stops if a signal came."""
        sections, steps, blocks = self.bars
        if step == 0:
            self.steps = self.steps_of(section)
            steps.reset(self.steps)
        steps.update()
        # A step cache may have skipped blocks of this step.
        blocks.reset()
        if step + 1 == self.steps:
            sections.update()
        stop_if_asked()
        for task in self.tasks:
            if task.on_progress is not None:
                task.on_progress((section + (step + 1) / self.steps) / self.sections)
        parts = range(1, 1 + PREVIEWS_PER_SECTION)
        shown = {round(self.steps * i / PREVIEWS_PER_SECTION) for i in parts}
        if step + 1 in shown and x0.shape[-1] == len(self.preview[0]):
            caption = f"section {section + 1} of {self.sections}, step {step + 1} of {self.steps}"
            on_primary(self._show, np.asarray(x0), caption)

    def _show(self, x0: np.ndarray, caption: str) -> None:
        # NaN is reported at the end of the section; the preview shows it as grey.
        for task, latents in zip(self.tasks, np.nan_to_num(x0), strict=True):
            sheet = video.preview_sheet(latents, caption, self.preview)
            video.save_png(task.run.folder / "preview.png", sheet)
