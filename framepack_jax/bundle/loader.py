"""Load the parameters of a bundle, a few leaves at a time, onto one device or a mesh."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax.bundle import contexts
from framepack_jax.bundle.manifest import (
    BundleError,
    Manifest,
    absolute,
    check_reference,
    read_manifest,
    referenced,
    role_config,
    sampling_roles,
)
from framepack_jax.models import offload, quantization, registry
from framepack_jax.models.network_spec import NetworkSpec
from framepack_jax.models.params import Params, stack_layers
from framepack_jax.parallel import sharding
from framepack_jax.utils.messages import first_line

# Bytes of arrays on the host at a time, in `read_leaves` and when loading onto a device.
READ_CHUNK, LOAD_CHUNK = 1 << 29, 1 << 30


def stored_dtypes(root: epath.PathLike, manifest: Manifest, name: str) -> dict[str, str]:
    """Return the dtype name of every stored leaf of a role, by path. Raises BundleError."""
    _, stored = _opened(root, manifest, name)
    return {path: str(leaf.dtype) for path, leaf in stored.items()}


def stored_bytes(root: epath.PathLike, manifest: Manifest, name: str) -> int:
    """Return the size of a role's parameters in bytes. Raises BundleError."""
    _, stored = _opened(root, manifest, name)
    return sum(map(_nbytes, stored.values()))


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def read_leaves(
    root: epath.PathLike, manifest: Manifest, name: str, leaves: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield path and array of these leaves of a role, in this order and in their stored types.

    About `READ_CHUNK` bytes are read at a time. Raises BundleError.
    """
    path, stored = _opened(root, manifest, name)
    for keys in _batches(([leaf] for leaf in leaves), stored, READ_CHUNK):
        loaded = _load(root, name, path, {key: stored[key] for key in keys})
        # Drop the reference, so that the caller can free each array.
        yield from ((key, loaded.pop(key)) for key in keys)


def _batches(
    groups: Iterable[list[str]], stored: Mapping[str, Any], size: int
) -> Iterator[list[str]]:
    """Yield batches of whole groups of leaves, of about `size` bytes."""
    held: list[str] = []
    for group in groups:
        held += group
        if sum(_nbytes(stored[leaf]) for leaf in held) >= size:
            yield held
            held = []
    if held:
        yield held


def load_params(
    root: epath.PathLike,
    manifest: Manifest,
    name: str,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> Params:
    """Load the parameters of a role onto the device, layers stacked.

    On a mesh, parameters are sharded by the rules of their network, and every device holds its
    shards only. The host holds about `LOAD_CHUNK` bytes, or one leaf with all its layers, at a
    time.

    Args:
        root: Folder of the bundle.
        manifest: Its manifest.
        name: The role.
        dtype: Type of floating-point parameters; None keeps the stored types.
        mesh: Mesh of devices; None uses the default device.

    Raises BundleError, or ValueError if the mesh does not divide the parameters.
    """
    reader = _Reader.open(root, manifest, name, dtype, mesh)
    return reader.stacked(reader.stored)


def load_offloaded(
    root: epath.PathLike,
    manifest: Manifest,
    name: str,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    resident: int = 0,
    hosted: int | None = None,
) -> Params:
    """Load the parameters of a role like `load_params`, with the large stacks of the network
    (`offloadable` of its spec) as `offload.OffloadedLayers`.

    The first `resident` layers stay on the device and the next `hosted` layers (default: all) in
    host memory. Other layers stay on the disk, and are read at every use. The host holds at most
    one layer more than those.
    """
    reader = _Reader.open(root, manifest, name, dtype, mesh)
    spec, cfg = role_config(manifest, name)
    whole = [key for key in reader.stored if key.split("/")[0] not in spec.offloadable]
    params = reader.stacked(whole)
    for part in spec.offloadable:
        count, read = getattr(cfg, spec.stacks[part]), functools.partial(reader.layer, part)
        here = min(resident, count)
        there = count - here if hosted is None else min(hosted, count - here)
        layers = [offload.on_device(read(i)) for i in range(here)]
        layers += [offload.on_host(read(i)) for i in range(here, here + there)]
        params[part] = offload.OffloadedLayers(offload.LazyLayers(layers, read, count))
        resident -= here
        hosted = None if hosted is None else hosted - there
    return params


class DeviceBytes(NamedTuple):
    """Bytes of a network on one device: of each offloadable layer, and of all other parameters.

    `largest` is the number of parameters of the largest offloadable layer, or of all parameters if
    there is no such layer. `quantized` is True if some parameters are quantized.
    """

    base: int
    layers: tuple[int, ...]
    largest: int
    quantized: bool = False


def device_bytes(
    root: epath.PathLike, manifest: Manifest, name: str, *, dtype: Any, mesh: Mesh | None = None
) -> DeviceBytes:
    """Return the bytes that the parameters of a role take on a device as `dtype`, sharded over the
    mesh if given.

    Raises BundleError, or ValueError if the mesh does not divide the parameters.
    """
    reader = _Reader.open(root, manifest, name, dtype, mesh)
    spec, _ = role_config(manifest, name)
    base, rest, layers, counts = 0, 0, Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for key, leaf in reader.wanted.items():
        part, number, *_ = path = key.split("/")
        shape = leaf.shape if mesh is None else leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape) * reader.dtype_of(path, leaf).itemsize
        if part in spec.offloadable:
            layers[part, number] += size
            counts[part, number] += math.prod(leaf.shape)
        else:
            base, rest = base + size, rest + math.prod(leaf.shape)
    order = sorted(layers, key=lambda layer: (spec.offloadable.index(layer[0]), layer[1]))
    quantized = any(map(_is_quantized, reader.wanted.values()))
    largest = max(counts.values(), default=rest)
    return DeviceBytes(base, tuple(layers[layer] for layer in order), largest, quantized)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """Reader of the parameters of a role.

    `stored` has shape and dtype of each leaf. `wanted` adds its sharding if there is a mesh.
    `divided` has the shardings of stacked leaves.
    """

    root: epath.PathLike
    name: str
    path: epath.Path
    stacks: Collection[str]
    dtype: Any
    stored: dict[str, Any]
    wanted: dict[str, Any]
    divided: dict[tuple[str, ...], NamedSharding] | None

    @classmethod
    def open(
        cls, root: epath.PathLike, manifest: Manifest, name: str, dtype: Any, mesh: Mesh | None
    ) -> "_Reader":
        """Open a role. Raises BundleError, or ValueError if the mesh does not divide it."""
        spec, cfg = role_config(manifest, name)
        path, stored = _opened(root, manifest, name)
        divided, wanted = None, stored
        if mesh is not None:
            divided = _shardings(spec, cfg, mesh, stored)
            by_layer = _layer_shardings(stored, divided, spec.stacks)
            wanted = {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_layer[key])
                for key, leaf in stored.items()
            }
        return cls(root, name, path, spec.stacks, dtype, stored, wanted, divided)

    def stacked(self, leaves: Iterable[str]) -> Params:
        """Load these leaves onto the device, layers stacked."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for key in leaves:
            groups.setdefault(_stacked(key, self.stacks), []).append(key)
        placed = {}
        for keys in _batches(groups.values(), self.stored, LOAD_CHUNK):
            loaded = self._load(keys)
            joined = flatten_dict(stack_layers(loaded, self.stacks, list))
            loaded.clear()
            for leaf in list(joined):
                # Drop each leaf once its layers are stacked, so that only one leaf is held twice.
                array = joined.pop(leaf)
                kept = self._dtype(leaf)
                placed[leaf] = (
                    _place(array, kept)
                    if self.divided is None
                    else _place_divided(array, kept, self.divided[leaf])
                )
        return unflatten_dict(placed)

    def layer(self, part: str, number: int) -> Params:
        """Read one layer of a stack as numpy arrays, or as JAX arrays if there is a mesh."""
        start = f"{part}/{number:02d}/"
        loaded = self._load([key for key in self.stored if key.startswith(start)])
        leaves = {tuple(key.removeprefix(start).split("/")): leaf for key, leaf in loaded.items()}
        return unflatten_dict({path: _as(leaf, self._dtype(path)) for path, leaf in leaves.items()})

    def dtype_of(self, path: Sequence[str], leaf: Any) -> np.dtype:
        """Return the dtype that a stored leaf has after loading."""
        kept = self._dtype(path)
        return jnp.dtype(leaf.dtype if kept is None or not _is_cast(leaf) else kept)

    def _load(self, keys: Iterable[str]) -> dict[str, Any]:
        return _load(self.root, self.name, self.path, {key: self.wanted[key] for key in keys})

    def _dtype(self, path: Sequence[str]) -> Any:
        """Return the dtype to cast a leaf to, None to keep it: scales of kernels stay float32."""
        return None if path[-1] == quantization.SCALE else self.dtype


def _opened(
    root: epath.PathLike, manifest: Manifest, name: str
) -> tuple[epath.Path, dict[str, Any]]:
    """Return the path of a role's parameters, and shape and dtype of every leaf there.

    Raises BundleError if the leaves do not fit the config.
    """
    _, cfg = role_config(manifest, name)
    path = _present(root, manifest, name)
    expected = registry.abstract_leaves(manifest.roles[name].kind, cfg)
    tree = contexts.metadata(path)
    stored = {"/".join(key): leaf for key, leaf in flatten_dict(tree).items()}
    if problems := _differences(expected, stored):
        raise BundleError(f"bundle {root}: {name} does not fit its config: {problems}")
    return path, stored


def check_present(root: epath.PathLike, roles: Iterable[str] | None = None) -> None:
    """Raise BundleError if a bundle lacks parameters of `roles`, by default those of sampling."""
    manifest = read_manifest(root)
    for name in sampling_roles(manifest) if roles is None else roles:
        role_config(manifest, name)
        _present(root, manifest, name)


def _present(root: epath.PathLike, manifest: Manifest, name: str) -> epath.Path:
    path = referenced(root, manifest.roles[name].path)
    if not path.exists():
        elsewhere = (
            "; they stay in another bundle: move both together, or convert again with"
            " --encoders-from"
        )
        raise BundleError(
            f"bundle {root}: the parameters of {name} are missing at {path}"
            f"{'' if path.parent == absolute(root) else elsewhere}"
        )
    check_reference(root, path, manifest.roles[name])
    return path


def _load(
    root: epath.PathLike, name: str, path: epath.Path, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the `wanted` leaves by path, as numpy arrays, or as JAX arrays if they have a sharding.

    Raises BundleError.
    """
    tree = unflatten_dict({tuple(key.split("/")): leaf for key, leaf in wanted.items()})
    try:
        with contexts.reading():
            loaded = flatten_dict(ocp.load(path, tree))
    except Exception as error:  # orbax raises many types, by what is damaged
        line = first_line(error)
        raise BundleError(
            f"bundle {root}: the parameters of {name} cannot be read ({line}); convert again"
        ) from error
    return {"/".join(key): leaf for key, leaf in loaded.items()}


def _place(layers: list[np.ndarray] | np.ndarray, dtype: Any) -> jax.Array:
    """Put a leaf, or its layers stacked on the host, onto the device."""
    array = np.stack(layers) if isinstance(layers, list) else layers
    return jax.device_put(_as(array, dtype))


def _as(array: Any, dtype: Any) -> Any:
    """Cast an array of floating-point numbers to `dtype`, unless that is None."""
    return array if dtype is None or not _is_cast(array) else array.astype(dtype, copy=False)


def _place_divided(
    layers: list[jax.Array] | jax.Array, dtype: Any, where: NamedSharding
) -> jax.Array:
    """Cast a leaf, or stack its layers; every device does so for its shards."""

    def put(*layers: jax.Array) -> jax.Array:
        return _as(jnp.stack(layers) if stacked else layers[0], dtype)

    stacked = isinstance(layers, list)
    return jax.jit(put, out_shardings=where)(*(layers if stacked else [layers]))


def _shardings(
    spec: NetworkSpec, cfg: Any, mesh: Mesh, stored: Iterable[str]
) -> dict[tuple[str, ...], NamedSharding]:
    """Return the sharding of stacked parameters by path; a scale is sharded as the outputs of its
    kernel. Raises ValueError."""
    params = spec.abstract_params(cfg)
    rules = sharding.resolve(spec.sharding_rules, params)
    shardings = flatten_dict(sharding.shard(params, rules, mesh))
    for leaf in stored:
        path = _stacked(leaf, spec.stacks)
        if path[-1] == quantization.SCALE:
            axes = tuple(shardings[(*path[:-1], "kernel")].spec)
            shardings[path] = NamedSharding(mesh, PartitionSpec(*axes[:1], *axes[2:]))
    return shardings


def _layer_shardings(
    leaves: Iterable[str],
    shardings: dict[tuple[str, ...], NamedSharding],
    stacks: Iterable[str],
) -> dict[str, NamedSharding]:
    """Return the shardings of stored leaves, which have no axis of layers."""
    divided = {}
    for name in leaves:
        path = _stacked(name, stacks)
        where = shardings[path]
        spec = where.spec[1:] if path[0] in stacks else where.spec
        divided[name] = NamedSharding(where.mesh, PartitionSpec(*spec))
    return divided


def _stacked(leaf: str, stacks: Iterable[str]) -> tuple[str, ...]:
    """Return the path with layers stacked: "double/07/mod/bias" -> ("double", "mod", "bias")."""
    path = tuple(leaf.split("/"))
    return (path[0], *path[2:]) if path[0] in stacks else path


def _is_quantized(leaf: Any) -> bool:
    return jnp.dtype(leaf.dtype).name in quantization.QUANTIZED


def _is_cast(leaf: Any) -> bool:
    """Return True if a leaf may be cast on loading."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and not _is_quantized(leaf)


def _differences(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """List missing, unexpected and misshapen leaves; a quantized kernel needs its scale."""
    expected = {path: leaf.shape for path, leaf in expected.items()}
    for path, leaf in stored.items():
        if _is_quantized(leaf) and path.endswith("/kernel") and path in expected:
            expected[path.removesuffix("kernel") + quantization.SCALE] = expected[path][1:]
    parts = []
    if missing := sorted(expected.keys() - stored.keys()):
        parts.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if extra := sorted(stored.keys() - expected.keys()):
        parts.append(f"{len(extra)} unexpected ({', '.join(extra[:3])})")
    for key in sorted(expected.keys() & stored.keys()):
        if tuple(stored[key].shape) != expected[key]:
            parts.append(f"{key} is {tuple(stored[key].shape)}, expected {expected[key]}")
    return "; ".join(parts[:5])
