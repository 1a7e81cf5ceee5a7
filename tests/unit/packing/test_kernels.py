"""Names and shapes of context kernels."""

import pytest

from framepack_jax import packing
from framepack_jax.packing import ScheduleError


@pytest.mark.parametrize(
    ("kernel", "embedded"),
    [
        ("k1", ("k1", 1)), ("k8", ("k8", 1)), ("k16", ("k8", 2)), ("k24", ("k8", 3)),
        ("k32", ("k8", 4)), ("k64h1w1", ("k64h1w1", 1)), ("k16h3w3", ("k16h3w3", 1)),
    ],
)  # fmt: skip
def test_kernels_beyond_the_largest_are_pooled_into_it(kernel, embedded) -> None:
    assert packing.embedding_kernel(kernel) == embedded


@pytest.mark.parametrize("kernel", ["k9", "k12", "k20", "k4h64w64", "k64h8w8"])
def test_a_kernel_that_no_weights_embed_is_named_where_it_is_parsed(kernel) -> None:
    with pytest.raises(ScheduleError, match=f"kernel {kernel}.*k16, k24, k32"):
        packing.parse(f"td_f4{kernel}_g9")
