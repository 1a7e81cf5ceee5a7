"""Sample and decode the videos of run folders, side by side if their layouts are equal."""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from framepack_jax import video
from framepack_jax.generation.decoding import preview_of
from framepack_jax.generation.encoding import Inputs
from framepack_jax.generation.layout import fit_images
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.results import NotFinite
from framepack_jax.jobs.decoder import Decoder, DeferredDecode
from framepack_jax.jobs.errors import FAILURES, explained
from framepack_jax.jobs.progress import Progress
from framepack_jax.jobs.record import record_text
from framepack_jax.jobs.run_dir import Busy
from framepack_jax.jobs.run_files import DamagedFile
from framepack_jax.jobs.task import Task
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
from framepack_jax.utils.files import local_copy
from framepack_jax.utils.progress import Bar

logger = logging.getLogger(__name__)


def make_all(
    pipe: FramePack, tasks: Sequence[Task], batch: int = 1, decode: bool = True
) -> Iterator[tuple[Task, Exception | None]]:
    """Sample every video, `batch` side by side; yield each finished task with its error, if any.

    An error does not stop the other videos. Videos that another process works on come last: they
    are sampled here if that process ended without finishing them, else yielded with Busy.
    """
    left = list(tasks)
    busy: list[tuple[Task, Busy]] = []
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
    """Group the tasks that are computed side by side."""
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.key, []).append(task)
    return groups


def _take(task: Task) -> bool:
    """Lock the folder of a task, and replace the task if another process has changed its run.

    Returns False if that process has finished the run. Raises Busy, ValueError, OSError.
    """
    task.run.lock()
    while task.refresh is not None and record_text(task.run.folder) != task.seen:
        task.run.unlock()
        renewed = task.refresh()
        if renewed is None:
            logger.info("%s: finished by another process", task.run.folder)
            return False
        task.replace_with(renewed)
        task.run.lock()
    return True


def _make_group(
    pipe: FramePack, tasks: Sequence[Task], decode: bool
) -> Iterator[tuple[Task, Exception | None]]:
    """Sample tasks side by side; failed tasks do not stop the others."""
    begun: list[Task] = []
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
        reason: Exception
        while begun:
            try:
                _make(pipe, begun, decode)
                yield from ((task, None) for task in begun)
                return
            except NotFinite as error:
                # The other videos continue from their last finished section.
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
        # Folders of other tasks may hold earlier runs, which stay as they are.
        for task in begun:
            task.run.note("interrupted")
        raise
    finally:
        for task in tasks:
            task.run.unlock()
            task.request = None


def _begin(pipe: FramePack, task: Task) -> None:
    """Make the folder of a new run, or read the inputs of an earlier one."""
    if task.read is None:
        task.request = task.run.request()
        _mend_known(pipe, task)
        return
    request, beginning = on_all_hosts(task.read)
    assert_same_on_hosts("images, prompts and seeds", request)
    task.request = fit_images(pipe.geometry, request, task.layout)
    known = pipe.given_latents(task.prepared, task.layout)
    task.run.begin(task.request, known, beginning)
    task.read = None


def _mend_known(pipe: FramePack, task: Task) -> None:
    """Encode the given latents of a run again if their file is damaged; those of an extended video
    cannot be encoded again. Raises DamagedFile, OSError."""
    try:
        task.run.known()
    except (DamagedFile, FileNotFoundError) as error:
        if task.prepared.source_video is not None:
            raise DamagedFile(f"{error}; make the video again with --overwrite") from error
        logger.warning("%s; it is encoded again", error)
        task.run.save_known(pipe.given_latents(task.prepared, task.layout))


