"""`framepack evaluate`: measure drift, forgetting and prompt adherence."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from framepack_jax.cli.common import FAILURES, RESUME, cli_errors, configure_jax, parse_size
from framepack_jax.utils import extras
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import IN_STORES

if TYPE_CHECKING:
    from framepack_jax.generation.pipeline import Settings
    from framepack_jax.toy.evaluation import EvaluationConfig
    from framepack_jax.toy.rows import RowSpec

MAX_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Suites:
    """Videos of an evaluation on the toy world, and how they are sampled."""

    videos: int = 8
    """Number of long videos, each from a held-out first frame; 0 skips the drift suites."""
    seconds: tuple[float, ...] = (10.0,)
    """Lengths of the long videos in seconds."""
    occlusion_videos: int = 8
    """Number of videos for each of --occlusion-seconds; 0 skips the forgetting suites."""
    occlusion_seconds: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Times for which a sprite is hidden, in seconds."""
    prompt_pairs: int = 8
    """Number of images that get two captions each; 0 skips the prompts suite."""
    pair_seconds: float = 2.4
    """Length of the videos of the prompts suite in seconds."""
    size: str = "128x128"
    """HEIGHTxWIDTH in pixels, multiples of 16."""
    steps: int = 25
    """Denoising steps of a section."""
    sampler: Literal["unipc", "unipc-bh2", "euler"] = "unipc"
    """Solver."""
    distilled_guidance: float = 10.0
    """Guidance scale given to the guidance-distilled network."""
    cfg_scale: float = 1.0
    """Scale of classifier-free guidance, which doubles the time; 1 is off."""
    seed: int = 0
    """Seed of the scenes and the noise."""
    batch: int = 4
    """Videos to sample side by side."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and computation; default: bfloat16 on GPU and TPU, float32 on CPU."""


