"""`framepack evaluate`: how far videos drift, what they forget, and whether captions lead them."""

import dataclasses
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from framepack_jax import bundle
from framepack_jax.cli import enable_compilation_cache
from framepack_jax.evaluation import video_file
from framepack_jax.generation.pipeline import DEFAULT_SETTINGS, FramePack, NotFinite, Settings
from framepack_jax.jobs.provenance import weights
from framepack_jax.parallel import hardware
from framepack_jax.toy import baselines, report, results, scenes, suites
from framepack_jax.toy.suites import Part, Row
from framepack_jax.utils.flags import parse
from framepack_jax.utils.progress import Bar

FPS = scenes.FPS
MOST_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure bundles on held-out scenes of the demo world, or one video file.

    For bundles: long videos (drift), sprites that were hidden (forgetting) and pairs of captions
    for one image (prompts), each beside four references: the truth, its VAE reconstruction, the
    frozen first frame, and repeated short image-to-video. The output folder holds report.md,
    report.json, plots/, sheets/ and videos/. The same command goes on where it was stopped.
    """

    bundle: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A bundle under test; tiny is the one in this package. May be given several times: the first
    lends its VAE to the references, and makes the repeated short videos."""
    schedule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A packing schedule to sample each bundle with, instead of its own. May be given several
    times."""
    video: Path | None = None
    """Measure this video file alone; of the other flags, --output, --clip and --caption count."""
    clip: Path | None = None
    """With --video: a folder with a pretrained CLIP model (openai/clip-vit-large-patch14 or another
    that transformers reads), which says how like its first frame and its caption a video stays.
    Needs PyTorch."""
    caption: str = ""
    """With --clip: what happens in the video."""
    output: Path | None = None
    """Folder of the results; of --video alone it may be left out."""
    videos: int = 8
    """Held-out starts of long videos; 0 leaves this part out."""
    seconds: tuple[float, ...] = (10.0,)
    """Lengths of long videos."""
    hiding_videos: int = 8
    """Videos for each time that a sprite is hidden; 0 leaves this part out."""
    hidden: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Seconds for which it is hidden."""
    pairs: int = 8
    """Images that get two captions each; 0 leaves this part out."""
    pair_seconds: float = 2.4
    """Lengths of their videos."""
    size: str = "128x128"
    """Height and width in pixels, multiples of 16."""
    steps: int = DEFAULT_SETTINGS.steps
    """Denoising steps a section."""
    sampler: Literal["unipc", "unipc-bh2", "euler"] = DEFAULT_SETTINGS.sampler
    """Solver."""
    guidance: float = DEFAULT_SETTINGS.guidance
    """Scale for guidance-distilled networks."""
    cfg: float = DEFAULT_SETTINGS.cfg
    """Classifier-free guidance, for twice the time; 1 is off."""
    seed: int = 0
    """Of scenes and noise."""
    batch: int = 4
    """Videos that are computed side by side."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and computation; default: bfloat16 on GPU and TPU, float32 on a CPU."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A bundle with a schedule, under the name that tables have."""

    name: str
    path: str | Path
    pipe: FramePack


def main(args: list[str] | None = None, prog: str = "framepack evaluate") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = parse(Evaluate, args, prog)
    began = time.monotonic()
    try:
        if flags.video is not None:
            print(_evaluate_file(flags))
        else:
            print(f"{evaluate(flags)}: {time.monotonic() - began:.1f} s in all")
    except (ValueError, OSError, NotFinite) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None


def _evaluate_file(flags: Evaluate) -> str:
    """Measure a video file. Raises ValueError, OSError."""
    if flags.bundle:
        raise ValueError("--video measures a file alone; leave out --bundle")
    if flags.caption and flags.clip is None:
        raise ValueError("--caption is compared by a pretrained model: give --clip FOLDER")
    return video_file.evaluate(flags.video, flags.output, flags.clip, flags.caption)


