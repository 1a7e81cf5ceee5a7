"""A method of an ablation. Imports no JAX, so that flags are parsed quickly."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of an ablation.

    Args:
        name: name in the tables.
        schedule: packing schedule; default: that of the common settings.
        train: settings of training that differ from the common ones, by the names of the flags of
            `framepack train`: {"history.noisy": "random"}.
        sample: keys of a row of `framepack evaluate --rows` that differ: {"cfg_scale": 2.0}.
    """

    name: str
    schedule: str | None = None
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sample: Mapping[str, Any] = dataclasses.field(default_factory=dict)
