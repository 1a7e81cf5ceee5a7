"""Batches and runs that the tests of training share."""

from tests.fixtures.training_steps import batches as batches
