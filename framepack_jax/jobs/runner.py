"""Sample and decode the videos of run folders, side by side where they are alike."""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from framepack_jax import video
from framepack_jax.generation.pipeline import FramePack, NotFinite, Settings
from framepack_jax.generation.request import Layout, Request, fit_images
from framepack_jax.jobs.decoder import Decoder, DeferredDecode
from framepack_jax.jobs.run_dir import Busy, DamagedFile, RunDir, record_text
from framepack_jax.models import offload
from framepack_jax.packing import Timeline
from framepack_jax.parallel.multihost import (
    assert_same_on_hosts,
    is_collective_error,
    is_primary,
    on_all_hosts,
    on_primary,
    stop_if_asked,
)
from framepack_jax.utils.messages import first_line
from framepack_jax.utils.progress import Bar

logger = logging.getLogger(__name__)
# What a disk, a device or a full memory does.
FAILURES = (OSError, MemoryError, jax.errors.JaxRuntimeError)
# In a record, what depends on the machine that goes on with the run.
HERE = ("offload", "decode_tile")
PREVIEWS_PER_SECTION = 4
# The channels of latents that the cheap preview knows.
PREVIEW_CHANNELS = len(video.PREVIEW_WEIGHT)


# A request, and the frames of an extended video that no section changes, if any.
Inputs = tuple[Request, Iterator[np.ndarray] | None]


@dataclasses.dataclass(eq=False)
class Task:
    """A video to be made: its run folder, and what it is made from.

    For a fresh run `read` gives the request, and the frames of extended footage that no section
    changes, if any; a run that is gone on with has kept its request in the folder. `seen` is the
    record that was in the folder: if another process has changed it since, `look` gives the task
    that is left, None if that process has finished it.
    """

    run: RunDir
    layout: Layout
    settings: Settings
    read: Callable[[], Inputs] | None = None
    request: Request | None = None
    seen: str | None = None
    look: Callable[[], "Task | None"] | None = None

    @property
    def group(self) -> Any:
        """Tasks with equal ones can be computed side by side."""
        return self.layout, self.settings, self.run.record["flags"]["prompt_blend"]

    @property
    def key(self) -> Any:
        """Tasks with equal ones are computed side by side."""
        return self.group, self.batch_peers

    def become(self, other: "Task") -> None:
        """Take over all of another task but how this machine decodes."""
        here = {name: self.run.record[name] for name in HERE if name in self.run.record}
        vars(self).update(vars(other))
        self.run.record |= here

    @property
    def batch_peers(self) -> tuple[str, ...]:
        """What its sections were computed with, by name, if it has any: to the last bit, only the
        same peers gives the same latents, and has come as far."""
        return tuple(self.run.record["batch"]) if self.run.has_sections() else ()


def make_all(
    pipe: FramePack, tasks: Sequence[Task], batch: int = 1, decode: bool = True
) -> Iterator[tuple[Task, Exception | None]]:
    """Make every video, `batch` side by side, and yield each when it is done, with what went wrong
    with it, which does not stop the others.

    Videos that another process is making come last: those that it has not finished when it ends
    are made here, those that it is still making are yielded with Busy.
    """
    left, busy = list(tasks), []
    while left:
        busy, changed = [], []
        for key, group in _groups(left).items():
            taken = []
            for task in group:
                try:
                    if not _take(task):
                        continue
                    if task.key == key:
                        taken.append(task)
                    else:
                        task.run.unlock()
                        changed.append(task)
                except Busy as error:
                    busy.append((task, error))
                except (ValueError, *FAILURES) as error:
                    task.run.unlock()
                    yield task, explained(error)
                if len(taken) == batch:
                    yield from _make_group(pipe, taken, decode)
                    taken = []
            yield from _make_group(pipe, taken, decode)
        left = [*changed, *(task for task, _ in busy)] if len(busy) < len(left) else []
    yield from busy


def _groups(tasks: Sequence[Task]) -> dict[Any, list[Task]]:
    """Tasks that can be computed side by side."""
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.key, []).append(task)
    return groups


def _take(task: Task) -> bool:
    """Lock the folder of a task, which may be another one if another process has changed the run;
    False if that has finished it. Raises Busy, ValueError, OSError."""
    task.run.lock()
    while task.look is not None and record_text(task.run.folder) != task.seen:
        task.run.unlock()
        renewed = task.look()
        if renewed is None:
            logger.info("%s: finished by another process", task.run.folder)
            return False
        task.become(renewed)
        task.run.lock()
    return True


