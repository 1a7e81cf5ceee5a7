"""Decode videos on a Ray cluster (extra [ray]): its nodes cut and score clips, this host encodes.

All nodes must see the videos under the same paths.
"""

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax.data import scenes
from framepack_jax.data.clip_cache import CachedVideo
from framepack_jax.data.rejected import Rejected
from framepack_jax.data.scenes import SceneClip, SceneSettings

# Videos that are sent to the cluster at a time.
AT_ONCE = 4096


def decode_videos(
    videos: Iterable[CachedVideo], settings: SceneSettings, address: str | None = None
) -> Generator[tuple[CachedVideo, Iterator[SceneClip]], None, None]:
    """Yield (video, its clips) in order, like `decode_ahead.decode_videos`. The error of a video is
    raised among its clips. Raises ValueError if Ray is not installed, or if its cluster at
    `address` (None for this machine) cannot be reached."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            'preparing on a cluster needs Ray: pip install "framepack-jax[ray]"'
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"Ray cluster {address} cannot be reached ({error})") from error
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    videos = iter(videos)
    while some := list(itertools.islice(videos, AT_ONCE)):
        rows = [
            {"number": n, "path": str(video.path), "start": video.start, "end": video.end}
            for n, video in enumerate(some)
        ]
        # One block per video, as their lengths differ widely.
        stream = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
            clip_rows, fn_kwargs={"settings": dataclasses.asdict(settings)}
        )
        by_video = itertools.groupby(stream.iter_rows(), key=lambda row: int(row["number"]))
        for number, group in by_video:
            yield some[number], cuts(group)


def clip_rows(row: dict[str, Any], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the clips of a video as rows, then an end row with the reason of a rejection, if
    any."""
    end = {"number": row["number"], "first": -1, "frames": b"", "shape": [], "scores": {}}
    end |= {"reason": "", "detail": ""}
    try:
        span = row["start"], row["end"]
        for cut in scenes.clips(Path(row["path"]), SceneSettings(**settings), *span):
            clip = {"first": cut.first, "scores": cut.scores, "shape": list(cut.frames.shape)}
            yield end | clip | {"frames": cut.frames.tobytes()}
    except Rejected as error:
        end |= {"reason": error.reason, "detail": error.detail}
    yield end


def cuts(rows: Iterator[dict[str, Any]]) -> Iterator[SceneClip]:
    """Yield the clips of the rows of one video. Raises Rejected, also after clips were yielded."""
    for row in rows:
        if row["reason"]:
            raise Rejected(row["reason"], row["detail"])
        if row["first"] < 0:
            continue
        frames = np.frombuffer(row["frames"], np.uint8).reshape(tuple(row["shape"]))
        scores = {name: float(value) for name, value in row["scores"].items()}
        yield SceneClip(int(row["first"]), frames, scores)
