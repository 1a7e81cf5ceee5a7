"""`framepack prepare`: videos with captions become a dataset to train on."""

import collections
import dataclasses
import json
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from framepack_jax import bundle, packing
from framepack_jax.cli.common import ALONE, MultihostFlags, configure_jax, parse_size
from framepack_jax.data import build, clip_cache, filters, ray_backend
from framepack_jax.data.captions import NOT_TEXT, escaped
from framepack_jax.data.clip_cache import CachedVideo
from framepack_jax.data.filters import Cut, FilterSettings, Thresholds
from framepack_jax.data.fingerprint import made_by
from framepack_jax.data.listing import Listing, list_videos
from framepack_jax.data.precompute import TILING, Encoder
from framepack_jax.data.records import INDEX, DatasetError, Index
from framepack_jax.packing.buckets import BUCKETS_480P
from framepack_jax.parallel.multihost import is_primary, on_all_hosts, on_primary
from framepack_jax.utils.flags import parse
from framepack_jax.utils.progress import Bar

# Raised when videos are decoded or judged differently: those in the store are then read again.
FORMAT = 2
THRESHOLDS = Thresholds()


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Make a dataset of videos: cut them into clips, judge and encode these, pack them by bucket.

    The output folder holds shards/ and dataset.json, manifest.jsonl (every clip with its scores),
    rejected.jsonl (what did not get in, and why), contact sheets of both, videos.jsonl (what videos
    it is of), and clips/, the encoded clips by video. The same command goes on where it was
    stopped, and takes in what was added; with other thresholds, --min-... and --max-..., or where
    the videos were moved, it packs anew and encodes nothing again. A dataset that is there stays
    until the new one is whole.
    """

    videos: Path
    """A folder of videos, searched through with its links, with the caption of NAME.mp4 in
    NAME.txt; or a .jsonl, .json, .csv, .tsv or .parquet file with a row a video: "video" (a path,
    relative to the file), "caption", one or a list, if it is not in NAME.txt, and "start" and
    "end", if only these seconds are meant. Column names of other trainers are known too
    (video_path, file_name, path; text, prompt). Several captions make as many records."""
    bundle: str
    """The bundle that will be trained, whose encoders are used; or tiny."""
    output: Path
    """Folder of the dataset."""
    replace: bool = False
    """Put a dataset of these videos in the place of one of others; without it, that is refused."""
    mode: Literal["latents", "pixels"] = "latents"
    """latents: clips are encoded now. pixels: only captions and first frames are; the videos are
    read in training, from where they are, and encoded by the VAE in the step."""
    buckets: str | None = None
    """Sizes that clips are scaled and cut to, HEIGHTxWIDTH,HEIGHTxWIDTH,...; 480p are the 14 of the
    release. Default: those of the bundle."""
    max_seconds: float = 20.0
    """Longer scenes are divided."""
    scene_threshold: float = FilterSettings.cut
    """Change from frame to frame, 0 to 1, at which a scene ends; 1 never cuts."""
    empty_captions: bool = False
    """Take videos without a caption, under the empty prompt."""
    thresholds: tyro.conf.OmitArgPrefixes[Thresholds] = THRESHOLDS
    workers: int = 2
    """Threads that decode videos, beside the one that encodes."""
    ray: str | None = None
    """Decode on a Ray cluster instead of threads (extra ray): its address, auto, or local."""
    keep_clips: bool = True
    """Keep clips/, as large as the dataset; without it new thresholds encode again."""
    multihost: tyro.conf.OmitArgPrefixes[MultihostFlags] = ALONE
    """Run the same command in several processes: each takes a part of the videos. All need the same
    --output, on a disk that they share."""


def main(args: list[str] | None = None, prog: str = "framepack prepare") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = parse(Prepare, args, prog)
    began = time.monotonic()
    try:
        packed = prepare(flags)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except sqlite3.Error as error:
        raise SystemExit(
            f"error: the list of videos cannot be kept in a temporary file ({error}); let"
            " SQLITE_TMPDIR name a folder with room"
        ) from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None
    if is_primary():
        print(packed)
        print(
            f"{flags.output / INDEX}: {packed.clips} clips; {time.monotonic() - began:.1f} s in all"
        )


def prepare(flags: Prepare) -> build.Packed:
    """Make the dataset of `flags`. Raises ValueError for what cannot be, OSError."""
    configure_jax()
    flags.multihost.join()
    path = bundle.resolve(flags.bundle)
    manifest = bundle.read_manifest(path)
    settings = _settings(flags, manifest)
    listing = on_all_hosts(list_videos, flags.videos, flags.empty_captions)
    _check_output(flags.output)
    if not flags.replace:
        on_primary(build.check_videos, flags.output, flags.videos, listing)
    on_primary(build.check_any, flags.output, flags.videos, listing)
    made = _made(flags, manifest, settings)
    encoder = Encoder.load(path, manifest, flags.mode == "pixels")
    on_all_hosts(_encode, flags, listing, encoder, settings, made)
    index = _index(flags, manifest, settings)
    packed = on_primary(
        build.pack, flags.output, flags.videos, listing, flags.thresholds, index,
        encoder.prompt(""),
    )  # fmt: skip
    if not flags.keep_clips:
        on_primary(shutil.rmtree, flags.output / clip_cache.STORE)
    if not packed.clips:
        raise DatasetError(
            f"none of {len(listing)} videos gave a clip that gets in; {flags.output}/rejected.jsonl"
            f" has the reasons: {packed.rejected}"
        )
    return packed


def _settings(flags: Prepare, manifest: bundle.Manifest) -> FilterSettings:
    """Raises ValueError for sizes and lengths that cannot be."""
    transformer, _ = bundle.denoiser_config(manifest)
    _, vae = bundle.role_config(manifest, "vae")
    step = vae.space_compression * packing.kernel_shape(transformer.patch)[1]
    sizes = flags.buckets or ",".join(f"{height}x{width}" for height, width in manifest.buckets)
    buckets = parse_buckets(sizes, step)
    if not 0 < flags.scene_threshold <= 1:
        raise ValueError(
            f"--scene-threshold {flags.scene_threshold}: expected a number above 0, at most 1"
        )
    if flags.workers < 1:
        raise ValueError(f"--workers {flags.workers}: expected 1 or more")
    most = int(flags.max_seconds * FilterSettings.fps) if 0 < flags.max_seconds < 3600 else 0
    most -= (most - 1) % vae.time_compression
    if most < filters.LEAST_FRAMES:
        raise ValueError(f"--max-seconds {flags.max_seconds}: expected between 0.2 and 3600 s")
    return FilterSettings(
        max_frames=most,
        cut=flags.scene_threshold,
        buckets=buckets,
        time_compression=vae.time_compression,
    )


def parse_buckets(text: str, step: int) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) from a flag. Raises ValueError where one is no multiple of `step`."""
    if text == "480p":
        return BUCKETS_480P
    buckets = []
    for part in text.split(","):
        buckets.append(parse_size("--buckets", part, multiple=step))
    if len(set(buckets)) < len(buckets):
        raise ValueError(f"--buckets {text}: a size is there twice")
    return tuple(sorted(buckets))