def _make(pipe: FramePack, tasks: Sequence[Task], decode: bool) -> None:
    """Sample videos of one group side by side, after their finished sections. Raises NotFinite,
    OSError."""
    began = time.monotonic()
    layout, settings, prompt_blend = tasks[0].group
    timeline, known, done = _restore(pipe, tasks)

    def encode() -> Inputs:
        requests = [
            dataclasses.replace(task.prepared, prompt=task.run.prompt(done)) for task in tasks
        ]
        return pipe.encode(requests, layout, settings, prompt_blend, known)

    _steer(tasks, done)
    inputs = encode()
    decoders = [_decoder(pipe, task, timeline, i) for i, task in enumerate(tasks)] if decode else []
    for decoder in decoders:
        decoder.catch_up(done)
    seeds = [task.prepared.seed for task in tasks]
    encoded = time.monotonic()
    _add_timing(tasks, "encode_seconds", round(encoded - began, 3))
    blocks = settings.passes * offload.offloaded_layers(pipe.transformer.params)

    def steps(section: int) -> int:
        return sum(settings.stage_steps(pipe.sampling, section))

    with (
        Progress(tasks, done, blocks, steps, preview_of(pipe)) as progress,
        DeferredDecode() as frames,
    ):

        def on_step(*step: Any) -> None:
            # The device is busy with the next step (unless blocks are offloaded): the host
            # encodes the frames of the previous section.
            frames.finish()
            progress.step(*step)

        section_from = time.monotonic()
        while done < len(layout.plan):
            made = pipe.sample(
                layout.plan, inputs, settings,
                seeds=seeds, timeline=timeline, done=done,
                on_step=on_step, on_block=progress.block,
            )  # fmt: skip
            for section, _ in made:
                # Latents are saved before anything is decoded.
                for task, latents in zip(tasks, timeline.read(section.targets), strict=True):
                    task.run.save_section(done, section, latents)
                stop_if_asked()
                for decoder in decoders:
                    frames.add(decoder.start, done)
                done += 1
                if done == len(layout.plan):
                    frames.finish()
                now = time.monotonic()
                _add_timing(tasks, "section_seconds", [round(now - section_from, 3)])
                section_from = now
                if done < len(layout.plan) and _steer(tasks, done):
                    inputs = encode()
                    break
    for task in tasks:
        finish(task, decode)


def _steer(tasks: Sequence[Task], section: int) -> bool:
    """Record the prompts that came before a section; return whether any video has another prompt
    than in the section before."""
    for task in tasks:
        if task.steering is not None:
            recorded = len(task.run.record.get("steered", []))
            if prompts := task.steering()[recorded:]:
                task.run.steer(section, prompts)
    return any(task.run.prompt(section) != task.run.prompt(section - 1) for task in tasks)


def _decoder(pipe: FramePack, task: Task, timeline: Timeline, sample: int) -> Decoder:
    return Decoder(pipe, task.run, task.layout, task.prepared.source_video, timeline, sample)


def finish(task: Task, decode: bool) -> None:
    """Write the contact sheet, a GIF if asked for, and the final record."""
    run = task.run
    if decode:
        on_primary(_save_pictures, run.folder, run.record["flags"].get("gif", False))
    timings = run.record["timings"]
    # Earlier versions recorded two times for a section.
    seconds = float(sum(map(np.sum, timings.get("section_seconds", []))))
    frames = run.record["frames"] - run.record["beginning"]
    timings |= {"seconds_per_frame": seconds / frames, "peak_memory_bytes": peak_memory()}
    run.write_record(status="finished" if decode else "sampled")


def _save_pictures(folder: epath.Path, gif: bool) -> None:
    with local_copy(folder / "video.mp4") as made:
        video.save_png(folder / "preview.png", video.contact_sheet_mp4(made))
        if gif:
            video.save_gif(folder / "video.gif", made)


def _restore(pipe: FramePack, tasks: Sequence[Task]) -> tuple[Timeline, dict[int, np.ndarray], int]:
    """Return the timeline with given latents and the sections that all runs have, the given latents
    (B, H, W, C) by position, and the number of those sections."""
    plan = tasks[0].layout.plan
    each = [task.run.known() for task in tasks]
    known = {p: np.stack([latents[p] for latents in each]) for p in each[0]}
    size = pipe.frame_size(tasks[0].layout, len(tasks))
    timeline = pipe.timeline(plan, known, size)
    there: list[Sequence[np.ndarray]] = []
    for task in tasks:
        try:
            there.append(task.run.sections(plan, timeline.latents.shape[2:]))
        except DamagedFile as error:
            logger.warning("%s; section %d is sampled again", error, len(error.done) + 1)
            there.append(error.done)
    done = min(len(sections) for sections in there)
    for number in range(done):
        latents = np.stack([sections[number] for sections in there])
        timeline.write(plan[number].targets, latents)
    return timeline, known, done


def decode_again(pipe: FramePack, task: Task) -> int:
    """Decode all sections of a locked run; return their number."""
    run, plan = task.run, task.layout.plan
    task.request = run.request()
    _mend_known(pipe, task)
    timeline, _, done = _restore(pipe, [task])
    if not done:
        raise ValueError(
            f"{run.folder} has no section yet; continue it: framepack resume {run.folder}"
        )
    # Until everything is decoded again, the run has latents only.
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
    """Add to a timing in the records, which are written when a section is finished."""
    for task in tasks:
        timings = task.run.record["timings"]
        timings[name] = timings[name] + value if name in timings else value


def peak_memory() -> int:
    """Return the peak memory in bytes: of the device if it counts them, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(stats.get("peak_bytes_in_use", process))