@dataclasses.dataclass(frozen=True)
class Evaluate(Suites):
    """Measure bundles on held-out scenes of the toy world, or one video file.

    Bundles get three suites: long videos (drift), sprites that were hidden for a while
    (forgetting), and pairs of captions for one image (prompts). Each table has four reference rows:
    the ground truth, its VAE reconstruction, the frozen first frame, and chained short
    image-to-video clips. The output folder holds report.md, report.json, plots/, sheets/ and
    videos/. Run the same command again to resume an interrupted evaluation. Needs the extra [eval].
    """

    bundle: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], IN_STORES] = ()
    """Bundle to evaluate; tiny is part of this package. Give it several times for several bundles.
    The references use the VAE of the first bundle, and its model for the chained short clips."""
    schedule: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Packing schedule to sample each bundle with, instead of its own. Give it several times for
    several schedules."""
    rows: Path | None = None
    """File of rows, for any list of bundles, schedules, orders and methods: JSON objects, one a
    line, with the keys bundle, schedule, name, repeated (true: chain single sections without
    history), and the settings of the sampler (steps, cfg_scale, ...), which replace the flags of
    the command."""
    video: Path | None = None
    """Video file to measure instead of bundles; used with --output, --clip, --vbench and --caption
    only."""
    clip: Path | None = None
    """With --video: folder of a pretrained CLIP model (openai/clip-vit-large-patch14 or another
    that transformers reads), which scores each frame against the first frame and the caption. Needs
    PyTorch, the extra [torch]."""
    vbench: Path | None = None
    """With --video: Python of an environment with VBench (pip install vbench), for example
    ~/vbench/bin/python. VBench measures the whole video, its first 15 % and its last 15 %."""
    vbench_dimensions: tuple[str, ...] = ()
    """With --vbench: dimensions of VBench, for example motion_smoothness imaging_quality; default:
    all that it measures of any video."""
    caption: str = ""
    """With --clip or --vbench: caption of the video."""
    output: Path | None = None
    """Folder of the results; optional with --video."""


def main(args: list[str] | None = None, prog: str = "framepack evaluate") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = parse(Evaluate, args, prog)
    began = time.monotonic()
    with cli_errors((*FAILURES, FloatingPointError), interrupted=RESUME):
        extras.require("eval", extras.EVAL, prog)
        if flags.video is not None:
            print(_evaluate_file(flags, flags.video))
        else:
            print(f"{_evaluate(flags)}: {time.monotonic() - began:.1f} s in all")


def _evaluate_file(flags: Evaluate, video: Path) -> str:
    """Measure a video file. Raises ValueError, OSError."""
    if flags.bundle or flags.rows:
        raise ValueError("--video and --bundle or --rows exclude each other; give one of them")
    if flags.caption and flags.clip is None and flags.vbench is None:
        raise ValueError(
            "--caption is compared by a pretrained model: give --clip FOLDER or --vbench PYTHON"
        )
    if flags.vbench_dimensions and flags.vbench is None:
        raise ValueError("--vbench-dimensions needs --vbench PYTHON")
    from framepack_jax.evaluation import video_file

    networks = video_file.Pretrained(
        flags.clip, flags.vbench, flags.vbench_dimensions, flags.caption
    )
    return video_file.evaluate(video, flags.output, networks)


def _evaluate(flags: Evaluate) -> Path:
    """Evaluate bundles; return the path of the report. Raises ValueError, OSError."""
    if flags.clip or flags.vbench or flags.vbench_dimensions or flags.caption:
        raise ValueError(
            "--clip, --vbench, --vbench-dimensions and --caption need --video; toy scenes have a"
            " known ground truth"
        )
    if not flags.bundle and flags.rows is None:
        raise ValueError("give --bundle, one or more, or --rows FILE, or --video FILE")
    if flags.output is None:
        raise ValueError("give --output, a folder for the results")
    size = check_suites(flags)
    from framepack_jax.toy import evaluation, rows

    settings = settings_of(flags)
    if flags.rows is None:
        specs = rows.of_flags(flags.bundle, flags.schedule, settings)
    else:
        specs = rows.read(flags.rows, flags.bundle, flags.schedule, settings)
    cfg = config_of(flags, size, flags.output, specs)
    configure_jax()
    return evaluation.evaluate(cfg)


def check_suites(flags: Suites) -> tuple[int, int]:
    """Return the size (height, width). Raises ValueError if a flag is out of range."""
    _check_counts(flags)
    _check_lengths(flags)
    if not 0 <= flags.seed < 2**31:
        raise ValueError(f"--seed {flags.seed}: expected 0 to {2**31 - 1}")
    size = parse_size("--size", flags.size)
    if not all(16 <= side <= 4096 for side in size):
        raise ValueError(f"--size {flags.size}: expected sides of 16 to 4096 pixels, as 128x128")
    return size


def _check_counts(flags: Suites) -> None:
    counts = {
        "videos": flags.videos,
        "occlusion-videos": flags.occlusion_videos,
        "prompt-pairs": flags.prompt_pairs,
    }
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"--{name} {count}: expected 0 or more")
    if not any(counts.values()):
        raise ValueError(f"{' '.join(f'--{name} 0' for name in counts)}: there is nothing to do")
    if flags.batch < 1:
        raise ValueError(f"--batch {flags.batch}: expected 1 or more")


def _check_lengths(flags: Suites) -> None:
    lengths = {
        "seconds": flags.seconds,
        "occlusion-seconds": flags.occlusion_seconds,
        "pair-seconds": (flags.pair_seconds,),
    }
    for name, values in lengths.items():
        for value in values:
            if not 0 < value <= MAX_SECONDS:
                raise ValueError(f"--{name} {value}: expected above 0, at most {MAX_SECONDS:g} s")
        if len(set(values)) < len(values):
            raise ValueError(f"--{name}: a number is given twice")


def settings_of(flags: Suites) -> "Settings":
    """Return the settings of the sampler. Raises ValueError if one is out of range."""
    from framepack_jax.generation.pipeline import Settings

    return Settings(
        steps=flags.steps, sampler=flags.sampler, distilled_guidance=flags.distilled_guidance,
        cfg_scale=flags.cfg_scale,
    )  # fmt: skip


def config_of(
    flags: Suites, size: tuple[int, int], output: Path, rows: "tuple[RowSpec, ...]"
) -> "EvaluationConfig":
    """Return the settings of an evaluation of rows in pixels of `size`."""
    from framepack_jax.toy.evaluation import EvaluationConfig

    return EvaluationConfig(
        output=output, rows=rows, videos=flags.videos, seconds=flags.seconds,
        occlusion_videos=flags.occlusion_videos, occlusion_seconds=flags.occlusion_seconds,
        prompt_pairs=flags.prompt_pairs, pair_seconds=flags.pair_seconds,
        size=size, settings=settings_of(flags), seed=flags.seed, batch=flags.batch,
        dtype=flags.dtype,
    )  # fmt: skip
