"""A bundle: one folder with every network, tokenizer and setting that makes a video.

    bundle.json            the manifest below
    transformer/ vae/ ...  parameters, one orbax leaf per layer and tensor
    tokenizer/ tokenizer_2/ image_processor/   files of the transformers library

A role's path may point into another bundle, so that two transformers share their encoders.
`bundle.json` is written last: a folder without it is no bundle.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax.models import lora, registry, scan
from framepack_jax.packing.buckets import BUCKETS_480P
from framepack_jax.parallel import sharding

FORMAT = 1
MANIFEST = "bundle.json"
# A file that is there from the first write until the bundle is whole.
UNFINISHED = "unfinished"
ROLES = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
# Bytes of one partial save: each looks through all leaves that are there already.
WRITE_CHUNK = 1 << 29
LOAD_CHUNK = 1 << 30
# Leaves that are made while others are written.
AHEAD = 4
# Beyond any network.
MOST, MOST_LAYERS = 10**9, 1000
Item = TypeVar("Item")


class BundleError(ValueError):
    """A bundle that is missing, unfinished, of another format or without a needed part."""


class Written(NamedTuple):
    """Size and hash of a network's parameters: SHA-256 over names, types, shapes and values."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Role:
    """One network of a bundle: its kind (a key of `kinds.KINDS`), its config, where it lies, and
    where it came from, with the fields of `Written`."""

    kind: str
    config: dict[str, Any]
    path: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `bundle.json` says.

    `latent_mean` and `latent_std` hold one number a latent channel: the transformer sees
    (latent - mean) / std. `prompt_template` has one `{}` for the prompt. `schedule` and `order`
    are those of `framepack_jax.packing`. `buckets` are the sizes, (height, width) in pixels, that
    the transformer was trained at.
    """

    roles: dict[str, Role]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    prompt_template: str
    schedule: str
    order: str
    buckets: tuple[tuple[int, int], ...] = BUCKETS_480P


def write_params(path: epath.PathLike, leaves: Iterable[tuple[str, np.ndarray]]) -> Written:
    """Write (leaf path, array) pairs as one checkpoint, a few at a time.

    Leaves are made while the ones before are hashed and written; about twice `WRITE_CHUNK` bytes of
    arrays, and `AHEAD` leaves, are held. The checkpoint appears at `path` when all is written, and
    never half.
    """
    path = absolute(path)
    partial = path.parent / f"{path.name}.partial_save"
    for leftover in (path, partial):
        if leftover.exists():
            leftover.rmtree()
    path.parent.mkdir(parents=True, exist_ok=True)
    written, held, size, digest = 0, {}, 0, hashlib.sha256()
    with _uncompressed():
        writing = None
        try:
            for name, array in ahead(leaves):
                array = np.ascontiguousarray(array)
                digest.update(f"{name} {array.dtype} {array.shape} ".encode())
                digest.update(array.reshape(-1).view(np.uint8))
                held[tuple(name.split("/"))] = array.view(_Settled)
                size += array.nbytes
                if size >= WRITE_CHUNK:
                    _finish(writing)
                    writing = ocp.partial.save_async(path, unflatten_dict(held))
                    written, held, size = written + size, {}, 0
        finally:
            # Also where making leaves failed: a later attempt must not meet this one's writing.
            _finish(writing)
        if held:
            ocp.partial.save(path, unflatten_dict(held))
        ocp.partial.finalize(path)
    return Written(written + size, digest.hexdigest())


def ahead(items: Iterable[Item], count: int = AHEAD) -> Iterator[Item]:
    """The same items, made in a thread of its own while those before are dealt with, at most
    `count` of them at a time."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as maker:
        coming = deque(maker.submit(next, iterator, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(maker.submit(next, iterator, end))
            yield item


class _Settled(np.ndarray):
    """An array that nobody changes any more: orbax need not copy it before it writes, for which
    numpy would take longer than the disk, bfloat16 being new to it."""

    def __deepcopy__(self, memo: Any) -> "_Settled":
        return self


def _finish(writing: Any) -> None:
    if writing is not None:
        writing.result()


def _uncompressed() -> ocp.Context:
    """Weights hardly shrink, and compression takes three times as long as writing them."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


def write_manifest(root: epath.PathLike, manifest: Manifest) -> None:
    """Finish a bundle: the manifest is there whole, or not at all."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1)
    partial = epath.Path(root) / f".{MANIFEST}.partial"
    partial.write_text(text + "\n")
    partial.replace(epath.Path(root) / MANIFEST)


def read_manifest(root: epath.PathLike) -> Manifest:
    """Read and check `bundle.json`. Raises BundleError."""
    root = epath.Path(root)
    if not (root / MANIFEST).exists():
        raise BundleError(_what_it_is(root))
    try:
        fields = json.loads((root / MANIFEST).read_text())
        version = fields.pop("format")
        if version != FORMAT:
            raise BundleError(
                f"bundle {root} has format {version}, this version reads format {FORMAT};"
                " convert the weights again"
            )
        fields["roles"] = {name: Role(**role) for name, role in fields["roles"].items()}
        fields["latent_mean"] = tuple(fields["latent_mean"])
        fields["latent_std"] = tuple(fields["latent_std"])
        # Bundles of before had none.
        fields["buckets"] = _buckets(fields.get("buckets", BUCKETS_480P))
        return Manifest(**fields)
    except BundleError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"bundle {root}: {MANIFEST} is damaged ({error}); convert again"
        ) from error


def _what_it_is(root: epath.Path) -> str:
    """Describe a folder that is no bundle, and what to give in its place."""
    if (root / lora.FILE).exists():
        return (
            f"{root} holds a LoRA ({lora.FILE}) and no bundle; give the bundle that it was trained"
            f" from as --bundle, and beside it --lora {root / lora.FILE} to sample with it, or"
            " --init RUN to train on from its run"
        )
    if (root / "checkpoints").exists():
        return (
            f"{root} is a training run and no bundle; its model is {root / 'bundle'}, for --bundle,"
            f" or {root / 'bundle' / lora.FILE}, for --lora; framepack export-run {root} makes it"
        )
    return (
        f"{root} is no bundle (it has no {MANIFEST}); make one with convert_weights.py, and if"
        " a conversion was interrupted, run it again"
    )


def _buckets(fields: Any) -> tuple[tuple[int, int], ...]:
    """Raises TypeError, ValueError where these are no sizes."""
    sizes = tuple((int(height), int(width)) for height, width in fields)
    if not sizes or any(min(size) < 1 for size in sizes):
        raise ValueError(f"buckets {fields}: expected pairs of height and width")
    return sizes


def role_config(manifest: Manifest, name: str) -> tuple[Any, Any]:
    """(module of the kind, its Config) of a role. Raises BundleError where it is absent, or its
    config makes no network."""
    if name not in manifest.roles:
        raise BundleError(
            f"the bundle has no {name}; make one that has it with: python convert_weights.py"
            f" --{name.replace('_', '-')} FILE_OR_FOLDER --encoders-from THIS_BUNDLE --output NEW"
        )
    role = manifest.roles[name]
    if not isinstance(role.kind, str) or role.kind not in registry.KINDS:
        raise BundleError(f"{name} is of kind {role.kind!r}; known are {sorted(registry.KINDS)}")
    model = registry.KINDS[role.kind]
    cfg = config_from_json(model.Config, role.config)
    try:
        registry.abstract_leaves(role.kind, cfg)
    except Exception as error:  # of many kinds, by what does not go together
        line = str(error).partition("\n")[0]
        raise BundleError(
            f"{name}: its config in {MANIFEST} makes no network ({line}): {role.config}; convert"
            " again"
        ) from error
    return model, cfg


def config_from_json(config_class: type, fields: dict[str, Any]) -> Any:
    """A config dataclass from JSON fields; lists become tuples. Raises BundleError for unknown
    names, and numbers that are none, not above 0, or beyond all networks (counting to them would
    take forever)."""
    what = config_class.__qualname__
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    if not isinstance(fields, dict):
        raise BundleError(f"{what}: a JSON {type(fields).__name__}, expected an object")
    if unknown := sorted(set(fields) - defaults.keys()):
        raise BundleError(f"{what}: unknown fields {unknown}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    for name, value in values.items():
        if not _is_alike(value, defaults[name], MOST_LAYERS if "layers" in name else MOST):
            raise BundleError(
                f"{what}: {name} is {value!r:.60}; expected something like {defaults[name]!r}"
            )
    try:
        return config_class(**values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise BundleError(f"{what}: {error}") from error


def _is_alike(value: Any, default: Any, most: int) -> bool:
    """Whether a value is of the sort of a field's default."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_is_alike(v, default[0], most) for v in value)
    if isinstance(default, bool | str):
        return type(value) is type(default)
    if value is None:
        return True
    kinds_of = (int, float) if isinstance(default, float) else (int,)
    return type(value) in kinds_of and 0 < value <= most


def stored_dtypes(root: epath.PathLike, manifest: Manifest, name: str) -> dict[str, str]:
    """Path -> name of the dtype of every stored leaf of a role. Raises BundleError."""
    _, stored = _opened(root, manifest, name)
    return {path: str(leaf.dtype) for path, leaf in stored.items()}


def stored_bytes(root: epath.PathLike, manifest: Manifest, name: str) -> int:
    """Bytes of the parameters of a role. Raises BundleError."""
    _, stored = _opened(root, manifest, name)
    return sum(map(_nbytes, stored.values()))


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def read_leaves(
    root: epath.PathLike, manifest: Manifest, name: str, leaves: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of these leaves of a role, in this order, as they are stored, about
    `WRITE_CHUNK` bytes at a time. Raises BundleError."""
    path, stored = _opened(root, manifest, name)
    for keys in _batches(([leaf] for leaf in leaves), stored, WRITE_CHUNK):
        loaded = _load(root, name, path, {key: stored[key] for key in keys})
        # Each is let go of, so that what the reader is done with need not stay.
        yield from ((key, loaded.pop(key)) for key in keys)


def _batches(
    groups: Iterable[list[str]], stored: Mapping[str, Any], size: int
) -> Iterator[list[str]]:
    """Groups of leaves joined to about `size` bytes, none of them torn apart."""
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
) -> scan.Params:
    """Parameters of a role on the device, layers stacked; `dtype` None keeps what is stored.

    On a `mesh` they are divided by the rules of their kind, and every device holds its slices only.
    The host holds about `LOAD_CHUNK` bytes, or a leaf with all its layers, at a time. Raises
    BundleError, ValueError where the mesh does not divide them.
    """
    reader = _Reader.open(root, manifest, name, dtype, mesh)
    return reader.stacked(reader.stored)


def load_streamed(
    root: epath.PathLike,
    manifest: Manifest,
    name: str,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    resident: int = 0,
    hosted: int | None = None,
) -> scan.Params:
    """The same with the large stacks of the network (`STREAMED` of its kind) as `stack.Streamed`:
    their first `resident` layers on the device, the next `hosted`, by default all, in host memory.
    Others stay on the disk, and are read whenever they are needed.

    The host holds one layer beside those that stay there.
    """
    reader = _Reader.open(root, manifest, name, dtype, mesh)
    model, cfg = role_config(manifest, name)
    whole = [key for key in reader.stored if key.split("/")[0] not in model.STREAMED]
    params = reader.stacked(whole)
    for part in model.STREAMED:
        count, read = getattr(cfg, model.STACKS[part]), functools.partial(reader.layer, part)
        here = min(resident, count)
        there = count - here if hosted is None else min(hosted, count - here)
        layers = [scan.on_device(read(i)) for i in range(here)]
        layers += [scan.on_host(read(i)) for i in range(here, here + there)]
        params[part] = scan.Streamed(scan.Layers(layers, read, count))
        resident -= here
        hosted = None if hosted is None else hosted - there
    return params


class DeviceBytes(NamedTuple):
    """Bytes of a network on one device: of each layer that can be streamed, and of all else;
    `largest` is the number of parameters in the largest of those layers, of all parameters if there
    are none; `quantized` says if some are quantized."""

    base: int
    layers: tuple[int, ...]
    largest: int
    quantized: bool = False


def device_bytes(
    root: epath.PathLike, manifest: Manifest, name: str, *, dtype: Any, mesh: Mesh | None = None
) -> DeviceBytes:
    """What the parameters of a role take on a device, as `dtype`, divided over a mesh if there is
    one. Raises BundleError, ValueError where the mesh does not divide them."""
    reader = _Reader.open(root, manifest, name, dtype, mesh)
    model, _ = role_config(manifest, name)
    base, rest, layers, counts = 0, 0, Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for key, leaf in reader.wanted.items():
        part, number, *_ = path = key.split("/")
        shape = leaf.shape if mesh is None else leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape) * reader.dtype_of(path, leaf).itemsize
        if part in model.STREAMED:
            layers[part, number] += size
            counts[part, number] += math.prod(leaf.shape)
        else:
            base, rest = base + size, rest + math.prod(leaf.shape)
    order = sorted(layers, key=lambda layer: (model.STREAMED.index(layer[0]), layer[1]))
    quantized = any(map(_is_quantized, reader.wanted.values()))
    largest = max(counts.values(), default=rest)
    return DeviceBytes(base, tuple(layers[layer] for layer in order), largest, quantized)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """The parameters of a role on disk: `stored` has shape and dtype of each leaf, `wanted` what it
    is to be, with a sharding where there is a mesh; `divided` are those of stacked leaves."""

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
        """Raises BundleError, ValueError where the mesh does not divide them."""
        model, cfg = role_config(manifest, name)
        path, stored = _opened(root, manifest, name)
        divided, wanted = None, stored
        if mesh is not None:
            divided = _shardings(model, cfg, mesh, stored)
            by_layer = _layer_shardings(stored, divided, model.STACKS)
            wanted = {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_layer[key])
                for key, leaf in stored.items()
            }
        return cls(root, name, path, model.STACKS, dtype, stored, wanted, divided)

    def stacked(self, leaves: Iterable[str]) -> scan.Params:
        """These leaves on the device, layers stacked."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for key in leaves:
            groups.setdefault(_stacked(key, self.stacks), []).append(key)
        placed = {}
        for keys in _batches(groups.values(), self.stored, LOAD_CHUNK):
            loaded = self._load(keys)
            joined = flatten_dict(scan.join(loaded, self.stacks, list))
            loaded.clear()
            for leaf in list(joined):
                # Let go of once its layers are stacked: not all layers are there twice.
                array = joined.pop(leaf)
                kept = self._dtype(leaf)
                placed[leaf] = (
                    _place(array, kept)
                    if self.divided is None
                    else _place_divided(array, kept, self.divided[leaf])
                )
        return unflatten_dict(placed)

    def layer(self, part: str, number: int) -> scan.Params:
        """One layer of a stack: arrays of numpy, or of JAX where there is a mesh."""
        start = f"{part}/{number:02d}/"
        loaded = self._load([key for key in self.stored if key.startswith(start)])
        leaves = {tuple(key.removeprefix(start).split("/")): leaf for key, leaf in loaded.items()}
        return unflatten_dict({path: _as(leaf, self._dtype(path)) for path, leaf in leaves.items()})

    def dtype_of(self, path: Sequence[str], leaf: Any) -> np.dtype:
        """What a stored leaf becomes."""
        kept = self._dtype(path)
        return jnp.dtype(leaf.dtype if kept is None or not _is_cast(leaf) else kept)

    def _load(self, keys: Iterable[str]) -> dict[str, Any]:
        return _load(self.root, self.name, self.path, {key: self.wanted[key] for key in keys})

    def _dtype(self, path: Sequence[str]) -> Any:
        """What a leaf is to be, None as it is stored: scales of kernels stay in float32."""
        return None if path[-1] == scan.SCALE else self.dtype


def _opened(
    root: epath.PathLike, manifest: Manifest, name: str
) -> tuple[epath.Path, dict[str, Any]]:
    """Where the parameters of a role lie, and shape and dtype of every leaf there, which must be
    those of its config. Raises BundleError."""
    _, cfg = role_config(manifest, name)
    path = _present(root, manifest, name)
    expected = registry.abstract_leaves(manifest.roles[name].kind, cfg)
    tree = ocp.metadata(path).metadata
    stored = {"/".join(key): leaf for key, leaf in flatten_dict(tree).items()}
    if problems := _differences(expected, stored):
        raise BundleError(f"bundle {root}: {name} does not fit its config: {problems}")
    return path, stored


def check_present(root: epath.PathLike, roles: Iterable[str] = ROLES) -> None:
    """Raise BundleError where a bundle lacks the parameters of a role, without reading them."""
    manifest = read_manifest(root)
    for name in roles:
        role_config(manifest, name)
        _present(root, manifest, name)


def _present(root: epath.PathLike, manifest: Manifest, name: str) -> epath.Path:
    path = absolute(epath.Path(root) / manifest.roles[name].path)
    if not path.exists():
        elsewhere = (
            "; they stay in another bundle: move both together, or convert again with"
            " --encoders-from"
        )
        raise BundleError(
            f"bundle {root}: the parameters of {name} are missing at {path}"
            f"{'' if path.parent == absolute(root) else elsewhere}"
        )
    _check_reference(root, path, manifest.roles[name])
    return path


def _load(
    root: epath.PathLike, name: str, path: epath.Path, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The leaves that are `wanted`, by path: arrays of numpy, or where a sharding is given, of
    JAX. Raises BundleError."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    tree = unflatten_dict({tuple(key.split("/")): leaf for key, leaf in wanted.items()})
    try:
        with context:
            loaded = flatten_dict(ocp.load(path, tree))
    except Exception as error:  # of many kinds, by what is damaged
        line = str(error).partition("\n")[0]
        raise BundleError(
            f"bundle {root}: the parameters of {name} cannot be read ({line}); convert again"
        ) from error
    return {"/".join(key): leaf for key, leaf in loaded.items()}


def _place(layers: list[np.ndarray] | np.ndarray, dtype: Any) -> jax.Array:
    """A leaf, or its layers stacked, on the device: put together on the host, piece by piece."""
    array = np.stack(layers) if isinstance(layers, list) else layers
    return jax.device_put(_as(array, dtype))


def _as(array: Any, dtype: Any) -> Any:
    """An array of floating-point numbers as `dtype`, unless that is None."""
    return array if dtype is None or not _is_cast(array) else array.astype(dtype, copy=False)


def _place_divided(
    layers: list[jax.Array] | jax.Array, dtype: Any, where: NamedSharding
) -> jax.Array:
    """A leaf, or its layers stacked, every device putting together what it has of them."""

    def put(*layers: jax.Array) -> jax.Array:
        return _as(jnp.stack(layers) if stacked else layers[0], dtype)

    stacked = isinstance(layers, list)
    return jax.jit(put, out_shardings=where)(*(layers if stacked else [layers]))


def _shardings(
    model: Any, cfg: Any, mesh: Mesh, stored: Iterable[str]
) -> dict[tuple[str, ...], NamedSharding]:
    """Path -> where the parameters of a network lie on a mesh, layers stacked; a scale lies as the
    outputs of its kernel do. Raises ValueError."""
    params = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    rules = sharding.resolve(model.SHARDINGS, params)
    shardings = flatten_dict(sharding.shard(params, rules, mesh))
    for leaf in stored:
        path = _stacked(leaf, model.STACKS)
        if path[-1] == scan.SCALE:
            axes = tuple(shardings[(*path[:-1], "kernel")].spec)
            shardings[path] = NamedSharding(mesh, PartitionSpec(*axes[:1], *axes[2:]))
    return shardings


def _layer_shardings(
    leaves: Iterable[str],
    shardings: dict[tuple[str, ...], NamedSharding],
    stacks: Iterable[str],
) -> dict[str, NamedSharding]:
    """The same for the leaves on disk, each of one layer: without the axis of layers."""
    divided = {}
    for name in leaves:
        path = _stacked(name, stacks)
        where = shardings[path]
        spec = where.spec[1:] if path[0] in stacks else where.spec
        divided[name] = NamedSharding(where.mesh, PartitionSpec(*spec))
    return divided


def _stacked(leaf: str, stacks: Iterable[str]) -> tuple[str, ...]:
    """ "double/07/mod/bias" -> its path where layers are stacked, ("double", "mod", "bias")."""
    path = tuple(leaf.split("/"))
    return (path[0], *path[2:]) if path[0] in stacks else path


def reference(path: epath.PathLike, root: epath.PathLike) -> str:
    """How a bundle at `root` points to parameters at `path`: relative, but for object stores."""
    if "://" in f"{path}{root}":
        return str(path)
    return os.path.relpath(os.path.realpath(path), os.path.realpath(root))


def _check_reference(root: epath.PathLike, path: epath.Path, role: Role) -> None:
    """Raise BundleError where a network of another bundle is not the one that was pointed to."""
    if path.parent == absolute(root):
        return
    if not (path.parent / MANIFEST).exists():
        raise BundleError(
            f"bundle {root} points to {path}, in a folder that is no whole bundle (it has no"
            f" {MANIFEST}); finish its conversion, or convert this one again with --encoders-from"
        )
    there = read_manifest(path.parent).roles.get(path.name)
    if there and there.source.get("sha256") != role.source.get("sha256"):
        raise BundleError(
            f"bundle {root} points to {path}, which has been replaced by other weights since;"
            " convert again with --encoders-from"
        )


def _is_quantized(leaf: Any) -> bool:
    return jnp.dtype(leaf.dtype).name in scan.QUANTIZED


def _is_cast(leaf: Any) -> bool:
    """Whether a leaf's type may be another on the device."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and not _is_quantized(leaf)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path as orbax takes it; those of object stores are absolute already."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def _differences(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """What is missing, unexpected or misshapen; a quantized kernel comes with its scale."""
    expected = {path: leaf.shape for path, leaf in expected.items()}
    for path, leaf in stored.items():
        if _is_quantized(leaf) and path.endswith("/kernel") and path in expected:
            expected[path.removesuffix("kernel") + scan.SCALE] = expected[path][1:]
    parts = []
    if missing := sorted(expected.keys() - stored.keys()):
        parts.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if extra := sorted(stored.keys() - expected.keys()):
        parts.append(f"{len(extra)} unexpected ({', '.join(extra[:3])})")
    for key in sorted(expected.keys() & stored.keys()):
        if tuple(stored[key].shape) != expected[key]:
            parts.append(f"{key} is {tuple(stored[key].shape)}, expected {expected[key]}")
    return "; ".join(parts[:5])
