"""Records of runs that are resumed."""

import dataclasses

import pytest

from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.training import checkpoints, state
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import LoRAConfig, TrainConfig
from framepack_jax.training.resume_checks import check_init, check_same_run
from framepack_jax.training.task import Record

# Of the first versions, whose default it was.
TARGETS = r"(double|single)/(\w+_)?(qkv|out|mlp_in|mlp_out)"


def record_of(cfg: TrainConfig) -> Record:
    config = checkpoints.as_record(cfg)
    config["lora"]["targets"] = state.lora_targets(cfg.lora, TRANSFORMER)
    return {"config": config, "fingerprint": {}, "weights": "a"}


def test_a_run_of_an_earlier_version_is_the_same_run() -> None:
    """Its record has no history, nor embeddings that are trained beside adapters."""
    cfg = TrainConfig(trainable="lora")
    now, old = record_of(cfg), record_of(cfg)
    del old["config"]["history"], old["config"]["lora"]["context"]
    assert old["config"]["lora"] == {"rank": 32, "alpha": 32.0, "targets": TARGETS}
    check_same_run(cfg, now, old)
    check_init(cfg, now, old)


def test_other_adapters_are_another_run() -> None:
    cfg = TrainConfig(trainable="lora")
    old = record_of(cfg)
    other = dataclasses.replace(cfg, lora=LoRAConfig(context=True))
    for check in (check_same_run, check_init):
        with pytest.raises(
            RunError, match=r"\(lora.context = False (then|there), True (now|here)\)"
        ):
            check(other, record_of(other), old)
    # Settings of adapters that are not trained do not matter.
    whole = dataclasses.replace(other, trainable="all")
    check_same_run(whole, record_of(whole), record_of(dataclasses.replace(cfg, trainable="all")))
