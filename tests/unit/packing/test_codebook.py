"""The history codebook: k-means and its use."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import vq

from framepack_jax import packing
from framepack_jax.packing import codebook
from framepack_jax.packing.codebook import discretize, fit, nearest

SCHEDULES = [packing.parse(text) for text in ("f1k1_x_g2_f1k1f2k2_td", "td_f4k2f1k1_g2_x_f1k1")]


def blobs(rng: np.random.Generator, number: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Centres (5, 3) and pixels around them, with shares of 5 to 1."""
    centres = rng.uniform(-20, 20, (5, 3)).astype(np.float32)
    labels = np.repeat(np.arange(5), number * np.array([5, 4, 3, 2, 1]) // 15)
    return centres, (centres[labels] + 0.1 * rng.standard_normal((len(labels), 3))).astype("f4")


def test_entries_are_the_centres_of_clouds() -> None:
    centres, pixels = blobs(np.random.default_rng(0), 1500)
    found = fit(pixels, 5)
    np.testing.assert_allclose(found.entries, centres, atol=0.05)
    np.testing.assert_allclose(found.usage, np.array([5, 4, 3, 2, 1]) / 15, atol=1e-6)
    within = np.square(pixels - np.repeat(centres, [500, 400, 300, 200, 100], 0)).mean()
    assert found.error == pytest.approx(within / pixels.var(0).mean(), rel=0.02)


def test_the_error_is_that_of_scipy(monkeypatch) -> None:
    """Its k-means, from the best of several seeds, on pixels without clouds."""
    monkeypatch.setattr(codebook, "CHUNK", 300)  # the last piece is a part of one
    pixels = np.random.default_rng(1).standard_normal((1000, 4)).astype("f4")
    found = fit(pixels, 16)
    _, distances = vq.vq(pixels, found.entries)
    assert found.error == pytest.approx(
        np.square(distances).mean() / 4 / pixels.var(0).mean(), 1e-4
    )
    theirs = min(
        np.square(vq.vq(pixels, vq.kmeans2(pixels, 16, iter=50, minit="++", seed=i)[0])[1]).mean()
        for i in range(5)
    )
    assert np.square(distances).mean() < 1.1 * theirs


def test_one_entry_is_the_mean() -> None:
    pixels = np.random.default_rng(2).normal(3, 1, (200, 4)).astype("f4")
    found = fit(pixels, 1)
    np.testing.assert_allclose(found.entries, pixels.mean(0, keepdims=True), rtol=1e-5)
    assert found.error == pytest.approx(1, rel=1e-3)
    latents = nearest(jnp.asarray(pixels), found.entries)
    assert (np.asarray(latents) == found.entries).all()


def test_too_few_pixels_are_named() -> None:
    pixels = np.repeat(np.eye(4, dtype="f4"), 3, axis=0)
    assert fit(pixels, 4).error == 0
    with pytest.raises(
        ValueError, match="5 entries needs as many different latent pixels, found 4"
    ):
        fit(pixels, 5)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16"]))
def test_the_nearest_entry_is_taken_and_stays(seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    entries = rng.standard_normal((7, 4)).astype("f4")
    latents = jnp.asarray(rng.standard_normal((2, 3, 4)), dtype)
    found = nearest(latents, entries)
    assert found.dtype == latents.dtype
    distances = np.square(np.asarray(latents, "f4")[..., None, :] - entries).sum(-1)
    least = jnp.asarray(entries[distances.argmin(-1)], dtype)
    assert (found == least).all()
    assert (nearest(found, entries) == found).all()


def test_the_ending_is_no_history() -> None:
    """It may be an image that was given."""
    ages = packing.history_ages(packing.parse("td_f2k2f1k1_g9_x_f1k1"))
    assert ages == ((0, 1), (2,), (packing.MISSING,))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_history_alone_is_changed(schedule) -> None:
    """Missing frames stay zero; the anchor and the ending stay as they are."""
    rng = np.random.default_rng(3)
    video = packing.Timeline.of(rng.standard_normal((2, 8, 4, 4, 3)).astype("f4"))
    section = packing.plan(schedule, 3)[1]
    context = packing.read_context(section, video)
    missing = [[read == packing.MISSING for read in group.reads] for group in section.groups]
    ages = packing.history_ages(schedule)
    assert any(map(any, missing)) and any(packing.MISSING in group for group in ages)
    entries = rng.standard_normal((5, 3)).astype("f4")
    found = discretize(context, schedule, entries)
    for group, before, after, absent in zip(
        ages, context.latents, found.latents, missing, strict=True
    ):
        for age, old, new, zero in zip(
            group, np.moveaxis(before, 1, 0), np.moveaxis(after, 1, 0), absent, strict=True
        ):
            if zero:
                assert not new.any()
            elif age == packing.MISSING:
                assert (new == old).all()
            else:
                assert (new == np.asarray(nearest(jnp.asarray(old), entries))).all()
                assert (new != old).any()
