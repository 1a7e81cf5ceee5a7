"""Tables of rotary embeddings whose tokens cover parts of patches."""

import numpy as np
import pytest

from framepack_jax.ops.rope import rope_table

AXES, THETA = (2, 4, 4), 256.0


def phases(position: float, dim: int) -> np.ndarray:
    """exp(i position frequency), (dim / 2,)."""
    return np.exp(1j * position * THETA ** -(np.arange(0, dim, 2) / dim))


@pytest.mark.parametrize(("cells", "columns"), [(1, 12), (3, 4), (5, 3)])
def test_odd_cells_lie_a_quarter_beside_the_middle_of_their_patch(cells, columns) -> None:
    """12 cells are 6 patches: cell c lies at c / 2 - 1/4, and edges are repeated."""
    cos, sin = rope_table(np.zeros((1, 1)), 2, 6, AXES, THETA, (1, 1, cells / 2))
    assert cos.shape == (1, 2 * columns, 5)
    ours = np.asarray(cos + 1j * sin)[0, :columns, 3:]
    of_cells = np.stack([phases(min(c, 11) / 2 - 0.25, 4) for c in range(cells * columns)])
    np.testing.assert_allclose(ours, of_cells.reshape(columns, cells, 2).mean(1), atol=1e-6)


def test_two_cells_point_the_way_of_their_patch() -> None:
    cos, sin = rope_table(np.zeros((1, 1)), 1, 3, AXES, THETA, (1, 1, 0.5))
    apart = np.asarray(cos + 1j * sin)[0, :, 3:].reshape(3, 2, 2).mean(1)
    whole = np.asarray([phases(patch, 4) for patch in range(3)])
    np.testing.assert_allclose(np.angle(apart / whole), 0, atol=1e-6)


def test_many_indices_have_the_mean_of_their_phases() -> None:
    counts = np.array([[1], [2], [3000]])
    first = np.array([[-1], [4], [-3000]])
    cos, sin = rope_table(first, 1, 1, AXES, THETA, counts=counts)
    ours = np.asarray(cos + 1j * sin)[:, 0, :1]
    expected = [
        np.mean([phases(i, 2) for i in range(a, a + n)], axis=0)
        for (a,), (n,) in zip(first, counts, strict=True)
    ]
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_cells_of_patches_are_pooled_before_tokens() -> None:
    """Five patches in cells of 2, of which two make a token: [[0, 1], [2, 3]], [[4, 4], again]."""
    cos, sin = rope_table(np.zeros((1, 4)), 5, 2, AXES, THETA, (2, 2, 2), cell=2)
    ours = np.asarray(cos + 1j * sin)[0].reshape(2, 2, 1, 5)
    rows = [np.mean([phases(i, 4) for i in range(4)], axis=0), phases(4, 4)]
    np.testing.assert_allclose(ours[0, :, 0, 1:3], rows, atol=1e-6)
