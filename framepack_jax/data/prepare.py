"""Make a dataset of videos: list, decode, encode, then write the clips that meet the thresholds.

Encoded clips are kept by video in the clip cache, so that an interrupted run resumes and other
thresholds encode nothing again. With several processes, each encodes a share of the videos. The
first writes the dataset from the cache in a thread, while videos are encoded.
"""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
from etils import epath

from framepack_jax import bundle
from framepack_jax.data import build, clip_cache, decode_ahead, ray_backend
from framepack_jax.data.captions import NOT_TEXT, escaped
from framepack_jax.data.clip_cache import CachedVideo
from framepack_jax.data.encode_ahead import EncoderPool, encode_videos
from framepack_jax.data.filters import Thresholds
from framepack_jax.data.fingerprint import made_by
from framepack_jax.data.listing import Listing, list_videos
from framepack_jax.data.precompute import TILING, Encoder
from framepack_jax.data.records import INDEX, NEW, DatasetError, Index
from framepack_jax.data.scenes import SceneSettings
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS
from framepack_jax.parallel.multihost import is_primary, on_all_hosts, on_primary
from framepack_jax.utils.progress import Bar

# Increased when videos are decoded or judged differently: cached clips are then encoded again.
FORMAT = 2
# Between two looks for a video that is being encoded.
POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Settings of a dataset. `videos` is a folder or a manifest; `ray` is the address of a Ray
    cluster, None for threads on this machine."""

    videos: Path
    bundle: str
    output: epath.Path
    mode: Literal["latents", "pixels"]
    scenes: SceneSettings
    thresholds: Thresholds
    replace: bool
    empty_captions: bool
    workers: int
    ray: str | None
    keep_clips: bool


def prepare(cfg: PrepareConfig) -> build.Packed:
    """Make a dataset; all processes call this. Raises ValueError, OSError."""
    path = bundle.resolve(cfg.bundle)
    manifest = bundle.read_manifest(path)
    listing = on_all_hosts(list_videos, cfg.videos, cfg.empty_captions)
    _check_output(cfg.output)
    if not cfg.replace:
        on_primary(build.check_videos, cfg.output, cfg.videos, listing)
    on_primary(build.check_any, cfg.output, cfg.videos, listing)
    made = _made(cfg, manifest)
    chunk_frames = cfg.scenes.chunk_frames
    encoder = Encoder.load(path, manifest, cfg.mode == "pixels", chunk_frames)
    encoders = [encoder.on(device) for device in jax.local_devices()]
    dataset = _index(cfg, manifest, made), encoders[0].prompt("")
    with _packing(cfg, listing, made, *dataset) as packing:
        encoded = on_all_hosts(_encode, cfg, listing, encoders, made)
        packed = on_primary(packing)
    if not cfg.keep_clips:
        on_primary((cfg.output / clip_cache.STORE).rmtree)
    if not packed.clips:
        raise DatasetError(
            f"every clip of {len(listing)} videos was rejected; see"
            f" {cfg.output}/rejected.jsonl for the reasons: {packed.rejected}"
        )
    return dataclasses.replace(packed, encoded=tuple(encoded))


def _check_output(output: epath.Path) -> None:
    """Make the output folder. Raises DatasetError if it holds other files, or if its name is not
    UTF-8, which ArrayRecord cannot write."""
    if NOT_TEXT.search(str(output)):
        raise DatasetError(f"--output {escaped(str(output))} is not valid UTF-8; choose another")
    names = (clip_cache.STORE, INDEX, NEW, build.REJECTED)
    ours = not output.exists() or any((output / name).exists() for name in names)
    if not ours and any(output.iterdir()):
        raise DatasetError(
            f"--output {output} is not a dataset and not empty; choose another folder"
        )
    output.mkdir(parents=True, exist_ok=True)


def _made(cfg: PrepareConfig, manifest: bundle.Manifest) -> dict[str, Any]:
    """Return every setting that determines the records."""
    tiling = dataclasses.asdict(TILING) if cfg.mode == "latents" else None
    made = {
        **made_by(manifest, cfg.mode),
        "format": FORMAT,
        "mode": cfg.mode,
        "vae_tiling": tiling,
        **dataclasses.asdict(cfg.scenes),
    }
    # Settings that did not exist before: without them, clips cached by earlier versions fit.
    if not made["chunk_frames"]:
        del made["chunk_frames"]
    if manifest.text_tokens != MAX_PROMPT_TOKENS:
        made["text_tokens"] = manifest.text_tokens
    return made


def _index(cfg: PrepareConfig, manifest: bundle.Manifest, made: dict[str, Any]) -> Index:
    """Return the index of the dataset, without shards."""
    _, vae = bundle.role_config(manifest, "vae")
    return Index(
        cfg.mode, (), json.loads(json.dumps(made)), cfg.scenes.fps, vae.time_compression,
        vae.space_compression, vae.latent_channels, chunk=manifest.chunk,
        text_tokens=manifest.text_tokens,
    )  # fmt: skip


class _StoppedError(Exception):
    """Videos are no longer encoded."""


@contextlib.contextmanager
def _packing(
    cfg: PrepareConfig, listing: Listing, made: dict[str, Any], index: Index, empty: Any
) -> Iterator[Callable[[], build.Packed]]:
    """Write the dataset in a thread while videos are encoded, in the first process. Yield a
    function that waits for the dataset, or raises the error of the thread."""
    stop = threading.Event()

    def wait(video: CachedVideo) -> None:
        while not stop.is_set():
            if clip_cache.is_done(cfg.output, video, made):
                return
            stop.wait(POLL_SECONDS)
        raise _StoppedError

    def pack() -> build.Packed:
        thresholds = cfg.thresholds
        return build.pack(cfg.output, cfg.videos, listing, thresholds, index, empty, wait)

    with ThreadPoolExecutor(1) as pool:
        packing = pool.submit(pack) if is_primary() else Future[build.Packed]()
        try:
            yield packing.result
        finally:
            stop.set()


def _encode(
    cfg: PrepareConfig, listing: Listing, encoders: Sequence[Encoder], made: dict[str, Any]
) -> list[int]:
    """Encode the videos of this process into the clip cache, with a progress bar. Return the number
    of clips that each encoder made."""
    index, count = jax.process_index(), jax.process_count()
    total = len(range(index, len(listing), count))
    with Bar(total=total, desc="videos", unit="video", disable=not is_primary()) as bar:
        clips = 0

        def advance() -> None:
            nonlocal clips
            clips += 1
            bar.set_postfix(clips=clips, refresh=False)

        def missing() -> Iterator[CachedVideo]:
            for video in listing.share(index, count):
                if clip_cache.is_done(cfg.output, video, made):
                    bar.update()
                else:
                    yield video

        if cfg.ray is None:
            workers = cfg.workers * len(encoders)
            decoded = decode_ahead.decode_videos(missing(), cfg.scenes, workers)
        else:
            decoded = ray_backend.decode_videos(missing(), cfg.scenes, cfg.ray)
        pool = EncoderPool(encoders)
        with contextlib.closing(encode_videos(decoded, pool, cfg.scenes)) as encoded:
            for video, encoded_clips in encoded:
                clip_cache.add(cfg.output, video, encoded_clips, made, advance)
                bar.update()
    return pool.encoded
