"""Bundles that are opened for sampling, and refusals."""

import pytest
from jax.sharding import AbstractMesh

from framepack_jax import bundle
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.parallel.sharding import AXES


def test_a_mesh_that_does_not_divide_the_heads_is_refused() -> None:
    sizes = {"tensor": 3}
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    with pytest.raises(ValueError, match=r"tensor=3 .* attention heads; tensor must be one of"):
        FramePack.open(bundle.resolve("tiny"), mesh=mesh)
