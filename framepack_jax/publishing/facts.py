"""Read from the files themselves what a model card states."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from framepack_jax import bundle, packing
from framepack_jax.conversion import inspect, lora_peft
from framepack_jax.conversion.weight_files import open_checkpoint
from framepack_jax.data.fingerprint import digest
from framepack_jax.publishing.artifact import Artifact

SCRATCH = "none: trained from random weights"


class Network(NamedTuple):
    """A network of a bundle: its role, its kind, the name of its source, and the model that it is
    derived from."""

    role: str
    kind: str
    source: str | None
    base: str | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the files record; None for what they do not.

    `base` is the model that the weights are derived from, `steps` the number of training steps,
    `dataset` the fingerprint of the samples, `clips` their number.
    """

    base: str | None = None
    schedule: str | None = None
    order: str | None = None
    steps: int | None = None
    dataset: str | None = None
    clips: int | None = None
    rank: str | None = None
    networks: tuple[Network, ...] = ()
    description: str = ""


def facts_of(artifact: Artifact) -> Facts:
    """Return what an artifact records. Raises ConversionError, BundleError."""
    if artifact.kind == "bundle":
        return _of_bundle(bundle.read_manifest(artifact.path))
    # The first line is the path.
    described = inspect.describe(artifact.files[0] if artifact.files else artifact.path)
    lines = "\n".join(line.strip() for line in described.splitlines()[1:])
    if artifact.kind == "network":
        return Facts(description=lines)
    return dataclasses.replace(_of_lora(artifact.files[0]), description=lines)


def _of_bundle(manifest: bundle.Manifest) -> Facts:
    networks = [
        Network(name, role.kind, _shown(role.source.get("name")), _base_of(role.source))
        for name, role in manifest.roles.items()
    ]
    main = next(iter(manifest.roles.values())).source
    training: dict[str, Any] = main.get("training") or {}
    samples = training.get("fingerprint")
    return Facts(
        base=_base_of(main),
        schedule=str(manifest.schedule),
        order=manifest.schedule.order,
        steps=training.get("step"),
        dataset=samples and digest(samples),
        clips=sum(samples["clips"].values()) if samples else None,
        networks=tuple(networks),
    )


def _base_of(source: dict[str, Any]) -> str | None:
    """Return the model that the weights of a role are derived from."""
    training = source.get("training")
    if training is None:
        return _shown(source.get("name"))
    return SCRATCH if training.get("began") == "scratch" else _shown(source.get("base"))


def _of_lora(file: Path) -> Facts:
    header = lora_peft.header_of(open_checkpoint(file))
    schedule, steps = header.get("framepack.schedule"), header.get("ss_steps", "")
    return Facts(
        base=_shown(header.get("framepack.base") or header.get("ss_sd_model_name")),
        schedule=schedule,
        order=_order_of(schedule),
        steps=int(steps) if steps.isdecimal() else None,
        dataset=header.get("framepack.dataset"),
        rank=header.get("framepack.rank") or header.get("ss_network_dim"),
    )


def _order_of(schedule: str | None) -> str | None:
    """Return the order that a schedule in a header names or implies."""
    try:
        return packing.parse(schedule).order if schedule else None
    except ValueError:
        return None


def _shown(name: str | None) -> str | None:
    """Return the name of a source; of a path, the last part, which tells nothing of a machine."""
    if name is None or not name.startswith(("/", "~", "gs://", "s3://")):
        return name
    return name.rstrip("/").rpartition("/")[2]
