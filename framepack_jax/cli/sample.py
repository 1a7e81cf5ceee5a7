"""`framepack sample`: sample videos from images and prompts, each in a run folder."""

import contextlib
import dataclasses
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from etils import epath
from tyro.conf import OmitArgPrefixes

from framepack_jax.cli.common import ALONE, MultihostFlags, configure_jax_for_dry_run
from framepack_jax.jobs import spec
from framepack_jax.jobs.spec import ComputeOptions, JobOptions, ModelOptions
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import FILES_IN_STORES

if TYPE_CHECKING:
    from framepack_jax.jobs.sampling import Video


@dataclasses.dataclass(frozen=True)
class DryRun:
    """Compile a step for another machine instead of sampling."""

    machine: Annotated[str | None, tyro.conf.arg(name="dry-run")] = None
    """Machine: v5e:4x4, v5p-64, h100:8, rtx4090:1. Compile a step for it and report whether it
    fits; exit code 0 if it fits, else 1. All weights are on the chips unless --offload full is
    given. The bundles framepack_i2v and framepack_f1 are the released models without weights, for
    this purpose."""
    decode: Annotated[bool, tyro.conf.arg(name="dry-run-decode")] = False
    """Compile the VAE's decoder too: seconds for a GPU, minutes for a TPU."""


