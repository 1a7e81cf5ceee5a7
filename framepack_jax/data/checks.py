"""Check a dataset before the first training step, without reading its arrays.

Each error names the fault, the number of clips with it, and a value or a command that repairs it.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax.data import build, clip_cache
from framepack_jax.data.records import DatasetError, Index, VideoSource
from framepack_jax.parallel.multihost import is_primary
from framepack_jax.utils.messages import shorten
from framepack_jax.utils.progress import Bar

THREADS = 16
VIDEOS = ("videos.jsonl", "videos.json")


def check_lengths(
    folder: epath.Path, index: Index, windows: Collection[int], given: int = 1, sections: int = 1
) -> None:
    """Raise DatasetError if the dataset is empty, has clips shorter than these `sections` of the
    largest of these latent windows after `given` latent frames, or chunks of another size."""
    if not index.clips:
        raise DatasetError(
            f"dataset {folder} is empty; see {folder}/rejected.jsonl for the reasons"
        )
    if index.chunk and (others := sorted({*windows} - {index.chunk})):
        raise DatasetError(
            f"clips in {folder} are encoded in chunks of {index.chunk} latent frames, and sections"
            f" of {others[0]} cannot be cut from them; train with that window, or prepare the"
            " dataset with a bundle of the schedule to train"
        )
    window = max(windows)
    needed = window if index.chunk else given + sections * window
    short = sum(length < needed for shard in index.shards for length in shard.lengths)
    if short:
        seconds = index.frames_of(needed) / index.fps
        what = "a section" if sections == 1 else f"{sections} sections"
        raise DatasetError(
            f"{short} of the {index.clips} clips in {folder} are shorter than {what} of {window}"
            f" latent frames, {seconds:.2f} s; prepare the dataset with --min-seconds"
            f" {seconds:.2f}, which encodes nothing again, or train with a smaller window"
        )


def check_captions(folder: epath.Path, index: Index, limit: int, empty: int = 0) -> None:
    """Raise DatasetError if captions, or the empty prompt of `empty` tokens, are longer than
    `limit` tokens."""
    tokens = list(_caption_tokens(folder, index))
    if (longest := max(empty, *tokens)) > limit:
        long = sum(count > limit for count in tokens)
        captions = f"captions in {folder} have up to {longest} tokens, {long} of {index.clips}"
        prompt = f"the empty prompt in {folder} has {longest} tokens,"
        raise DatasetError(
            f"{captions if long else prompt} more than --data.text-tokens {limit}; give"
            f" --data.text-tokens {longest}"
        )


def _caption_tokens(folder: epath.Path, index: Index) -> Iterable[int]:
    """Return the tokens of each caption. Records are read if the index has no token counts."""
    if all(len(shard.tokens) == len(shard.lengths) for shard in index.shards):
        return [count for shard in index.shards for count in shard.tokens]
    source = VideoSource(folder, index.shards)
    return _mapped(lambda n: len(source[n].text), range(len(source)), "reading captions")


def check_sources(folder: epath.Path, index: Index) -> None:
    """Raise DatasetError if videos of a dataset of mode pixels are missing, or are not as long in
    bytes as when they were prepared."""
    if index.mode != "pixels":
        return
    try:
        videos, sizes = _sources(folder, index), _prepared_sizes(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{folder / build.MANIFEST}, or {VIDEOS[0]} beside it, is damaged ({error}); prepare"
            " the dataset again"
        ) from error
    found = _mapped(lambda v: _fault(v[0], sizes.get(v[1])), videos, "looking for videos")
    if faults := [fault for fault in found if fault]:
        raise DatasetError(
            f"{len(faults)} of the {len(videos)} videos of {folder}, which --mode pixels reads in"
            f" training, are missing or changed: {shorten(faults)}; put them back, or prepare the"
            " dataset again"
        )


def _fault(path: Path, size: int | None) -> str | None:
    try:
        now = path.stat().st_size
    except OSError as error:
        return f"{path} ({error.strerror or error})"
    return None if size in (None, now) else f"{path} ({now} bytes, {size} when it was prepared)"


def _sources(folder: epath.Path, index: Index) -> list[tuple[Path, str]]:
    """Return (path, name in the cache) of each video, from the manifest beside the records."""
    videos = {}
    for place, name in _clips(folder, index):
        videos[place] = name.rpartition("-")[0].partition("@")[0]
    # An absolute path stays itself.
    return [(Path(os.path.join(folder, place)), name) for place, name in sorted(videos.items())]


def _clips(folder: epath.Path, index: Index) -> Iterator[tuple[str, str]]:
    """Yield (video, name) of each clip."""
    manifest = folder / build.MANIFEST
    if not manifest.exists():
        source = VideoSource(folder, index.shards)
        yield from ((clip.source, clip.id) for clip in (source[n].clip for n in range(len(source))))
        return
    with manifest.open() as rows:
        for row in map(json.loads, rows):
            if row["accepted"]:
                yield row["source"], row["id"]


def _prepared_sizes(folder: epath.Path) -> dict[str, int]:
    """Return the recorded size in bytes of each video by its name in the cache."""
    file = next((folder / name for name in VIDEOS if (folder / name).exists()), None)
    if file is None:
        return {}
    # A line for each video behind the first, or all of them in that.
    head, *rows = map(json.loads, file.read_text().splitlines())
    stamps = head.get("videos") or {row["video"]: row["stamp"] for row in rows}
    return {clip_cache.video_id(source): size for source, (size, _) in stamps.items()}


def _mapped(function: Any, items: Sequence[Any], what: str) -> list[Any]:
    """Map a function in threads, in order, with a progress bar if it takes long."""
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(function, items)
        return list(Bar(done, total=len(items), desc=what, delay=2, disable=not is_primary()))
