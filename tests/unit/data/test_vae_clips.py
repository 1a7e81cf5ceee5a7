"""Videos that a VAE is trained on."""

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.data.vae_clips import find_videos


def test_videos_are_listed_by_name(tmp_path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), np.uint8)
    for name in ("b.mp4", "a/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        video.write_mp4(tmp_path / name, list(frames), fps=24)
    (tmp_path / "notes.txt").write_text("no video")
    found = find_videos(tmp_path, 5, (32, 48))
    assert [(v.height, v.width) for v in found] == [(32, 48)] * 2
    with pytest.raises(ValueError, match=r"a/c\.mp4"):
        find_videos(tmp_path, 61, (32, 48))


def test_a_folder_without_videos_is_named(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(ValueError, match=r"has no videos .*framepack synthetic makes some"):
        find_videos(tmp_path, 5, (32, 48))
