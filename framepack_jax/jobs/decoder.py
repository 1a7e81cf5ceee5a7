"""From the latents of a run to its frames, section by section, beside what the device does next."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from framepack_jax.generation.crossfade import Splicer, to_uint8
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.request import Layout, SourceVideo
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.packing import Timeline
from framepack_jax.parallel.multihost import Terminated


class DeferredDecode:
    """The host's part of decoding, put off until the device has other work. At most one clip waits
    for it; what still does at the end is done there, and so it is where work is stopped."""

    def __init__(self) -> None:
        self._rest: Callable[[], None] | None = None

    def __enter__(self) -> "DeferredDecode":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.finish()
        # After an error of its own a process would wait here for the others.
        elif jax.process_count() == 1 or isinstance(error, Terminated):
            # That error is what people are told of; frames that are not written are made again.
            with contextlib.suppress(Exception):
                self.finish()

    def add(self, start: Callable[..., Callable[[], None]], *args: Any) -> None:
        """Start a clip on the device, and then do the host's part of the one before."""
        rest = start(*args)
        self.finish()
        self._rest = rest

    def finish(self) -> None:
        """Do what was put off."""
        rest, self._rest = self._rest, None
        if rest is not None:
            rest()


class Decoder:
    """Decodes the sections of one run of a group and adds what becomes final to its video."""

    def __init__(
        self,
        pipe: FramePack,
        run: RunDir,
        layout: Layout,
        footage: SourceVideo | None,
        timeline: Timeline,
        sample: int,
    ) -> None:
        """The run's latents are those of one `sample` of the timeline; its video goes on from
        prepared `footage`, if any."""
        self.pipe, self.run, self.layout = pipe, run, layout
        self.timeline, self.sample = timeline, slice(sample, sample + 1)
        self.splicer: Splicer = pipe.splicer(layout.plan, layout.before)
        self.given = [] if footage is None else [len(layout.plan)]
        if footage is not None:
            self.splicer.add(len(layout.plan), pipe.overlap(layout, footage))

    def catch_up(self, done: int) -> None:
        """Decode again what the `done` sections of an earlier run have left to their neighbours,
        and all that has no frames yet."""
        ready = min(self.run.spans(), done)
        for number in self.splicer.waiting([*range(ready), *self.given]):
            if number < ready:
                clip, check = self._clip(number)
                check()
                self.splicer.add(number, clip)
        for number in range(ready, done):
            self.add(number)
        # An earlier run may have stopped between its last frames and this.
        self.run.join()

    def add(self, number: int) -> None:
        """Decode section `number` and write the frames that are final with it."""
        self.start(number)()

    def start(self, number: int) -> Callable[[], None]:
        """Set the device to work on section `number`; what this gives waits for it and writes the
        frames that are final with it."""
        clip, check = self._clip(number)
        start, frames = self.splicer.add(number, clip)
        pixels = to_uint8(frames, self.layout.height, self.layout.width)

        def write() -> None:
            check()
            self.run.add_span(number, start, np.asarray(pixels)[0])

        return write

    def _clip(self, number: int) -> tuple[jax.Array, Callable[[], None]]:
        return self.pipe.start_clip(self.layout.plan[number], self.timeline, self.sample)