def _make_group(
    pipe: FramePack, tasks: Sequence[Task], decode: bool
) -> Iterator[tuple[Task, Exception | None]]:
    begun = []
    names = [task.run.folder.name for task in tasks]
    try:
        for task in tasks:
            try:
                if not task.batch_peers:
                    task.run.record["batch"] = names
                _begin(pipe, task)
                begun.append(task)
            except (ValueError, *FAILURES) as error:
                if not is_collective_error(error):
                    raise
                yield task, explained(error)
        while begun:
            try:
                _make(pipe, begun, decode)
                yield from ((task, None) for task in begun)
                return
            except NotFinite as error:
                # The others go on without them, from their last finished section.
                failed, reason = [begun[i] for i in error.samples], error.with_traceback(None)
            except (ValueError, *FAILURES) as error:
                if not is_collective_error(error):
                    raise
                failed, reason = begun, explained(error)
            begun = [task for task in begun if task not in failed]
            for task in failed:
                task.run.note("failed")
                yield task, reason
    except KeyboardInterrupt:
        # Of the others, folders may hold earlier runs.
        for task in begun:
            task.run.note("interrupted")
        raise
    finally:
        for task in tasks:
            task.run.unlock()
            task.request = None


def explained(error: Exception) -> Exception:
    """The error of a device or of a full memory in one line, with what helps."""
    if isinstance(error, ValueError | OSError):
        return error
    line = first_line(error)
    full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line
    if not full and "out of memory" not in line.lower():
        return OSError(line)
    return OSError(
        f"out of memory ({line}); --offload full needs less of the device, --vae-tile 256 less"
        " while decoding; for memory of the host see docs/sampling.md, Little memory"
    )


def _begin(pipe: FramePack, task: Task) -> None:
    """Make the folder of a fresh run, or read what an earlier one has kept."""
    if task.read is None:
        task.request = task.run.request()
        _mend_known(pipe, task)
        return
    request, beginning = on_all_hosts(task.read)
    assert_same_on_hosts("images, prompts and seeds", request)
    task.request = fit_images(pipe.geometry, request, task.layout)
    known = pipe.known_latents(task.request, task.layout)
    task.run.begin(task.request, known, beginning)
    task.read = None


def _mend_known(pipe: FramePack, task: Task) -> None:
    """Encode the given latents of a run again where their file is damaged, if its images are all
    that is given. Raises DamagedFile, OSError."""
    try:
        task.run.known()
    except (DamagedFile, FileNotFoundError) as error:
        if task.request.footage is not None:
            raise DamagedFile(f"{error}; make the video again with --overwrite") from error
        logger.warning("%s; it is made again", error)
        task.run.save_known(pipe.known_latents(task.request, task.layout))


def _make(pipe: FramePack, tasks: Sequence[Task], decode: bool) -> None:
    """Make videos of one group side by side, from where they are. Raises NotFinite, OSError."""
    began = time.monotonic()
    layout, settings, prompt_blend = tasks[0].group
    timeline, known, done = _restore(pipe, tasks)
    requests = [task.request for task in tasks]
    inputs = pipe.encode(requests, layout, settings, prompt_blend, known)
    decoders = [_decoder(pipe, task, timeline, i) for i, task in enumerate(tasks)] if decode else []
    for decoder in decoders:
        decoder.catch_up(done)
    seeds = [task.request.seed for task in tasks]
    encoded = time.monotonic()
    _add_timing(tasks, "encode_seconds", round(encoded - began, 3))
    passes = 1 if inputs.negative is None else 2
    blocks = passes * offload.offloaded_layers(pipe.transformer.params)
    with Progress(tasks, done, blocks) as progress, DeferredDecode() as frames:

        def on_step(*step: Any) -> None:
            # The device has the next step at hand (unless blocks are streamed): time for the frames
            # of the section before.
            frames.finish()
            progress.step(*step)

        made = pipe.sample(
            layout.plan, inputs, settings,
            seeds=seeds, timeline=timeline, done=done,
            on_step=on_step, on_block=progress.block,
        )  # fmt: skip
        section_from = time.monotonic()
        for number, (section, _) in enumerate(made, start=done):
            # All latents first: no decoding can lose them.
            for task, latents in zip(tasks, timeline.read(section.targets), strict=True):
                task.run.save_section(number, section, latents)
            stop_if_asked()
            for decoder in decoders:
                frames.add(decoder.start, number)
            if number + 1 == len(layout.plan):
                frames.finish()
            now = time.monotonic()
            _add_timing(tasks, "section_seconds", [round(now - section_from, 3)])
            section_from = now
    for task in tasks:
        finish(task, decode)


def _decoder(pipe: FramePack, task: Task, timeline: Timeline, sample: int) -> Decoder:
    return Decoder(pipe, task.run, task.layout, task.request.footage, timeline, sample)