def evaluate(flags: Evaluate) -> Path:
    """Sample, measure and report; returns the report. Raises ValueError, OSError."""
    settings = Settings(
        steps=flags.steps, sampler=flags.sampler, guidance=flags.guidance, cfg=flags.cfg
    )
    size = _check(flags)
    enable_compilation_cache()
    hardware.quiet_libtpu()
    models = open_models(flags)
    for model in models:
        if any(side % model.pipe.geometry.unit for side in size):
            raise ValueError(
                f"--size {flags.size}: expected multiples of {model.pipe.geometry.unit}, which"
                f" {model.name} divides pictures by"
            )
    results.begin(flags.output, _settings(flags, size, models))
    todo = list(_parts(flags, size, models))
    make_all(flags, todo, models, settings)
    made = [
        (part, {row.name: _figures(flags.output, row, part) for row in part.rows}) for part in todo
    ]
    about = json.loads((flags.output / results.SETTINGS).read_text())
    tables = report.write(flags.output, made, [model.name for model in models], about)
    return flags.output / "report.md" if tables else flags.output


def _figures(folder: Path, row: Row, part: Part) -> dict[str, scenes.Figures]:
    return {case.name: results.load(folder, row.name, case) for case in part.cases}


def _check(flags: Evaluate) -> tuple[int, int]:
    """The size (height, width). Raises ValueError for flags that cannot be."""
    if flags.clip is not None or flags.caption:
        raise ValueError("--clip and --caption go with --video; scenes here have a known truth")
    if not flags.bundle:
        raise ValueError("give --bundle, one or more, or --video FILE")
    if flags.output is None:
        raise ValueError("give --output, a folder for the results")
    match = re.fullmatch(r"(\d+)x(\d+)", flags.size)
    if not match or not all(16 <= int(side) <= 4096 for side in match.groups()):
        raise ValueError(f"--size {flags.size}: expected HEIGHTxWIDTH in pixels, as 128x128")
    for name in ("videos", "hiding_videos", "pairs"):
        if getattr(flags, name) < 0:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(flags, name)}: expected 0 or more"
            )
    if not flags.videos + flags.hiding_videos + flags.pairs:
        raise ValueError("--videos 0 --hiding-videos 0 --pairs 0: there is nothing to do")
    if flags.batch < 1:
        raise ValueError(f"--batch {flags.batch}: expected 1 or more")
    lengths = {
        "seconds": flags.seconds,
        "hidden": flags.hidden,
        "pair-seconds": (flags.pair_seconds,),
    }
    for name, values in lengths.items():
        for value in values:
            if not 0 < value <= MOST_SECONDS:
                raise ValueError(f"--{name} {value}: expected above 0, at most {MOST_SECONDS:g} s")
        if len(set(values)) < len(values):
            raise ValueError(f"--{name}: a number is there twice")
    if not 0 <= flags.seed < 2**31:
        raise ValueError(f"--seed {flags.seed}: expected 0 to {2**31 - 1}")
    return int(match[1]), int(match[2])


def open_models(flags: Evaluate) -> list[Model]:
    """Every bundle with every schedule, without weights. Raises BundleError, ValueError."""
    models = []
    for name, schedule in itertools.product(flags.bundle, flags.schedule or (None,)):
        path = bundle.resolve(name)
        bundle.check_present(path, bundle.ROLES)
        pipe = FramePack.open(path, dtype=flags.dtype, schedule=schedule)
        short = Path(str(name)).name
        models.append(Model(f"{short} {schedule}" if flags.schedule else short, path, pipe))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"--bundle: two are called {twice}; their folders need different names, which tables"
            " have"
        )
    if taken := set(names) & set(suites.REFERENCES):
        raise ValueError(
            f"--bundle {taken.pop()}: a reference row has that name; rename the folder"
        )
    return models


def _settings(flags: Evaluate, size: tuple[int, int], models: Sequence[Model]) -> dict[str, Any]:
    """All that decides what is made, so that an evaluation only goes on with its own."""
    first = models[0]
    return {
        "size": flags.size,
        "steps": flags.steps,
        "sampler": flags.sampler,
        "guidance": flags.guidance,
        "cfg": flags.cfg,
        "seed": flags.seed,
        "dtype": first.pipe.dtype,
        "world": scenes.fingerprint(flags.seed, size),
        "references": {"bundle": first.name, "weights": _hashes(first)},
        "rows": {
            model.name: {
                "schedule": model.pipe.schedule,
                "order": model.pipe.order,
                "weights": _hashes(model),
            }
            for model in models
        },
    }


