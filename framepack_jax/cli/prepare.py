"""`framepack prepare`: make a dataset of videos with captions."""

import dataclasses
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from etils import epath

from framepack_jax.cli.common import (
    ALONE,
    FAILURES,
    RESUME,
    MultihostFlags,
    cli_errors,
    configure_jax,
    parse_size,
)
from framepack_jax.data.filters import Thresholds
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import FILES_IN_STORES, IN_STORES

if TYPE_CHECKING:
    from framepack_jax.data.prepare import PrepareConfig
    from framepack_jax.data.scenes import SceneSettings

THRESHOLDS = Thresholds()


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Make a dataset of videos: cut them into clips, encode and filter the clips, and write them by
    bucket.

    The output folder holds shards/ and dataset.json, manifest.jsonl (every clip with its scores),
    rejected.jsonl (every rejected video and clip with the reason), contact sheets of both,
    videos.jsonl (the videos of the dataset), and clips/, the encoded clips by video. Run the same
    command again to resume, or to add new videos. Other thresholds (--min-..., --max-...) and moved
    videos encode nothing again. An existing dataset stays until the new one is complete.
    """

    videos: Path
    """Folder of videos, searched recursively, with the caption of NAME.mp4 in NAME.txt; or a
    manifest (.jsonl, .json, .csv, .tsv, .parquet) with one row per video: "video", a path relative
    to the manifest; "caption", one or a list, optional if NAME.txt exists; "start" and "end" in
    seconds, optional. Column names of other trainers work too (video_path, file_name, path; text,
    prompt). A video with several captions gives one record for each."""
    bundle: Annotated[str, IN_STORES]
    """Bundle to be trained, whose encoders are used; tiny is part of this package."""
    output: Annotated[epath.Path, FILES_IN_STORES]
    """Folder of the dataset."""
    replace: bool = False
    """Replace a dataset of other videos in --output. By default, this is an error."""
    mode: Literal["latents", "pixels"] = "latents"
    """latents: encode clips now. pixels: encode captions and first frames only; training decodes
    the videos from their present place and encodes them in the step."""
    buckets: str | None = None
    """Sizes to which clips are scaled and cropped, HEIGHTxWIDTH,HEIGHTxWIDTH,...; 480p for the 14
    of the released models. Default: those of the bundle."""
    max_seconds: float = 20.0
    """Maximum length of a clip; longer scenes are divided."""
    scene_threshold: float = 0.08
    """Change from frame to frame, 0 to 1, at which a scene ends; 1 never cuts."""
    empty_captions: bool = False
    """Accept videos without a caption, with the empty prompt."""
    thresholds: tyro.conf.OmitArgPrefixes[Thresholds] = THRESHOLDS
    workers: int = 2
    """Number of threads that decode videos, for each device of this host. All devices encode."""
    ray: str | None = None
    """Decode on a Ray cluster instead of threads (extra [ray]): its address, auto, or local."""
    keep_clips: bool = True
    """Keep clips/, as large as the dataset. Without it, new thresholds encode again."""
    multihost: tyro.conf.OmitArgPrefixes[MultihostFlags] = ALONE
    """Run the same command in several processes: each encodes a share of the videos. All need the
    same --output, on a shared disk."""


def main(args: list[str] | None = None, prog: str = "framepack prepare") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = parse(Prepare, args, prog)
    began = time.monotonic()
    with cli_errors((*FAILURES, sqlite3.Error), explain=_explain, interrupted=RESUME):
        _run(flags, began)


def _explain(error: Exception) -> str:
    if not isinstance(error, sqlite3.Error):
        return str(error)
    return (
        f"the list of videos cannot be kept in a temporary file ({error}); set SQLITE_TMPDIR to a"
        " folder with free space"
    )


def _run(flags: Prepare, began: float) -> None:
    from framepack_jax.data import prepare
    from framepack_jax.data.records import INDEX
    from framepack_jax.parallel.multihost import is_primary

    configure_jax()
    flags.multihost.join()
    packed = prepare.prepare(_config(flags))
    if is_primary():
        print(packed)
        seconds = time.monotonic() - began
        print(f"{flags.output / INDEX}: {packed.clips} clips; {seconds:.1f} s in all")


def _config(flags: Prepare) -> "PrepareConfig":
    """Return the settings of a dataset. Raises BundleError, or ValueError if a flag is out of
    range."""
    from framepack_jax.data.prepare import PrepareConfig

    if flags.workers < 1:
        raise ValueError(f"--workers {flags.workers}: expected 1 or more")
    return PrepareConfig(
        videos=flags.videos, bundle=flags.bundle, output=flags.output, mode=flags.mode,
        scenes=_scene_settings(flags), thresholds=flags.thresholds, replace=flags.replace,
        empty_captions=flags.empty_captions, workers=flags.workers, ray=flags.ray,
        keep_clips=flags.keep_clips,
    )  # fmt: skip


def _scene_settings(flags: Prepare) -> "SceneSettings":
    """Return the settings that fit the VAE and the transformer of the bundle."""
    from framepack_jax import bundle, packing
    from framepack_jax.data.scenes import SceneSettings

    manifest = bundle.read_manifest(bundle.resolve(flags.bundle))
    transformer, _ = bundle.denoiser_config(manifest)
    _, vae = bundle.role_config(manifest, "vae")
    patch = vae.space_compression * packing.kernel_shape(transformer.patch)[1]
    sizes = flags.buckets or ",".join(f"{height}x{width}" for height, width in manifest.buckets)
    buckets = parse_buckets(sizes, patch)
    if not 0 < flags.scene_threshold <= 1:
        raise ValueError(
            f"--scene-threshold {flags.scene_threshold}: expected a number above 0, at most 1"
        )
    if manifest.chunk and flags.mode == "pixels":
        raise ValueError(
            "--mode pixels: this bundle encodes each section by itself, which training does not;"
            " prepare the dataset with --mode latents"
        )
    fps, compression = manifest.sampling.fps, vae.time_compression
    settings = SceneSettings(
        fps=fps,
        cut=flags.scene_threshold,
        buckets=buckets,
        time_compression=compression,
        chunk_frames=1 + (manifest.chunk - 1) * compression if manifest.chunk else 0,
    )
    frames = settings.usable(int(flags.max_seconds * fps) if 0 < flags.max_seconds < 3600 else 0)
    if not frames:
        least = settings.min_frames / fps
        raise ValueError(
            f"--max-seconds {flags.max_seconds}: expected between {least:.2g} and 3600 s"
        )
    return dataclasses.replace(settings, max_frames=frames)


def parse_buckets(text: str, multiple: int) -> tuple[tuple[int, int], ...]:
    """Parse sizes (height, width). Raises ValueError if a side is not a multiple of `multiple`."""
    from framepack_jax.packing.buckets import BUCKETS_480P

    if text == "480p":
        return BUCKETS_480P
    buckets = [parse_size("--buckets", part, multiple) for part in text.split(",")]
    if len(set(buckets)) < len(buckets):
        raise ValueError(f"--buckets {text}: a size is given twice")
    return tuple(sorted(buckets))
