"""Checks of a dataset before training."""

import json

import pytest
from etils import epath

from framepack_jax.data import checks, clip_cache


@pytest.mark.parametrize("older", [False, True])
def test_sizes_of_videos_are_read_from_either_form_of_their_list(tmp_path, older: bool) -> None:
    """All stamps in the first line, or a line for each video behind it."""
    stamps = {"a.mp4": [100, 1.5], "b.mp4": [200, 2.5]}
    rows = [{"video": video, "stamp": stamp} for video, stamp in stamps.items()]
    lines = [{"videos": stamps}] if older else [{"format": 1}, *rows]
    name = checks.VIDEOS[0]
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = checks._prepared_sizes(epath.Path(tmp_path))
    assert found == {clip_cache.video_id("a.mp4"): 100, clip_cache.video_id("b.mp4"): 200}
