"""Shares of a batch by process."""

import jax

from framepack_jax.parallel import sharding
from framepack_jax.training.prefetch import local_share


def test_the_shares_of_one_process_are_whole() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert local_share(mesh, 8) == (0, 1)
