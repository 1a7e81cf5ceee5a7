"""Match the run folders of several methods: same start image, prompt and seed."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax.jobs.record import RECORD, read_record
from framepack_jax.utils import compare
from framepack_jax.utils.messages import shorten

GIVEN = ("prompt", "seed", "end_image_as", "prompt_blend")
FILES = ("image", "end_image", "extend")
# Flags that say nothing about how a method samples.
NOT_OF_METHOD = (
    *GIVEN, *FILES, "key_frame", "seconds", "sections", "height", "width", "fps", "crf", "gif",
    "bundle", "dtype", "mesh", "vae_tile",
)  # fmt: skip
SHAPE = ("height", "width", "fps")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        inputs: what the video was made from: prompt, seed, hashes of images by name.
        method: settings of the sampler, schedule, order and hashes of the weights by name.
        shape: height and width in pixels and frames per second.
        section: frames of a section.
    """

    folder: Path
    inputs: Mapping[str, Any]
    method: Mapping[str, Any]
    shape: Mapping[str, Any]
    frames: int
    section: float

    @property
    def video(self) -> Path:
        return self.folder / "video.mp4"

    @property
    def key(self) -> tuple[Any, ...]:
        """Inputs as one value, equal for runs that can be compared."""
        return tuple(self.inputs.values())


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two runs of different methods with equal inputs; methods are indices."""

    methods: tuple[int, int]
    runs: tuple[Run, Run]


def read_methods(folders: Sequence[Path]) -> list[list[Run]]:
    """Read the runs of each method: a run folder, or a folder of run folders.

    Raises ValueError if there are fewer than two methods, a folder is given twice, a run has no
    video, the runs of a method differ in their settings, or two of them have equal inputs.
    """
    if len(folders) < 2:
        given = f"only {folders[0]} is given" if folders else "none is given"
        raise ValueError(f"{given}: expected the runs of two or more methods, RUNS_A RUNS_B")
    places = [folder.resolve() for folder in folders]
    if twice := [f for f, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"{twice[0]} is given twice; give each method once")
    return [_runs_of(folder) for folder in folders]


def match(folders: Sequence[Path], methods: Sequence[Sequence[Run]]) -> list[Pair]:
    """Return all pairs of runs of different methods with equal inputs.

    Raises ValueError if a method has no run in common with another one, or if two runs of a pair
    differ in size, frame rate, or length by a section or more.
    """
    pairs = []
    for first, second in itertools.combinations(range(len(methods)), 2):
        others = {run.key: run for run in methods[second]}
        pairs += [
            Pair((first, second), (run, others[run.key]))
            for run in methods[first]
            if run.key in others
        ]
    for number, folder in enumerate(folders):
        if not any(number in pair.methods for pair in pairs):
            raise ValueError(
                f"{folder}: no run has the start image, prompt and seed of a run of another method"
                f" ({_unlike(number, methods)}); sample all methods with the same flags"
            )
    for pair in pairs:
        _check_shapes(*pair.runs)
    return pairs


def unmatched(methods: Sequence[Sequence[Run]], pairs: Sequence[Pair]) -> list[Run]:
    """Return the runs that are in no pair."""
    used = {run.folder for pair in pairs for run in pair.runs}
    return [run for runs in methods for run in runs if run.folder not in used]


def _runs_of(folder: Path) -> list[Run]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a run folder, or a folder of run folders")
    inside = [folder] if (folder / RECORD).exists() else sorted(folder.iterdir())
    runs = [_read(each) for each in inside if (each / RECORD).exists()]
    if not runs:
        raise ValueError(
            f"{folder} holds no run: neither it nor a folder in it has a {RECORD}; give the"
            " --output of framepack sample"
        )
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        if differing := compare.differences(runs[0].method, run.method, words=("there", "here")):
            raise ValueError(
                f"{run.folder} was sampled with other settings than {runs[0].folder}"
                f" ({shorten(differing)}); give each method a folder of its own"
            )
        if run.key in seen:
            raise ValueError(
                f"{seen[run.key].folder} and {run.folder} have the same start image, prompt and"
                " seed; remove one of them"
            )
        seen[run.key] = run
    return runs


def _read(folder: Path) -> Run:
    record = read_record(epath.Path(folder))
    if record["status"] == "sampled":
        raise ValueError(f"{folder} has no video yet; decode it: framepack decode {folder}")
    if record["status"] != "finished":
        raise ValueError(
            f"{folder} has no whole video yet, it is {record['status']}; finish it: framepack"
            f" resume {folder}"
        )
    if not (folder / "video.mp4").exists():
        raise ValueError(f"{folder} has no video.mp4; decode it: framepack decode {folder}")
    flags = record["flags"]
    weights = {f"{role} weights": w.get("sha256") for role, w in record["weights"].items()}
    settings = {name: value for name, value in flags.items() if name not in NOT_OF_METHOD}
    schedule = {name: record.get(name) for name in ("schedule", "order")}
    return Run(
        folder,
        _inputs(record),
        settings | schedule | weights,
        {name: flags["fps"] if name == "fps" else record[name] for name in SHAPE},
        record["frames"],
        (record["frames"] - max(1, record.get("beginning", 0))) / record["sections"],
    )


def _inputs(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a video was made from; files are named by their hashes."""
    flags, hashes = record["flags"], record.get("files_sha256", {})

    def hashed(file: str | None) -> str | None:
        return None if file is None else hashes.get(file) or file

    times = [text.partition("=") for text in flags.get("key_frame", ())]
    return (
        {name: hashed(flags.get(name)) for name in FILES}
        | {name: flags.get(name) for name in GIVEN}
        | {"key_frame": tuple((time, hashed(file)) for time, _, file in times)}
    )


def _unlike(number: int, methods: Sequence[Sequence[Run]]) -> str:
    """Describe the difference to the run of another method that has the most inputs in common."""
    run = methods[number][0]
    others = [other for i, runs in enumerate(methods) if i != number for other in runs]
    nearest = min(others, key=lambda o: len(compare.differing_fields(run.inputs, o.inputs)))
    found = [
        f"{name} of {run.folder} is {_brief(run.inputs[name])}, of {nearest.folder}"
        f" {_brief(nearest.inputs[name])}"
        for name in compare.differing_fields(run.inputs, nearest.inputs)
    ]
    return shorten(found)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_shapes(first: Run, second: Run) -> None:
    pair = f"{first.folder} and {second.folder} have the same start image, prompt and seed, but"
    if differing := [name for name in SHAPE if first.shape[name] != second.shape[name]]:
        found = [f"{name} {first.shape[name]} and {second.shape[name]}" for name in differing]
        raise ValueError(f"{pair} {', '.join(found)}; sample both at the same size and rate")
    if abs(first.frames - second.frames) >= max(first.section, second.section):
        raise ValueError(
            f"{pair} {first.frames} and {second.frames} frames; sample both with the same --seconds"
        )
