"""Means and errors of validation losses."""

import collections

import jax.numpy as jnp
import numpy as np

from framepack_jax.training import validation


def losses_of(changed: dict[str, float]):
    """Losses of a stand-in network: the number of a clip, more if a kernel's context is changed."""

    def losses_at(batch, others, sigma, blank, other):
        assert not (other.any() and batch is others)
        more = changed.get("blank", 0) * blank[0] + changed.get("other", 0) * other[0]
        return jnp.asarray(batch.meta.clip * (1.0 + more * batch.meta.element), jnp.float32)

    return losses_at


def held_out(elements, clips):
    Context = collections.namedtuple("Context", "kernels")
    Meta = collections.namedtuple("Meta", "element clip")
    Held = collections.namedtuple("Held", "meta context")
    return Held(Meta(jnp.asarray(elements), jnp.asarray(clips)), Context(("k1", "k2")))


def test_validation_counts_clips_alike() -> None:
    """Samples that fill up a batch once, clips with many samples like those with one."""
    first, second = held_out([0, 1, 1, 2], [1, 1, 1, 4]), held_out([3, 3], [7, 7])
    found = validation.losses(
        losses_of({"blank": 0.5, "other": 2.0}), [(first, second), (second, None)], (0.5,), True
    )
    assert found["validation/loss"] == found["validation/loss_sigma_0.5"] == 4.0
    # Rises: of clip 1 the mean of 0 and 0.5, of clip 4 4, of clip 7 10.5.
    rises = np.asarray([0.25, 4.0, 10.5])
    np.testing.assert_allclose(found["context/k1_blank"], rises.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        found["context/k1_blank_error"], rises.std(ddof=1) / 3**0.5, rtol=1e-6
    )
    assert found["context/k2_blank"] == 0
    # There is no other clip in the second bucket: clips 1 and 4 alone.
    np.testing.assert_allclose(found["context/k1_other"], np.mean([1.0, 16.0]), rtol=1e-6)


def test_of_one_clip_there_is_no_error() -> None:
    found = validation.losses(
        losses_of({"blank": 1.0, "other": 1.0}), [(held_out([0, 1], [3, 3]), None)], (0.5,), True
    )
    assert "context/k1_blank" in found and not any("error" in name for name in found)
    assert not any("other" in name for name in found)


def test_the_loss_of_each_dataset_is_the_mean_over_its_clips() -> None:
    batches = [(held_out([0, 1, 1, 2], [1, 1, 1, 4]), None), (held_out([3, 3], [7, 7]), None)]

    def found(dataset_of):
        return validation.losses(losses_of({}), batches, (0.5, 0.9), False, dataset_of)

    named = found(lambda clip: "a" if clip < 5 else "b")
    assert named["validation/loss_of_a"] == 2.5 and named["validation/loss_of_b"] == 7
    assert not any("loss_of" in name for name in found(None))


def test_a_video_is_shown_as_long_as_the_shorter_one() -> None:
    made, truth = np.full((5, 2, 3, 3), 1, np.uint8), np.full((4, 2, 3, 3), 2, np.uint8)
    for above, below in ((made, truth), (truth, made)):
        shown = validation.side_by_side(above, below)
        assert shown.shape == (4, 4, 3, 3)
        assert (shown[:, :2] == above[0, 0]).all() and (shown[:, 2:] == below[0, 0]).all()
