"""Fixtures of several files of integration tests."""

from tests.fixtures.loading import dataset as dataset
from tests.fixtures.preparing import fake_encoder as fake_encoder