def _check_output(output: Path) -> None:
    """Never write among other files, nor where the writer of shards cannot."""
    if NOT_TEXT.search(str(output)):
        raise DatasetError(f"--output {escaped(str(output))} is no name in UTF-8; choose another")
    names = (clip_cache.STORE, INDEX, build.REJECTED)
    ours = not output.exists() or any((output / name).exists() for name in names)
    if not ours and any(output.iterdir()):
        raise DatasetError(f"--output {output} is no dataset and not empty; choose another folder")
    output.mkdir(parents=True, exist_ok=True)


def _made(flags: Prepare, manifest: bundle.Manifest, settings: FilterSettings) -> dict[str, Any]:
    """All that decides the numbers in the records."""
    tiling = dataclasses.asdict(TILING) if flags.mode == "latents" else None
    return {
        **made_by(manifest, flags.mode),
        "format": FORMAT,
        "mode": flags.mode,
        "vae_tiling": tiling,
        **dataclasses.asdict(settings),
    }


def _index(flags: Prepare, manifest: bundle.Manifest, settings: FilterSettings) -> Index:
    _, vae = bundle.role_config(manifest, "vae")
    made = json.loads(json.dumps(_made(flags, manifest, settings)))
    return Index(
        flags.mode, (), made, settings.fps, vae.time_compression, vae.space_compression,
        vae.latent_channels,
    )  # fmt: skip


def _encode(
    flags: Prepare,
    listing: Listing,
    encoder: Encoder,
    settings: FilterSettings,
    made: dict[str, Any],
) -> None:
    """Bring the videos of this process into the store, behind a bar."""
    index, count = jax.process_index(), jax.process_count()
    total = len(range(index, len(listing), count))
    with Bar(total=total, desc="videos", unit="video", disable=not is_primary()) as bar:
        clips = 0

        def advance() -> None:
            nonlocal clips
            clips += 1
            bar.set_postfix(clips=clips, refresh=False)

        def todo() -> Iterator[CachedVideo]:
            for video in listing.share(index, count):
                if clip_cache.is_done(flags.output, video, made):
                    bar.update()
                else:
                    yield video

        source = decoded(todo(), settings, flags.workers)
        if flags.ray is not None:
            source = ray_backend.decoded(todo(), settings, flags.ray)
        for video, cuts in source:
            clip_cache.add(flags.output, video, cuts, encoder.records, settings, made, advance)
            bar.update()


def decoded(
    videos: Iterable[CachedVideo], settings: FilterSettings, workers: int
) -> Iterator[tuple[CachedVideo, Iterator[Cut]]]:
    """(video, its clips) in order, each decoded in a thread of its own, `workers` at a time; what
    is wrong with a video is raised among its clips."""
    stop = threading.Event()
    ahead: collections.deque[tuple[CachedVideo, _Decoding]] = collections.deque()
    try:
        for video in videos:
            ahead.append((video, _Decoding(video, settings, stop)))
            if len(ahead) == workers:
                yield ahead[0][0], iter(ahead[0][1])
                ahead.popleft()
        while ahead:
            yield ahead[0][0], iter(ahead[0][1])
            ahead.popleft()
    finally:
        stop.set()
        for _, decoding in ahead:
            decoding.thread.join(timeout=5)


class _Decoding:
    """The clips of a video, decoded in a thread some clips ahead."""

    def __init__(self, video: CachedVideo, settings: FilterSettings, stop: threading.Event) -> None:
        self.video, self.settings, self.stop = video, settings, stop
        self.items: queue.Queue[Cut | BaseException | None] = queue.Queue(1)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[Cut]:
        while (item := self.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self) -> None:
        try:
            span = self.video.start, self.video.end
            for cut in filters.clips(self.video.path, self.settings, *span):
                if not self._put(cut):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Cut | BaseException | None) -> bool:
        """Hand an item over; returns whether anyone still wants it."""
        while not self.stop.is_set():
            try:
                self.items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
