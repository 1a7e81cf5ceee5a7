"""`framepack doctor`: say what is wrong with this machine, and what to do about it."""

import dataclasses
import functools
import json
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import tyro

from framepack_jax.cli.common import FAILED, cli_errors, configure_jax
from framepack_jax.doctor.finding import Finding
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import IN_STORES

REPORT = "report it with the output of framepack doctor --json"
Part = Literal["packages", "machine", "codecs", "bundle", "kernels", "video"]


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Look at Python, packages, devices, memory, folders, codecs and a bundle, run the attention
    kernels and make a small video. Prints a line each, with a remedy; the exit code is 1 if there
    is a problem."""

    bundle: Annotated[str, IN_STORES] = "tiny"
    """Bundle to read whole, and to make a small video with if it is a small one."""
    skip: tyro.conf.UseAppendAction[tuple[Part, ...]] = ()
    """What to leave out, once or several times."""
    json: bool = False
    """Print a JSON list of objects with subject, status, text and remedy instead."""


def main(args: list[str] | None = None, prog: str = "framepack doctor") -> None:
    """Parse flags and look; problems end with exit code 1."""
    flags = parse(Doctor, args, prog)
    found = []
    with cli_errors():
        for finding in examine(flags):
            found.append(finding)
            if not flags.json:
                print(finding, flush=True)
        if flags.json:
            print(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
    if any(each.status == "problem" for each in found):
        raise SystemExit(FAILED)


def examine(flags: Doctor) -> Iterator[Finding]:
    """Yield what all checks find. Devices come first: without them no program runs."""
    from framepack_jax.doctor import machine, media, packages

    yield from guarded("Python", packages.python)
    if "packages" not in flags.skip:
        yield from guarded("packages", packages.packages)
    usable = True
    if "machine" not in flags.skip:
        for finding in guarded("devices", machine.devices):
            usable &= (finding.subject, finding.status) != ("devices", "problem")
            yield finding
        yield from guarded("memory", machine.memory)
        yield from guarded("folders", machine.folders)
    if "codecs" not in flags.skip:
        yield from guarded("video", media.codecs)
    yield from programs(flags, usable)


def programs(flags: Doctor, usable: bool) -> Iterator[Finding]:
    """Yield what the checks find that import JAX; skip them if it has no devices."""
    wanted = [part for part in ("bundle", "kernels", "video") if part not in flags.skip]
    if not usable:
        yield from (Finding(part, "skipped", "JAX has no device to run on") for part in wanted)
        return
    configure_jax()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "bundle": functools.partial(_bundle, flags.bundle),
        "kernels": _kernels,
        "video": functools.partial(_video, flags.bundle),
    }
    for part in wanted:
        yield from guarded(part, checks[part])


def _bundle(name: str) -> Iterator[Finding]:
    from framepack_jax.doctor import bundles

    yield from bundles.whole(name)


def _kernels() -> Iterator[Finding]:
    from framepack_jax.doctor import programs

    yield from programs.kernels()


def _video(name: str) -> Iterator[Finding]:
    from framepack_jax.doctor import bundles, programs

    if bundles.is_large(name):
        name = "random"
    yield from programs.small_video(name)


def guarded(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; an error of the check itself is a problem too."""
    try:
        yield from check()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"
        yield Finding(subject, "problem", text, REPORT)
