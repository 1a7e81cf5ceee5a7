"""Check that a run can resume, or start from another run."""

from collections.abc import Sequence

from framepack_jax.data.fingerprint import check_fingerprint
from framepack_jax.training import checkpoints
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import RunConfig, TrainConfig
from framepack_jax.training.task import Record
from framepack_jax.utils.compare import THEN_NOW, THERE_HERE, differences, flat

# Fields of the configuration that stay the same from the first step to the last.
FIXED = (
    "init", "network", "schedule", "trainable", "lora", "seed", "dtype", "guidance",
    "history", "noise_schedule", "causal", "distill",
)  # fmt: skip


def check_init(cfg: TrainConfig, record: Record, other: Record) -> None:
    """Raise RunError if the run with the record `other`, named by --init, trained other parameters
    than this run does."""
    names = ["network", "trainable"] + (["lora"] if cfg.trainable == "lora" else [])
    differing = _differing(other["config"], record["config"], names, THERE_HERE)
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
    then, now = old["config"], record["config"]
    names = [name for name in FIXED if name != "lora" or now["trainable"] == "lora"]
    names += ["ema"] if bool(then["ema"]) != bool(now["ema"]) else changed_warmup(then, now)
    if then["optimizer"]["name"] != now["optimizer"]["name"]:
        names.append("optimizer.name")
    differing = _differing(then, now, names, THEN_NOW)
    if old["weights"] != record["weights"]:
        differing.append("the transformer of the bundle")
    if old.get("codebook") != record.get("codebook"):
        differing.append("the entries of the codebook")
    raise_if_changed(cfg, differing)


def _differing(
    then: Record, now: Record, names: Sequence[str], words: tuple[str, str]
) -> list[str]:
    """Return a text for each setting that differs between two configurations, of those that are one
    of `names` or belong to it. Settings that an earlier version did not have are at their
    defaults."""
    before, after = flat(checkpoints.as_record(TrainConfig())) | flat(then), flat(now)
    compared = [n for n in before | after if n in names or n.partition(".")[0] in names]
    return differences(before, after, compared, words)


def changed_warmup(then: Record, now: Record) -> list[str]:
    """Return the name of the setting if moving averages of two configurations warm up unlike."""
    differs = then["ema"] and now["ema"] and then["ema_warmup"] != now["ema_warmup"]
    return ["ema_warmup"] if differs else []


def raise_if_changed(cfg: RunConfig, differing: list[str]) -> None:
    """Raise RunError that lists what differs from the run in --output."""
    if differing:
        raise RunError(
            f"{cfg.output} was started with other settings ({'; '.join(differing)}); resume with"
            f" those, or start another run from it: --output NEW --init {cfg.output}"
        )