def finish(task: Task, decode: bool) -> None:
    """The contact sheet, a GIF where it is wanted, and the last word in the record."""
    run = task.run
    if decode:
        on_primary(_save_pictures, run.folder, run.record["flags"].get("gif", False))
    timings = run.record["timings"]
    # Earlier versions noted two parts of a section.
    seconds = float(sum(map(np.sum, timings.get("section_seconds", []))))
    frames = run.record["frames"] - run.record["beginning"]
    timings |= {"seconds_per_frame": seconds / frames, "peak_memory_bytes": peak_memory()}
    run.write_record(status="finished" if decode else "sampled")


def _save_pictures(folder: Path, gif: bool) -> None:
    video.save_png(folder / "preview.png", video.contact_sheet_mp4(folder / "video.mp4"))
    if gif:
        video.save_gif(folder / "video.gif", folder / "video.mp4")


def _restore(pipe: FramePack, tasks: Sequence[Task]) -> tuple[Timeline, dict[int, np.ndarray], int]:
    """The timeline with what is known and the sections that all runs have, what is known by
    position (B, H, W, C), and the number of those sections."""
    plan = tasks[0].layout.plan
    each = [task.run.known() for task in tasks]
    known = {p: np.stack([latents[p] for latents in each]) for p in each[0]}
    timeline = pipe.timeline(plan, known)
    there = []
    for task in tasks:
        try:
            there.append(task.run.sections(plan, timeline.latents.shape[2:]))
        except DamagedFile as error:
            logger.warning("%s; section %d is made again", error, len(error.done) + 1)
            there.append(error.done)
    done = min(len(sections) for sections in there)
    for number in range(done):
        latents = np.stack([sections[number] for sections in there])
        timeline.write(plan[number].targets, latents)
    return timeline, known, done


def decode_again(pipe: FramePack, task: Task) -> int:
    """Decode all sections that a run has, which is locked; returns their number."""
    run, plan = task.run, task.layout.plan
    task.request = run.request()
    _mend_known(pipe, task)
    timeline, _, done = _restore(pipe, [task])
    if not done:
        raise ValueError(
            f"{run.folder} has no section yet; continue it: framepack resume {run.folder}"
        )
    # Until all is decoded again, this is a run whose latents alone are there.
    whole = done == len(plan)
    run.write_record(spans=[], status="sampled" if whole else "interrupted")
    decoder = _decoder(pipe, task, timeline, 0)
    decoder.catch_up(0)
    with DeferredDecode() as frames:
        for number in Bar(range(done), desc="decoding", unit="section", disable=not is_primary()):
            frames.add(decoder.start, number)
            stop_if_asked()
    if whole:
        finish(task, decode=True)
    return done


def _add_timing(tasks: Sequence[Task], name: str, value: Any) -> None:
    """Add to a figure of the records, which are written when a section is done."""
    for task in tasks:
        timings = task.run.record["timings"]
        timings[name] = timings[name] + value if name in timings else value


def peak_memory() -> int:
    """Bytes at the highest: of the device where it counts them, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(stats.get("peak_bytes_in_use", process))


class Progress:
    """Bars for sections and steps, and for the `blocks` of a step if they are streamed; and the
    live preview of what is being made."""

    def __init__(self, tasks: Sequence[Task], done: int, blocks: int) -> None:
        self.tasks, self.steps = tasks, tasks[0].settings.steps
        self.sections = len(tasks[0].layout.plan)
        quiet = not is_primary()
        self.shown = {
            round(self.steps * i / PREVIEWS_PER_SECTION) for i in range(1, PREVIEWS_PER_SECTION + 1)
        }
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
        """Called after every block of a streamed step."""
        self.bars[2].update()

    def step(self, section: int, step: int, x0: jax.Array) -> None:
        """Called after every step with its prediction (B, w, H, W, C)."""
        sections, steps, blocks = self.bars
        if step == 0:
            steps.reset()
        steps.update()
        # Blocks that a step cache leaves out are not counted.
        blocks.reset()
        if step + 1 == self.steps:
            sections.update()
        stop_if_asked()
        if step + 1 in self.shown and x0.shape[-1] == PREVIEW_CHANNELS:
            caption = f"section {section + 1} of {self.sections}, step {step + 1} of {self.steps}"
            on_primary(self._show, np.asarray(x0), caption)

    def _show(self, x0: np.ndarray, caption: str) -> None:
        # What is not a number is told at the end of the section; here it is shown as grey.
        for task, latents in zip(self.tasks, np.nan_to_num(x0), strict=True):
            sheet = video.preview_sheet(latents, caption)
            video.save_png(task.run.folder / "preview.png", sheet)
