"""The dataset that the tests of loaders read."""

from tests.fixtures.loading import dataset as dataset
