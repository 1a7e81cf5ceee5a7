"""A network of a bundle, as a pipeline holds it."""

from typing import Any, Generic, NamedTuple, TypeVar

from framepack_jax.models.network_spec import NetworkSpec

Spec = TypeVar("Spec", bound=NetworkSpec)


class Network(NamedTuple, Generic[Spec]):
    """A network of a bundle: the spec of its kind, its config, its parameters."""

    spec: Spec
    cfg: Any
    params: Any
