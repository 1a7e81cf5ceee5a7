"""Pixels for the codebook, drawn from the latents of a dataset."""

import numpy as np
import pytest

from framepack_jax.data.latent_pixels import draw_pixels
from tests.fixtures.training_data import write_dataset


@pytest.mark.parametrize("most", [3, 7, 40])
def test_as_many_pixels_of_each_clip(tmp_path, most) -> None:
    clips = write_dataset(tmp_path, {(32, 48): (3, 3, 4, 5, 3)})
    drawn = draw_pixels(tmp_path, most)
    owners = []
    for pixel in drawn:
        (owner,) = (n for n, clip in enumerate(clips) if (clip.latents == pixel).all(-1).any())
        owners.append(owner)
    counts = np.bincount(owners, minlength=5)
    # Fewer pixels than clips: one each of `most` clips; else the same share of all.
    assert sorted(counts) == ([0, 0, 1, 1, 1] if most == 3 else [most // 5] * 5)
    assert drawn.dtype == np.float32 and len(np.unique(drawn, axis=0)) == len(drawn)
    np.testing.assert_array_equal(draw_pixels(tmp_path, most), drawn)