def _hashes(model: Model) -> dict[str, Any]:
    return {role: source.get("sha256") for role, source in weights(model.path).items()}


def _parts(flags: Evaluate, size: tuple[int, int], models: Sequence[Model]) -> Iterator[Part]:
    """The parts that are asked for, their cases and rows."""
    pipe = models[0].pipe

    def frames(seconds: float) -> int:
        return baselines.frames_for(pipe, baselines.sections_for(pipe, seconds, FPS))

    def under_test(rows_of: Callable[[str, int, str], list[Row]]) -> list[Row]:
        each = [rows_of(m.name, i, m.pipe.schedule) for i, m in enumerate(models)]
        return [*suites.references(), *itertools.chain(*each)]

    if flags.videos:
        found: list[Part] = []
        for seconds in sorted(flags.seconds):
            part, count = f"drift_{seconds:g}s", frames(seconds)
            made = scenes.drift_cases(flags.seed, flags.videos, count, size, part)
            found.append(
                Part(part, made, under_test(suites.drift_rows), scenes.drift_figures, tuple(found))
            )
        yield from found
    if flags.hiding_videos:
        for hidden in flags.hidden:
            part = f"forgetting_{hidden:g}s"
            made = scenes.hiding_cases(flags.seed, flags.hiding_videos, hidden, size, part)
            whole = baselines.frames_for(pipe, suites.sections_of(pipe, made[0].frames))
            made = [dataclasses.replace(case, frames=whole) for case in made]
            yield Part(part, made, under_test(suites.forgetting_rows), scenes.forgetting_figures)
    if flags.pairs:
        part, count = f"prompts_{flags.pair_seconds:g}s", frames(flags.pair_seconds)
        made = scenes.counterfactual_cases(flags.seed, flags.pairs, count, size, part)
        yield Part(part, made, under_test(suites.prompt_rows), scenes.prompt_figures)


def make_all(
    flags: Evaluate, todo: Sequence[Part], models: Sequence[Model], settings: Settings
) -> None:
    """Make and measure every video that is not there yet, behind a bar. Weights of one model are on
    the device at a time. The longest come first, as their videos serve for shorter ones too."""
    total = sum(len(part.cases) * len(part.rows) for part in todo)
    with Bar(total=total, unit="video") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for number in (None, *range(len(models))):
            pipe = None
            order = sorted(todo, key=lambda part: -len(part.shorter))
            for part, row in ((p, r) for p in order for r in p.rows if r.model == number):
                bar.set_description(f"{part.name}, {row.name}")
                missing = [c for c in part.cases if results.load(flags.output, row.name, c) is None]
                bar.update(len(part.cases) - len(missing))
                if missing and number is not None and pipe is None:
                    pipe = models[number].pipe.with_weights(models[number].path)
                for first in range(0, len(missing), flags.batch):
                    batch = missing[first : first + flags.batch]
                    made = row.make(pipe, batch, settings)
                    numbers = [part.cases.index(case) for case in batch]
                    for each in (part, *(part.shorter if row.onward else ())):
                        _keep(flags.output, row, each, [each.cases[i] for i in numbers], made, pool)
                    bar.update(len(batch))


def _keep(
    folder: Path, row: Row, part: Part, asked: Sequence[scenes.Case], made: Sequence[np.ndarray],
    pool: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """Measure and save the videos of cases, cut to their length, but for those that are there."""
    new = [
        (case, frames[: case.frames])
        for case, frames in zip(asked, made, strict=True)
        if results.load(folder, row.name, case) is None
    ]
    for (case, frames), found in zip(new, pool.map(lambda p: part.measure(*p), new), strict=True):
        results.save(folder, row.name, case, frames, found, FPS)
