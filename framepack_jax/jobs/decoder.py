"""Decode the latents of a run to frames, section by section, while the device samples the next."""

import contextlib
import itertools
from collections.abc import Callable

import jax
import numpy as np

from framepack_jax.generation.crossfade import Splicer, to_uint8
from framepack_jax.generation.layout import Layout
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.request import SourceVideo
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.packing import Timeline
from framepack_jax.parallel.multihost import Terminated


class DeferredDecode:
    """Defer the encoding of frames on the host until the device is busy with the next section.

    At most one clip is pending; it is written on exit, also if the job is stopped.
    """

    def __init__(self) -> None:
        self._rest: Callable[[], None] | None = None

    def __enter__(self) -> "DeferredDecode":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            self.finish()
        # After an error in this process alone, it would wait here for the other processes.
        elif jax.process_count() == 1 or isinstance(error, Terminated):
            # The first error is reported; frames that are not written are decoded again.
            with contextlib.suppress(Exception):
                self.finish()

    def add(self, start: Callable[..., Callable[[], None]], *args: object) -> None:
        """Start a clip on the device, then write the frames of the previous clip."""
        rest = start(*args)
        self.finish()
        self._rest = rest

    def finish(self) -> None:
        """Write the frames of the pending clip."""
        rest, self._rest = self._rest, None
        if rest is not None:
            rest()


class Decoder:
    """Decodes the sections of one run of a batch, and adds final frames to its video."""

    def __init__(
        self,
        pipe: FramePack,
        run: RunDir,
        layout: Layout,
        source_video: SourceVideo | None,
        timeline: Timeline,
        sample: int,
    ) -> None:
        """Decode one `sample` of the timeline; it continues a fitted `source_video`, if any."""
        self.pipe, self.run, self.layout = pipe, run, layout
        self.timeline, self.sample = timeline, slice(sample, sample + 1)
        self.splicer: Splicer = pipe.splicer(layout.plan, layout.before, layout.kept)
        self.clips = [clip for section in layout.plan for clip in section.decode]
        counts = [len(section.decode) for section in layout.plan]
        # Clips of the first sections: of 0, 1, 2, ... of them.
        self.clips_of = [0, *itertools.accumulate(counts)]
        self.given = []
        if source_video is not None and not pipe.sampling.decode_alone:
            self.given = [len(self.clips)]
            self.splicer.add(len(self.clips), pipe.overlap(layout, source_video))

    def catch_up(self, done: int) -> None:
        """Decode the `done` sections of an earlier run that have no frames yet, and the sections
        whose ends are blended into them."""
        ready = min(self.run.spans(), self.clips_of[done])
        for number in self.splicer.waiting([*range(ready), *self.given]):
            if number < ready:
                clip, check = self._clip(number)
                check()
                self.splicer.add(number, clip)
        for number in range(ready, self.clips_of[done]):
            self._start(number)()
        # An earlier process may have stopped before it joined its last frames.
        self.run.join()

    def start(self, section: int) -> Callable[[], None]:
        """Start to decode the clips of a section; the returned function waits for the device and
        writes the frames that become final."""
        numbers = range(*self.clips_of[section : section + 2])
        started = [self._start(number) for number in numbers]

        def write() -> None:
            for each in started:
                each()

        return write

    def _start(self, number: int) -> Callable[[], None]:
        clip, check = self._clip(number)
        start, frames = self.splicer.add(number, clip)
        pixels = to_uint8(frames, self.layout.height, self.layout.width)

        def write() -> None:
            check()
            self.run.add_span(number, start, np.asarray(pixels)[0])

        return write

    def _clip(self, number: int) -> tuple[jax.Array, Callable[[], None]]:
        return self.pipe.start_clip(self.clips[number], self.timeline, self.sample)
