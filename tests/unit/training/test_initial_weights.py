"""Weights that training begins from."""

import dataclasses

import pytest

from framepack_jax import bundle
from framepack_jax.models import quantization
from framepack_jax.training.initial_weights import load_network
from tests.fixtures.training_steps import BASE, set_up


@pytest.mark.parametrize("dtype", quantization.QUANTIZED)
def test_quantized_weights_are_not_trained(monkeypatch, dtype) -> None:
    monkeypatch.setattr(bundle, "stored_dtypes", lambda *_: {"a": "bfloat16", "b": dtype})
    with pytest.raises(ValueError, match=f"bundle made keeps its transformer in {dtype}"):
        load_network(dataclasses.replace(set_up(BASE), bundle_path="made"))
