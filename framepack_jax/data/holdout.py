"""Clips held out for validation: whole videos, chosen by the digests of their names."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from framepack_jax.data.records import DatasetError, Index

FIRST_ELEMENT = 1 << 30
"""Number of the first held-out sample. Those of training are below it: they begin again at 0 after
so many samples."""


def split(index: Index, holdout: int) -> tuple[list[int], list[int]]:
    """Divide the numbers of the records into (training, at least `holdout` others).

    Whole videos are held out, those whose names have the smallest digests, so that a dataset that
    grows keeps most of them. The held-out records start with one clip of each video.
    """
    videos: dict[str, list[int]] = {}
    for number, video in enumerate(v for shard in index.shards for v in shard.videos):
        videos.setdefault(video, []).append(number)
    held: list[tuple[int, str, int]] = []
    for video in sorted(videos):
        if len(held) >= holdout:
            break
        held += [(turn, video, number) for turn, number in enumerate(videos.pop(video))]
    return sorted(itertools.chain(*videos.values())), [number for *_, number in sorted(held)]


def check_holdout(folder: epath.PathLike, index: Index, holdout: int) -> None:
    """Raise DatasetError if no clip is left to train on."""
    if split(index, holdout)[0]:
        return
    videos = collections.Counter(video for shard in index.shards for video in shard.videos)
    # The video with the largest digest is the last to be held out.
    limit = index.clips - videos[max(videos)]
    raise DatasetError(
        f"--data.holdout {holdout} leaves nothing of the {index.clips} clips of {len(videos)}"
        f" videos in {folder} to train on, as whole videos are held out; give --data.holdout"
        f" {limit}{' or less' if limit else ''}"
    )


@dataclasses.dataclass(frozen=True)
class HeldOutSamples:
    """Samples of one validation batch as (element, number of the record). `others` are the same
    elements with the record of the next clip; None if the bucket has one clip only."""

    samples: list[tuple[int, int]]
    others: list[tuple[int, int]] | None


def batches(
    held: Sequence[int],
    buckets: Sequence[tuple[int, int]],
    trained: Mapping[tuple[int, int], Sequence[int]],
    count: int,
    max_size: int,
    ways: int,
) -> Iterator[HeldOutSamples]:
    """Yield batches of `count` held-out samples, at least one of every held-out clip.

    Batches have one bucket each, at most `max_size` samples, and divide by `ways`; they are filled
    up by repeating the last sample. `buckets` are those of all records; `trained` are the records
    to train on, by bucket.
    """
    by_bucket: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for e in range(max(count, len(held)) if held else 0):
        number = held[e % len(held)]
        by_bucket.setdefault(buckets[number], []).append((FIRST_ELEMENT + e, number))
    for bucket, samples in sorted(by_bucket.items()):
        following = _following([number for _, number in samples], trained.get(bucket, []))
        size = min(max_size, -(-len(samples) // ways) * ways)
        for first in range(0, len(samples), size):
            some = samples[first : first + size]
            some += some[-1:] * (size - len(some))
            others = [(element, following[number]) for element, number in some]
            yield HeldOutSamples(some, others if len(following) > 1 else None)


def _following(held: Sequence[int], trained: Sequence[int]) -> dict[int, int]:
    """Return the next clip after each, in a circle; a single one is followed by a trained one."""
    clips = list(dict.fromkeys(held))
    clips = clips if len(clips) > 1 else clips + list(trained[:1])
    return dict(zip(clips, clips[1:] + clips[:1], strict=True))
