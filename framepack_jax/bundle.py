"""A bundle: one folder with every network, tokenizer and setting that makes a video.

    bundle.json            the manifest below
    transformer/ vae/ ...  parameters, one orbax leaf per layer and tensor
    tokenizer/ tokenizer_2/ image_processor/   files of the transformers library

A role's path may point into another bundle, so that two transformers share their encoders.
`bundle.json` is written last: a folder without it is no bundle.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax import sharding
from framepack_jax.models import kinds, stack

FORMAT = 1
MANIFEST = "bundle.json"
ROLES = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
WRITE_CHUNK = 64 << 20


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
    are those of `framepack_jax.packing`.
    """

    roles: dict[str, Role]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    prompt_template: str
    schedule: str
    order: str


def write_params(path: epath.PathLike, leaves: Iterable[tuple[str, np.ndarray]]) -> Written:
    """Write (leaf path, array) pairs as one checkpoint, a few at a time.

    At most about `WRITE_CHUNK` bytes of arrays are held. The checkpoint appears at `path` when
    all is written, and never half.
    """
    path = _absolute(path)
    partial = path.parent / f"{path.name}.partial_save"
    for leftover in (path, partial):
        if leftover.exists():
            leftover.rmtree()
    path.parent.mkdir(parents=True, exist_ok=True)
    written, held, size, digest = 0, {}, 0, hashlib.sha256()
    for name, array in leaves:
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.reshape(-1).view(np.uint8))
        held[tuple(name.split("/"))] = array
        size += array.nbytes
        if size >= WRITE_CHUNK:
            ocp.partial.save(path, unflatten_dict(held))
            written, held, size = written + size, {}, 0
    if held:
        ocp.partial.save(path, unflatten_dict(held))
    ocp.partial.finalize(path)
    return Written(written + size, digest.hexdigest())