# Flags that a dry run would ignore, by the groups that hold them.
NOT_COMPILED = {
    "input": ("end_image", "end_image_as", "key_frame", "extend"),
    "model": ("lora", "merge_lora"),
    "job": ("overwrite", "latents_only"),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sample videos from images and prompts.

    The output folder holds video.mp4, preview.png (the section that is being sampled; at the end a
    contact sheet), latents/ (one file per section, written before the section is decoded),
    segments/, inputs/ and run.json (all that is needed to sample the video again). To continue an
    interrupted run: framepack resume FOLDER.
    """

    prompt: tuple[str, ...] = ("",)
    """Description of the video. May be empty, and change with time: "0s: she waves 4s: she bows".
    Several prompts give several videos."""
    seed: tuple[int, ...] = (0,)
    """Seed of the noise, up to 64 bits. The same seed and flags give the same video; -1 draws a
    random seed. Several seeds give several videos of every prompt."""
    output: Annotated[epath.Path | None, FILES_IN_STORES] = None
    """Folder of the results, with a folder for each of several videos; default: a new folder under
    outputs/."""
    jobs: Path | None = None
    """File with one video per line: JSON objects of flags without dashes, {"prompt": "...", "seed":
    3, "name": "waves"}, which replace the flags of the command. Finished videos are skipped,
    unfinished ones are resumed. Several processes may share the file: each video is sampled by one
    of them."""
    job: OmitArgPrefixes[JobOptions] = field(default_factory=JobOptions)
    input: OmitArgPrefixes[spec.Inputs] = field(default_factory=spec.Inputs)
    size: OmitArgPrefixes[spec.VideoSize] = field(default_factory=spec.VideoSize)
    denoising: OmitArgPrefixes[spec.Denoising] = field(default_factory=spec.Denoising)
    encoding: OmitArgPrefixes[spec.Encoding] = field(default_factory=spec.Encoding)
    model: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    compute: OmitArgPrefixes[ComputeOptions] = field(default_factory=ComputeOptions)
    dry_run: OmitArgPrefixes[DryRun] = field(default_factory=DryRun)
    multihost: OmitArgPrefixes[MultihostFlags] = ALONE
    """Run the same command on several hosts: the devices of all compute the videos, process 0
    writes them. Every host needs the weights, images and jobs."""

    def base(self) -> dict[str, Any]:
        """Return the fields of a spec that all videos share."""
        groups = (self.input, self.size, self.denoising, self.encoding)
        return {name: value for group in groups for name, value in vars(group).items()}


def main(args: list[str] | None = None, prog: str = "sample.py") -> None:
    """Parse flags and sample; user errors end with one line and exit code 1."""
    flags = parse(Sample, args, prog)
    # JAX is imported after the flags are parsed, so that --help is quick.
    from framepack_jax.cli.session import sampling_errors, session

    if flags.dry_run.machine is not None:
        with sampling_errors():
            return _dry_run(flags, flags.dry_run.machine)
    with session(flags, flags.compute, flags.multihost):
        run(flags)


def run(flags: Sample) -> None:
    """Sample the videos of some flags. Raises ValueError, OSError by name."""
    from framepack_jax.jobs import sampling
    from framepack_jax.jobs.output_folder import new_output_folder

    if flags.job.batch < 1:
        raise ValueError(f"batch = {flags.job.batch}: expected at least 1")
    source = flags.jobs or flags.input.image or flags.input.extend
    given = None if flags.output is None else contextlib.nullcontext(flags.output)
    with given or new_output_folder(source) as output:
        videos = _videos(flags, epath.Path(output))
        alone = flags.jobs is None and len(videos) == 1
        sampling.sample(videos, flags.model, flags.compute, flags.job, alone=alone)


def _videos(flags: Sample, output: epath.Path) -> "list[Video]":
    """Return the run folder and the options of every video, or the error of its line."""
    from framepack_jax.jobs.jobs_file import read_jobs
    from framepack_jax.jobs.sampling import videos_of
    from framepack_jax.parallel.multihost import on_all_hosts

    if flags.jobs is None:
        return videos_of(flags.prompt, flags.seed, flags.base(), output)
    if len(flags.prompt) > 1 or len(flags.seed) > 1:
        raise ValueError("--jobs with several prompts or seeds: put them into the file")
    base = flags.base() | {"prompt": flags.prompt[0], "seed": flags.seed[0]}
    return on_all_hosts(list, read_jobs(flags.jobs, base, output))


def _dry_run(flags: Sample, machine_name: str) -> None:
    """Compile for another machine; exit with code 1 if the run does not fit."""
    _refuse_ignored(flags)
    configure_jax_for_dry_run()
    from framepack_jax import bundle, video
    from framepack_jax.generation.layout import make_layout
    from framepack_jax.generation.offload_plan import TILES
    from framepack_jax.generation.request import Request
    from framepack_jax.jobs.loading import check_kernel, open_pipe
    from framepack_jax.ops import attention
    from framepack_jax.parallel import hardware, sharding
    from framepack_jax.planning.sampling import dry_run

    model, compute, size = flags.model, flags.compute, flags.size
    machine = hardware.parse(machine_name)
    check_kernel(compute.attention, "gpu" if machine.chip.platform == "cuda" else "tpu")
    full = compute.offload == "full"
    path = bundle.resolve(model.bundle_name())
    tile = compute.vae_tile or (TILES.size if full else None)
    pipe = open_pipe(path, model.dtype or "bfloat16", model.schedule, tile)
    image = None if flags.input.image is None else video.load_image(flags.input.image)
    layout = make_layout(
        pipe.geometry, Request("", image), sections=1, height=size.height, width=size.width
    )
    settings = spec.VideoSpec(**flags.base()).filled(pipe.sampling).settings()
    settings.check(pipe.transformer.spec, pipe.sampling, pipe.schedule)
    mesh = sharding.parse_mesh(compute.mesh) if compute.mesh else None
    with attention.use(compute.attention):
        report = dry_run(
            pipe, path, layout, settings, machine, mesh, flags.job.batch,
            flags.dry_run.decode, offload=full,
        )  # fmt: skip
    print(f"{layout.height} x {layout.width} pixels, schedule {pipe.schedule}, {pipe.dtype}")
    print(report)
    if not report.fits:
        raise SystemExit(1)


def _refuse_ignored(flags: Sample) -> None:
    """Raise ValueError for flags that a dry run does not count."""
    default = Sample()
    given = [name for name in ("jobs", "output") if getattr(flags, name) is not None]
    for group, names in NOT_COMPILED.items():
        now, before = vars(getattr(flags, group)), vars(getattr(default, group))
        given += [name for name in names if now[name] != before[name]]
    if given:
        shown = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(
            f"--dry-run compiles one section of a new video and does not count {shown}:"
            " leave it out"
        )
