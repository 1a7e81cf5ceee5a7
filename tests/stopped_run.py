"""Run `sample.py` in a process of its own that a signal hits at a chosen point.

Processes are forked from a server that has imported everything and has started no device, and share
compiled programs and weights by way of a folder: a run then costs its own work only.
"""

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from framepack_jax import bundle, video
from framepack_jax.cli import sample

COMPILED = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_numpy_rank_promotion": "raise",
}


class Stop(NamedTuple):
    """`signal` comes at call `nth`, from 1, of the function `at`, or where a file that matches the
    pattern `at` is about to appear: half of it is in its .part; with `after`, when that is done."""

    signal: signal.Signals
    at: str
    nth: int = 1
    after: bool = False


class Ended(NamedTuple):
    """Exit code (negative: the signal that ended it) and what was printed."""

    code: int
    stdout: str
    stderr: str


def run(shared: Path, stop: Stop | None, *flags: object, seconds: float = 300) -> Ended:
    """`sample.py` with these flags, ended by `stop`; `shared` is the folder of what processes
    share."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([sample.__name__])
    flags = [str(flag) for flag in flags]
    log = shared / f"run_{len(list(shared.glob('*.out'))):03d}"
    process = context.Process(target=_main, args=(shared, log, stop, flags))
    process.start()
    process.join(seconds)
    assert process.exitcode is not None, f"{flags} still runs after {seconds} s"
    texts = [log.with_suffix(suffix).read_text() for suffix in (".out", ".err")]
    return Ended(process.exitcode, *texts)


def _main(shared: Path, log: Path, stop: Stop | None, flags: list[str]) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_CREAT | os.O_WRONLY), number)
    # A process in the background has it ignored, and hands that down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in (COMPILED | {"jax_compilation_cache_dir": str(shared)}).items():
        jax.config.update(name, value)
    _share_weights(shared)
    _keep_frames()
    if stop is not None:
        _arm(stop)
    sample.main(flags)


def _share_weights(folder: Path) -> None:
    """Read the weights of the one bundle once; checking its files is most of the time of a run."""
    load = bundle.load_params

    def load_params(root: Path, manifest: bundle.Manifest, name: str, **options: Any) -> Any:
        file = folder / f"{name}.pickle"
        if not file.exists():
            params = jax.device_get(load(root, manifest, name, **options))
            file.write_bytes(pickle.dumps(params))
        return jax.device_put(pickle.loads(file.read_bytes()))

    bundle.load_params = load_params


def _keep_frames() -> None:
    """Beside every mp4 an .npy of the frames that it was made from: encoding loses some, and not
    the same each time."""
    write = video.write_mp4

    def write_mp4(path: Path, frames: Iterable[np.ndarray], **options: Any) -> None:
        frames = np.stack(list(frames))
        write(path, frames, **options)
        np.save(path.with_suffix(".npy"), frames)

    video.write_mp4 = write_mp4


def _arm(stop: Stop) -> None:
    """Make this process send itself the signal at `stop`."""
    module, _, name = stop.at.rpartition(".")
    of_file = not module.startswith("framepack_jax")
    holder, name = (os, "replace") if of_file else (_holder(module), name)
    real, calls = getattr(holder, name), 0

    def patched(*args: Any, **options: Any) -> Any:
        nonlocal calls
        counts = not of_file or fnmatch(Path(args[1]).name, stop.at)
        calls += counts
        hit = counts and calls == stop.nth
        if hit and not stop.after:
            if of_file:
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            os.kill(os.getpid(), stop.signal)
        result = real(*args, **options)
        if hit and stop.after:
            os.kill(os.getpid(), stop.signal)
        return result

    setattr(holder, name, patched)


def _holder(name: str) -> Any:
    """A module, or a class in one."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)
