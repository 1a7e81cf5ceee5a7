"""One loaded bundle for the tests of the server."""

import pytest

from framepack_jax.server.model import ServedModel
from tests.fixtures.serving import random_model


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return random_model()
