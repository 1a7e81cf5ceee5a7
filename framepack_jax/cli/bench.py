"""`framepack bench`: measure a bundle on this machine, and print one Markdown row."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from framepack_jax.cli.common import parse_size
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import IN_STORES

if TYPE_CHECKING:
    from framepack_jax.bench.report import Outcome
    from framepack_jax.bench.workload import Workload

Part = Literal["step", "section", "decode", "train"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure a denoising step, a section, decoding and a training step of a bundle on all local
    devices. Times are medians of rounds after a warm-up. The training step always has random
    weights. A part that does not fit in memory says so, and the others are measured."""

    bundle: Annotated[str, IN_STORES] = "tiny"
    """Bundle to measure. Bundles that come as sizes alone, as framepack_i2v and helios_14b, get
    random weights."""
    parts: tuple[Part, ...] = ("step", "section", "decode", "train")
    """What is measured, in this order."""
    size: str | None = None
    """HEIGHTxWIDTH in pixels; default: the size of a video from text."""
    steps: int | None = None
    """Denoising steps of a section, of each stage; default: those of the bundle."""
    random_weights: bool = False
    """Use random weights in the shapes of the bundle, and read none."""
    trainable: Literal["lora", "context", "all"] = "lora"
    """What the training step trains."""
    mesh: str | None = None
    """Mesh axes and their sizes over all local devices: fsdp=4,context=2. Each device along data
    adds a video. Default: one video over all devices, and the mesh of framepack train."""
    json: Path | None = None
    """File that gets all figures; it has those of the finished parts at any time."""


def main(args: list[str] | None = None, prog: str = "framepack bench") -> None:
    """Parse flags, measure, print; exit with code 1 if no part could be measured."""
    flags = parse(Bench, args, prog)
    from framepack_jax.cli.session import sampling_errors

    with sampling_errors():
        size = None if flags.size is None else parse_size("--size", flags.size)
        if flags.json is not None and not flags.json.absolute().parent.is_dir():
            folder = flags.json.parent
            raise ValueError(f"--json {flags.json}: there is no folder {folder}; make it")
        run(flags, size)


def run(flags: Bench, size: tuple[int, int] | None) -> None:
    """Measure and print; the row is printed also after an interrupt. Raises ValueError."""
    with _cold_jax():
        _measure(flags, size)


def _measure(flags: Bench, size: tuple[int, int] | None) -> None:
    from framepack_jax.bench import compare, report
    from framepack_jax.bench.run import measure
    from framepack_jax.bench.workload import open_workload

    work = open_workload(flags.bundle, size, flags.mesh, flags.random_weights, flags.steps)
    outcomes: dict[str, report.Outcome] = {}
    try:
        for part, outcome in measure(work, flags.parts, flags.trainable, flags.mesh):
            outcomes[part] = outcome
            print(report.part_line(part, outcome), flush=True)
            _save(flags.json, work, outcomes)
    finally:
        print(f"\n{report.table(work, outcomes)}\n\n{compare.comparison(work)}", flush=True)
    if all(isinstance(outcome, str) for outcome in outcomes.values()):
        raise ValueError("nothing could be measured; the lines above say why")


@contextlib.contextmanager
def _cold_jax() -> Iterator[None]:
    """Compute without the cache of compiled programs, so that compilation is timed."""
    import jax

    from framepack_jax.cli.common import configure_jax

    configure_jax()
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _save(file: Path | None, work: "Workload", outcomes: "dict[str, Outcome]") -> None:
    from framepack_jax.bench.report import as_json
    from framepack_jax.utils.files import atomic_write_text

    if file is not None:
        atomic_write_text(file, json.dumps(as_json(work, outcomes), indent=1) + "\n")
