"""Batches that the tests of training steps read."""

from tests.fixtures.training_steps import batches as batches