def write_manifest(root: epath.PathLike, manifest: Manifest) -> None:
    """Finish a bundle."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1)
    (epath.Path(root) / MANIFEST).write_text(text + "\n")


def read_manifest(root: epath.PathLike) -> Manifest:
    """Read and check `bundle.json`. Raises BundleError."""
    root = epath.Path(root)
    if not (root / MANIFEST).exists():
        raise BundleError(
            f"{root} is no bundle (it has no {MANIFEST}); make one with convert_weights.py, and if"
            " a conversion was interrupted, run it again"
        )
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
        return Manifest(**fields)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"bundle {root}: {MANIFEST} is damaged ({error}); convert again"
        ) from error


def role_config(manifest: Manifest, name: str) -> tuple[Any, Any]:
    """(module of the kind, its Config) of a role. Raises BundleError where it is absent."""
    if name not in manifest.roles:
        raise BundleError(
            f"the bundle has no {name}; make one that has it with: python convert_weights.py"
            f" --{name.replace('_', '-')} FILE_OR_FOLDER --encoders-from THIS_BUNDLE --output NEW"
        )
    role = manifest.roles[name]
    if role.kind not in kinds.KINDS:
        raise BundleError(f"{name} is of kind {role.kind!r}; known are {sorted(kinds.KINDS)}")
    model = kinds.KINDS[role.kind]
    return model, config_from_json(model.Config, role.config)


def config_from_json(config_class: type, fields: dict[str, Any]) -> Any:
    """A config dataclass from JSON fields; lists become tuples, unknown names are refused."""
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(set(fields) - known):
        raise BundleError(f"{config_class.__qualname__}: unknown fields {unknown}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def load_params(
    root: epath.PathLike,
    manifest: Manifest,
    name: str,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> stack.Params:
    """Parameters of a role on the device, layers stacked; `dtype` None keeps what is stored.

    On a `mesh` they are divided by the rules of their kind, and every device reads its slices only.
    Raises BundleError, ValueError where the mesh does not divide them.
    """
    model, cfg = role_config(manifest, name)
    path = _absolute(epath.Path(root) / manifest.roles[name].path)
    if not path.exists():
        raise BundleError(f"bundle {root}: the parameters of {name} are missing at {path}")
    _check_reference(root, path, manifest.roles[name])
    expected = kinds.abstract_leaves(manifest.roles[name].kind, cfg)
    tree = ocp.metadata(path).metadata
    stored = {"/".join(key): leaf for key, leaf in flatten_dict(tree).items()}
    if problems := _differences(expected, stored):
        raise BundleError(f"bundle {root}: {name} does not fit its config: {problems}")

    shardings = None if mesh is None else _shardings(model, cfg, mesh)
    wanted = None
    if shardings is not None:
        divided = _layer_shardings(expected, shardings, model.STACKS)
        wanted = unflatten_dict(
            {
                tuple(key.split("/")): jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=divided[key]
                )
                for key, leaf in stored.items()
            }
        )
    try:
        loaded = flatten_dict(ocp.load(path, wanted))
    except Exception as error:  # of many kinds, by what is damaged
        line = str(error).partition("\n")[0]
        raise BundleError(
            f"bundle {root}: the parameters of {name} cannot be read ({line}); convert again"
        ) from error
    leaves = {"/".join(key): leaf for key, leaf in loaded.items()}
    joined = stack.join(leaves, model.STACKS, list)
    if shardings is None:
        return jax.tree.map(lambda x: _place(x, dtype), joined, is_leaf=_is_layers)
    return jax.tree.map(
        lambda x, where: _place_divided(x, dtype, where), joined, shardings, is_leaf=_is_layers
    )


def _place(layers: list[np.ndarray] | np.ndarray, dtype: Any) -> jax.Array:
    """A leaf, or its layers stacked, on the device: put together on the host, piece by piece."""
    array = np.stack(layers) if isinstance(layers, list) else layers
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(dtype)
    return jax.device_put(array)


def _place_divided(
    layers: list[jax.Array] | jax.Array, dtype: Any, where: NamedSharding
) -> jax.Array:
    """A leaf, or its layers stacked, every device putting together what it has of them."""

    def put(*layers: jax.Array) -> jax.Array:
        array = jnp.stack(layers) if stacked else layers[0]
        floating = dtype is not None and jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(dtype) if floating else array

    stacked = isinstance(layers, list)
    return jax.jit(put, out_shardings=where)(*(layers if stacked else [layers]))


def _shardings(model: Any, cfg: Any, mesh: Mesh) -> stack.Params:
    """Where the parameters of a network lie on a mesh, layers stacked. Raises ValueError."""
    params = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    return sharding.shard(params, sharding.resolve(model.SHARDINGS, params), mesh)


def _layer_shardings(
    leaves: Iterable[str], shardings: stack.Params, stacks: Iterable[str]
) -> dict[str, NamedSharding]:
    """The same for the leaves on disk, each of one layer: without the axis of layers."""
    divided, stacks = {}, set(stacks)
    by_path = flatten_dict(shardings)
    for name in leaves:
        path = tuple(name.split("/"))
        where = by_path[path if path[0] not in stacks else (path[0], *path[2:])]
        spec = where.spec[1:] if path[0] in stacks else where.spec
        divided[name] = NamedSharding(where.mesh, PartitionSpec(*spec))
    return divided


def _check_reference(root: epath.PathLike, path: epath.Path, role: Role) -> None:
    """Raise BundleError where a network of another bundle is not the one that was pointed to."""
    if path.parent == _absolute(root) or not (path.parent / MANIFEST).exists():
        return
    there = read_manifest(path.parent).roles.get(path.name)
    if there and there.source.get("sha256") != role.source.get("sha256"):
        raise BundleError(
            f"bundle {root} points to {path}, which has been replaced by other weights since;"
            " convert again with --encoders-from"
        )


def _is_layers(x: Any) -> bool:
    return isinstance(x, list)


def _absolute(path: epath.PathLike) -> epath.Path:
    """A path as orbax takes it; those of object stores are absolute already."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def _differences(expected: dict[str, Any], stored: dict[str, Any]) -> str:
    parts = []
    if missing := sorted(expected.keys() - stored.keys()):
        parts.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if extra := sorted(stored.keys() - expected.keys()):
        parts.append(f"{len(extra)} unexpected ({', '.join(extra[:3])})")
    for key in sorted(expected.keys() & stored.keys()):
        if tuple(stored[key].shape) != expected[key].shape:
            parts.append(f"{key} is {tuple(stored[key].shape)}, expected {expected[key].shape}")
    return "; ".join(parts[:5])
