"""Check that a run can resume, or start from another run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from framepack_jax.data.fingerprint import check_fingerprint
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import HistoryConfig, LoRAConfig, RunConfig, TrainConfig
from framepack_jax.training.task import Record
from framepack_jax.utils.compare import THERE_HERE, differences

# Fields of the configuration that stay the same from the first step to the last.
FIXED = (
    "init", "network", "schedule", "trainable", "lora", "seed", "dtype", "guidance",
    "history_noise", "history", "noise_schedule",
)  # fmt: skip


def check_init(cfg: TrainConfig, record: Record, other: Record) -> None:
    """Raise RunError if the run with the record `other`, named by --init, trained other parameters
    than this run does."""
    names = ["network", "trainable"] + (["lora"] if cfg.trainable == "lora" else [])
    differing = differences(_current(other["config"]), record["config"], names, THERE_HERE)
    # If all parameters are trained, all come from the run.
    if cfg.trainable != "all" and other["weights"] != record["weights"]:
        differing.append("the transformer of the bundle")
    if differing:
        raise RunError(
            f"--init {cfg.init} differs from this run ({'; '.join(differing)}); give the same, or"
            " export that run (framepack export-run) and start from its bundle: --bundle"
        )


def check_same_run(cfg: TrainConfig, record: Record, old: Record) -> None:
    """Raise RunError or DatasetError if a run, with the record `old`, was started with another
    configuration or dataset."""
    check_fingerprint(old["fingerprint"], record["fingerprint"])
    then, now = _current(old["config"]), record["config"]
    names = [name for name in FIXED if name != "lora" or now["trainable"] == "lora"]
    names += ["ema"] if bool(then["ema"]) != bool(now["ema"]) else []
    if then["optimizer"]["name"] != now["optimizer"]["name"]:
        names.append("optimizer")
    differing = differences(then, now, names)
    if old["weights"] != record["weights"]:
        differing.append("the transformer of the bundle")
    raise_if_changed(cfg, differing)


def _current(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with the fields that earlier versions did not have."""
    history, adapters = (dataclasses.asdict(part()) for part in (HistoryConfig, LoRAConfig))
    return {
        **config,
        "history": config.get("history", history),
        "lora": adapters | config.get("lora", {}),
    }


def raise_if_changed(cfg: RunConfig, differing: list[str]) -> None:
    """Raise RunError that lists what differs from the run in --output."""
    if differing:
        raise RunError(
            f"{cfg.output} was started with other settings ({'; '.join(differing)}); resume with"
            f" those, or start another run from it: --output NEW --init {cfg.output}"
        )
