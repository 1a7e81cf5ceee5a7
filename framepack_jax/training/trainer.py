"""The training loop, for every task.

Parameters, optimizer state and the position in the stream of samples are in the checkpoints, and
random numbers derive from the number of a sample or step. Killing and resuming a run at any point
therefore gives bit-identical results.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from framepack_jax.data.batch import LOST
from framepack_jax.data.records import DatasetError
from framepack_jax.parallel import multihost
from framepack_jax.training import checkpoints, goodput, metrics, optimizer, summary
from framepack_jax.training.bad_records import BadRecords
from framepack_jax.training.best import Best, read_best, write_best
from framepack_jax.training.checkpoint_writer import CheckpointWriter
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.goodput import Life
from framepack_jax.training.host_times import HostTimes
from framepack_jax.training.prefetch import Fed, feed
from framepack_jax.training.profiling import Profile
from framepack_jax.training.programs import Programs, compile_steps, shapes_of
from framepack_jax.training.skips import Skips, TooManySkips
from framepack_jax.training.state import TrainState
from framepack_jax.training.stop_signal import Stopped, StopSignal
from framepack_jax.training.task import Cost, Frozen, Record, StepMetrics, Task, Validator
from framepack_jax.training.watchdog import Watchdog
from framepack_jax.utils.heartbeat import Heartbeat
from framepack_jax.utils.progress import Bar

NO_CLIPS = np.zeros(0, np.int32)


class Pending(NamedTuple):
    """A step whose metrics have not been read: its number from 1, the metrics, the cost of a
    sample, and the position in the stream of samples after it."""

    step: int
    metrics: StepMetrics
    cost: Cost | None
    position: dict[str, Any]


class Trainer:
    """Train a task from its first step, or from its newest checkpoint, to its last step."""

    writer: CheckpointWriter
    log: metrics.Log
    bar: Bar
    bad: BadRecords
    skips: Skips
    validator: Validator | None
    watchdog: Watchdog
    life: Life
    profile: Profile

    def __init__(
        self, task: Task, say: Callable[[str], None] = print, stop: StopSignal | None = None
    ) -> None:
        self.task, self.cfg, self.say = task, task.cfg, say
        self.stop = StopSignal(task.cfg.stop_seconds) if stop is None else stop
        # The caller has entered the context of a signal that it gives.
        self.signals = self.stop if stop is None else contextlib.nullcontext()
        self.error: Exception | None = None
        self.unsaved = False
        self.saved_at = time.monotonic()
        self.hosts = HostTimes()
        self.best: Best | None = None

    def fit(self, resume: bool = True) -> int:
        """Train to the last step, or until a signal stops the run; returns the step reached.

        Raises ValueError (RunError, BundleError, DatasetError) if the run is impossible, OSError if
        a checkpoint cannot be written, TooManySkips."""
        task, cfg = self.task, self.cfg
        newest, record = self._record(resume)
        self.life = Life(cfg.output if multihost.is_primary() else None)
        with (
            self.signals,
            task.precision(),
            contextlib.closing(Watchdog(cfg.watchdog_seconds)) as self.watchdog,
            contextlib.closing(self._open_checkpoints()) as self.writer,
        ):
            with jax.set_mesh(task.mesh):
                state, frozen = self.start() if newest is None else self.resume()
            multihost.on_primary(checkpoints.write_record, cfg.output, record)
            first = int(state.step)
            return first if first >= cfg.steps else self.train(state, frozen, first, record)

    def _open_checkpoints(self) -> CheckpointWriter:
        output, cfg = self.cfg.output, self.cfg.checkpoints
        if cfg.keep_best:
            steps = multihost.on_primary(checkpoints.steps_of, output)
            self.best = multihost.on_primary(read_best, output, steps)
        return CheckpointWriter(checkpoints.manager(output, cfg, self.best))

    def _record(self, resume: bool) -> tuple[int | None, Record]:
        """Return (newest checkpoint of the run or None, the record of the run)."""
        output = self.cfg.output
        steps = multihost.on_primary(checkpoints.steps_of, output)
        if not steps:
            return None, self.task.record(None)
        if not resume:
            raise RunError(
                f"{output} holds a run up to step {steps[-1]}; choose another --output, or resume"
                " it: --resume auto"
            )
        previous = multihost.on_primary(checkpoints.read_record, output)
        return steps[-1], self.task.record(previous)

    def start(self) -> tuple[TrainState[jax.Array], Frozen]:
        """Return (state before the first step, frozen parameters)."""
        state, frozen, origin = self.task.init_state()
        self.bad = BadRecords(self.task.loader, self.task.max_bad_records)
        self.skips = Skips(self.cfg)
        self.say(f"{self.cfg.output}: starts from {origin}")
        return state, frozen

    def resume(self) -> tuple[TrainState[jax.Array], Frozen]:
        """Return (state of the newest whole checkpoint, frozen parameters); moves the loader to its
        position."""
        manager, abstract = self.writer.manager, self.task.abstract
        step, state, data, said = checkpoints.restore_newest(manager, abstract)
        for line in said:
            self.say(f"warning: {line}")
        unread, norms = data.pop("unread", []), data.pop("norms", [])
        self.task.loader.set_state(data)
        frozen = self.task.load_frozen()
        self.bad = BadRecords(self.task.loader, self.task.max_bad_records, unread)
        self.skips = Skips(self.cfg, step, int(state.skipped), norms)
        self.say(f"{self.cfg.output}: resumes after step {step}")
        return state, frozen

    def train(
        self, state: TrainState[jax.Array], frozen: Frozen, first: int, record: Record
    ) -> int:
        """Train from a state after step `first`; returns the step reached."""
        task, cfg = self.task, self.cfg
        self.bad.check_again()
        multihost.on_all_hosts(task.check_data)
        rate = optimizer.learning_rate(cfg.optimizer, cfg.steps)
        writers = multihost.on_all_hosts(metrics.writers, cfg, first, record)
        self.log = metrics.Log(cfg, rate, writers, task.figures, task.flops_factor)
        with contextlib.ExitStack() as exits:
            exits.enter_context(contextlib.closing(self.log))
            self.validator = multihost.on_all_hosts(task.validator, frozen)
            for line in task.describe(first):
                self.say(line)
            self.say(summary.state_memory_line(task.abstract, frozen))
            self.life.switch("compile")
            self.watchdog.allow("compiling")
            programs = compile_steps(task, frozen, self.say)
            if memory := summary.step_memory_line(programs):
                self.say(memory)
            if self.life.earlier:
                self.say(goodput.line(self.life.summary(), len(self.life.earlier) + 1))
            self.position = task.loader.get_state()
            batches = feed(task.loader, task.mesh, cfg.batch, task.blank)
            exits.enter_context(contextlib.closing(batches))
            self.bar = exits.enter_context(Bar(
                total=cfg.steps, initial=first, desc="training", unit="step",
                disable=metrics.is_quiet(), smoothing=0.1,
            ))  # fmt: skip
            self.profile = exits.enter_context(contextlib.closing(Profile(cfg.output, cfg.profile)))
            with self.stop.unsaved():
                step = self.steps(state, frozen, first, programs, batches)
                self.life.switch("save")
                self.watchdog.allow(f"saving step {step}")
                self.writer.wait()
            self.life.write(step, now=True)
        self.say(goodput.line(self.life.summary(), len(self.life.earlier) + 1))
        if step < cfg.steps:
            self.bad.check(f"step {step} is saved; ")
        if self.skips.count:
            self.say(f"steps whose update was skipped: {self.skips.count} of {step}")
        if self.bad:
            self.say(f"clips that could not be read and were replaced: {self.bad}")
        return step

    def steps(
        self,
        state: TrainState[jax.Array],
        frozen: Frozen,
        first: int,
        programs: Programs,
        batches: Iterator[Fed],
    ) -> int:
        """Take the steps after `first`. The metrics of a step are read while the next one runs."""
        cfg, pending = self.cfg, None
        heartbeat = Heartbeat(cfg.output if multihost.is_primary() else None)
        self.watchdog.begin_step(first + 1)
        self.life.begin(first)
        for step in range(first + 1, cfg.steps + 1):
            fed = self._next(batches, pending, state, first)
            self.log.wait(fed.waited)
            self.life.waited(fed.waited)
            self.hosts.waited += fed.waited
            if step == first + 1:
                self._start_clocks()
            compiled, cost = programs[shapes_of(fed.batch)]
            self.profile.before(step)
            rate, limit = self.log.rate(step - 1), self.skips.limit(step)
            state, found = compiled(state, frozen, fed.batch, rate, limit)
            if pending is not None:
                self._read(pending, state, first)
            self.profile.after(step, found)
            pending = Pending(step, found, cost, fed.state)
            self.bar.update()
            self.watchdog.beat(step)
            heartbeat.beat(step)
            if self.writer.failed():
                # All processes stop after the same step, and hear why when they save it.
                self.stop.request()
            told = self.stop.called()
            stop = told or step == cfg.steps or self.bad.too_many
            saves = stop or self.unsaved or self._is_due(step)
            validates = self.validator is not None and self.task.validates_after(step)
            if saves or validates:
                self._read(pending, state, first)
                pending = None
            # Reading the metrics may have shown that a clip is unreadable.
            if saves or self.unsaved:
                with self._paused("save", step):
                    self.save(step, state, fed.state)
            if validates and not told:
                with self._paused("validate", step):
                    figures = self.validate(step, state, frozen)
                stop |= figures is None
                if (self._note_best(step, figures) or stop) and not saves:
                    with self._paused("save", step):
                        self.save(step, state, fed.state)
            if stop or self.bad.too_many:
                break
        return step

    def _is_due(self, step: int) -> bool:
        """Return True if a checkpoint is due after this step, by the number of steps or by time.

        The first process reads the clock, when a line of the log is due."""
        every, minutes = self.cfg.checkpoints.every, self.cfg.checkpoints.minutes
        if step % every == 0:
            return True
        if not minutes or step % self.cfg.log_every:
            return False
        return multihost.on_primary(lambda: time.monotonic() - self.saved_at >= 60 * minutes)

    def _next(
        self,
        batches: Iterator[Fed],
        pending: Pending | None,
        state: TrainState[jax.Array],
        first: int,
    ) -> Fed:
        """Return the next batch. If there is none, save the state and raise DatasetError."""
        try:
            fed = next(batches)
        except Exception as error:
            self.error = error
            if pending is not None:
                self._read(pending, state, first)
            self._end_before(int(state.step) + 1, state, first)
        self.error = self.error or fed.error
        return fed

    def _start_clocks(self) -> None:
        """Count neither compiling nor the wait for the first batch."""
        self.log.begin()
        self.hosts.begin()
        self.bar.unpause()

    @contextlib.contextmanager
    def _paused(self, what: str, step: int) -> Iterator[None]:
        """Exclude the time spent inside, after a step, from the log's rates and from the bar's
        estimate."""
        before, began = self.life.switch(what), time.monotonic()
        with self.log.paused(), self.watchdog.during(f"{what} after step {step}", step):
            yield
        self.life.switch(before)
        self.hosts.blocked += time.monotonic() - began
        self.bar.unpause()

    def save(self, step: int, state: TrainState[jax.Array], position: dict[str, Any]) -> None:
        """Write a checkpoint in the background."""
        unread = {"unread": sorted(self.bad.numbers)} if self.bad else {}
        norms = {"norms": [*self.skips.norms]} if self.skips.norms else {}
        # A checkpoint has the log of its steps.
        self.log.flush()
        self.writer.save(step, state, position | unread | norms)
        self.unsaved, self.saved_at = False, time.monotonic()

    def validate(
        self, step: int, state: TrainState[jax.Array], frozen: Frozen
    ) -> dict[str, float] | None:
        """Log the metrics on held-out data, of the moving average if the run has one. Returns None
        if a signal has ended the validation."""
        assert self.validator is not None
        params = state.params if state.ema is None else state.ema
        try:
            figures = self.validator(step, params, frozen, self.stop.check)
        except Stopped:
            return None
        self.log.write(step, figures)
        self.log.show(step)
        return figures

    def _note_best(self, step: int, figures: dict[str, float] | None) -> bool:
        """Return True if the checkpoint of this step is to be kept as the best so far."""
        if self.best is None or figures is None or not self.best.note(step, figures):
            return False
        multihost.on_primary(write_best, self.cfg.output, self.best)
        return True

    def _read(self, pending: Pending, state: TrainState[jax.Array], first: int) -> None:
        """Read the metrics of a step and log them; `state` is the newest state.

        Raises TooManySkips, DatasetError."""
        step, cfg = pending.step, self.cfg
        began = time.monotonic()
        found = jax.device_get(multihost.fetch(pending.metrics))
        self.hosts.blocked += time.monotonic() - began
        clips = found.figures.get("clips", NO_CLIPS)
        if (clips == LOST).any():
            self._end_before(step, state, first)
        self.position = pending.position
        self.log.add(step, found, pending.cost)
        self.bar.set_postfix(loss=f"{found.loss:.4f}", refresh=False)
        self.unsaved |= self.bad.note(step, clips)
        self._note_skips(step, found, clips)
        if step % cfg.log_every == 0 or step == cfg.steps:
            self.life.write(step)
            self.log.line(
                goodput_fraction=goodput.goodput(self.life.summary()),
                **self.hosts.figures(len(self.log.held)),
                **({"unread_clips": len(self.bad.numbers)} if self.bad else {}),
                **self.skips.figures,
            )

    def _note_skips(self, step: int, found: StepMetrics, clips: np.ndarray) -> None:
        """Note whether a step was skipped. Raises TooManySkips."""
        try:
            self.skips.note(step, found, self.task.clip_ids(clips) if found.skipped else ())
        except TooManySkips as error:
            manager = self.writer.manager
            kept = manager.latest_step()
            raise TooManySkips(
                f"{error}; the last checkpoint in {manager.directory} is"
                f" {'not written yet' if kept is None else f'step {kept}'}. Lower"
                " --optimizer.learning-rate, or check the data"
            ) from error

    def _end_before(self, step: int, state: TrainState[jax.Array], first: int) -> None:
        """Save the state before `step`, whose batch some host could not read, and raise
        DatasetError. Steps since then made no update; only their counts are undone."""
        if step - 1 > first:
            over = int(state.step) - (step - 1)
            before = state.replace(
                step=state.step - over, skipped=state.skipped - over,
                skipped_in_a_row=state.skipped_in_a_row - over,
            )  # fmt: skip
            self.watchdog.allow(f"saving step {step - 1}")
            self.save(step - 1, before, self.position)
            self.writer.wait()
        cause = self.error or "another process cannot read its part of the batch"
        raise DatasetError(
            f"step {step} has no data: {cause}. Once the data can be read, run the same command"
            f" again to resume after step {step - 1}"
        ) from self.error
