"""Divide arrays over many devices: meshes, sharding rules for parameters, constraints.

A mesh has four axes:

    data      independent videos
    fsdp      also divides the batch; each weight is sharded and gathered for its use
    context   divides the tokens of one video
    tensor    divides attention heads and feed-forward width (Megatron-LM, arXiv 1909.08053)

Networks know no mesh. Each has a table of rules, (regular expression, axes), for its parameters;
its activations pass through `constrain`, which does nothing without a mesh. `with
jax.set_mesh(make_mesh(...))` sets one.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from framepack_jax.parallel import device_grid

AXES = ("data", "fsdp", "context", "tensor")
# Axes that divide a batch, and the tokens of a sample: if the batch is too small for `fsdp`, `fsdp`
# divides the tokens too.
BATCH = ("data", "fsdp")
TOKENS = ("context", "fsdp")
REST = -1

# Axes of one dimension: none, one, or several, the first dividing coarsest.
Axis = str | tuple[str, ...] | None
# (regular expression, one entry for each dimension); () replicates an array of any rank.
Rules = Sequence[tuple[str, tuple[Axis, ...]]]
REPLICATED: Rules = ((r".*", ()),)


def parse_mesh(text: str) -> dict[str, int]:
    """Parse sizes for `make_mesh` from a flag: "fsdp=4,context=2" -> {"fsdp": 4, "context": 2}.

    Raises ValueError if an axis is unknown or repeated, or if a size is neither a positive whole
    number nor -1, which takes all devices that the other axes leave.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (field.strip() for field in part.partition("="))
        if name not in AXES or name in sizes or not re.fullmatch(r"-1|0*[1-9]\d*", size):
            raise ValueError(
                f"mesh {text!r}: {part.strip()!r} is not AXIS=SIZE with an axis of"
                f" {', '.join(AXES)}, each at most once, and a size of 1 or more (or -1: all"
                " devices that the other axes leave); write for example fsdp=4,context=2"
            )
        sizes[name] = int(size)
    return sizes


def default_sizes(count: int, heads: int) -> dict[str, int]:
    """Return the sizes for `make_mesh` that divide ONE video over `count` devices best.

    `fsdp`, the largest power of two that divides both count and heads, divides weights, and
    attention by heads; `context`, the other devices, divides queries. If `context` would not
    divide the heads, it takes the part that does and `fsdp` the rest. `fsdp` is always a power of
    two: no other number divides the width of every network of a bundle (3 divides 3072, not 4096).

    Raises ValueError if count or heads is below 1, or if there are no such sizes.
    """
    if count < 1 or heads < 1:
        raise ValueError(f"{count} devices and {heads} heads: expected at least one of each")
    if heads % _odd(count):
        fits = ", ".join(str(n) for n in range(1, 2 * count) if heads % _odd(n) == 0)
        raise ValueError(
            f"{count} devices do not divide one video for a network of {heads} heads: counts that"
            f" do are {fits}; use as many devices, or several videos at once on a mesh with data"
        )
    fsdp = math.gcd(count, heads // _odd(heads))
    context = math.gcd(count // fsdp, heads)
    return {"fsdp": count // context, "context": context}


def _odd(n: int) -> int:
    """Return the largest odd divisor."""
    return n // (n & -n)


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh of `devices` (default: all of `jax.devices()`) with all four axes.

    One size may be -1: all devices that the others leave. `data` is divided over TPU slices or
    nodes first, then `context`; `fsdp` and `tensor` stay within one if they fit. Raises ValueError
    if the sizes do not multiply to the number of devices, or if the slices have other sizes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, context, tensor), strict=True))
    wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == REST]
    if len(open_axes) > 1 or any(size < 1 and size != REST for size in sizes.values()):
        raise ValueError(f"mesh {wanted}: sizes are 1 or more, and one of them may be -1")
    product = math.prod(size for size in sizes.values() if size != REST)
    if open_axes and len(devices) % product:
        raise ValueError(
            f"mesh {wanted}: {len(devices)} devices cannot be divided by {product}; change the"
            " sizes of the other axes"
        )
    sizes |= dict.fromkeys(open_axes, len(devices) // product)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {wanted}: the sizes multiply to {product}, but there are {len(devices)}"
            " devices; change the sizes, or pass the devices to use"
        )
    grid = device_grid.arrange(sizes, devices)
    # Auto: the compiler chooses shardings without a constraint (the default type is Explicit).
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resolve(rules: Rules, params: Any) -> Any:
    """Return the tree of `params` (arrays or `jax.ShapeDtypeStruct`s) as PartitionSpecs.

    A rule applies to the parameters whose whole path, as "double/img_qkv/kernel", it matches.
    Raises one ValueError that names all parameters without a rule, with several rules, or with a
    rule of another number of dimensions.
    """
    for pattern, axes in rules:
        _check_rule(pattern, axes)
    specs, problems = [], []
    for path, leaf in _leaves(params):
        matches = [rule for rule in rules if re.fullmatch(rule[0], path)]
        pattern, axes = matches[0] if matches else ("", ())
        if len(matches) != 1:
            named = ", ".join(repr(pattern) for pattern, _ in matches)
            problems.append(f"{path} {leaf.shape} has {len(matches)} rules {named}".rstrip())
        elif axes and len(axes) != len(leaf.shape):
            problems.append(f"{path} {leaf.shape}: rule {pattern!r} has {len(axes)} dimensions")
        specs.append(PartitionSpec(*axes))
    if problems:
        raise ValueError(
            "every parameter needs exactly one sharding rule; correct the table SHARDINGS of its"
            " network:\n  " + "\n  ".join(problems)
        )
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def shard(params: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return NamedShardings of `params` (arrays or `jax.ShapeDtypeStruct`s) by `resolve`'s specs.

    Raises ValueError that names every parameter with a dimension that its axes do not divide;
    no parameter is replicated silently.
    """
    _check_mesh(mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)
    problems = []
    for (path, leaf), sharding in zip(_leaves(params), jax.tree.leaves(shardings), strict=True):
        for dimension, axis in enumerate(sharding.spec):
            sizes = {name: mesh.shape[name] for name in _names([axis])}
            if leaf.shape[dimension] % math.prod(sizes.values()):
                problems.append(_indivisible(path, leaf.shape, dimension, sizes, mesh.size))
    if problems:
        raise ValueError(
            "the mesh does not divide these parameters; choose other sizes of its axes:\n  "
            + "\n  ".join(problems)
        )
    return shardings


def device_bytes(params: Any, shardings: Any) -> int:
    """Return the bytes of `params` (arrays or `jax.ShapeDtypeStruct`s) on one device."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in leaves
    )


def placed_bytes(params: Any) -> int:
    """Return the bytes on one device of arrays, or of `jax.ShapeDtypeStruct`s, with shardings."""
    return device_bytes(params, jax.tree.map(lambda leaf: leaf.sharding, params))


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Ask the compiler to divide x over these mesh axes, one entry for each of its dimensions.

    The entry `BATCH` divides a batch over the axes that divide it exactly (`dividing`). If another
    dimension is too short for all its axes, the last ones are dropped; the others need not divide
    it, as the compiler pads. An axis named for several dimensions goes to the first that takes it.
    Without a mesh (`jax.set_mesh`) and outside of `jax.jit` it returns x. Raises ValueError, also
    without a mesh, for an unknown axis or another number of entries than dimensions.
    """
    _check_known("constrain", axes)
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} axes {axes} for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not isinstance(x, jax.core.Tracer):
        return x
    _check_mesh(mesh)
    return jax.lax.with_sharding_constraint(x, fitting(axes, x.shape, mesh))


def dividing(names: Iterable[str], length: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes, taken in order, that together divide the length; axes without a size
    are skipped."""
    taken: tuple[str, ...] = ()
    for name in names:
        if name in sizes and length % math.prod(sizes[a] for a in (*taken, name)) == 0:
            taken = (*taken, name)
    return taken


def fitting(
    axes: Iterable[Axis], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Return for each dimension its axes that are not taken yet.

    A batch gets the axes that divide it, as attention requires. Other dimensions get as many axes
    as leave no device empty.
    """
    taken: list[str] = []
    spec: list[Axis] = []
    for axis, length in zip(axes, shape, strict=True):
        names = [name for name in _names([axis]) if name not in taken]
        if axis == BATCH:
            names = list(dividing(names, length, mesh.shape))
        while math.prod(mesh.shape[name] for name in names) > length:
            names.pop()
        taken += names
        spec.append(tuple(names) or None)
    return PartitionSpec(*spec)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return (path, leaf) pairs, with paths like `double/img_qkv/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _names(axes: Iterable[Axis]) -> list[str]:
    """Return the mesh axes in the entries of some dimensions."""
    return list(
        itertools.chain.from_iterable(
            [axis] if isinstance(axis, str) else axis or () for axis in axes
        )
    )


def _check_known(where: str, axes: Iterable[Axis]) -> None:
    if unknown := [name for name in _names(axes) if name not in AXES]:
        raise ValueError(f"{where}: unknown mesh axes {unknown}; there are {', '.join(AXES)}")


def _check_rule(pattern: str, axes: tuple[Axis, ...]) -> None:
    _check_known(f"rule {pattern!r}", axes)
    if repeated := [name for name, count in Counter(_names(axes)).items() if count > 1]:
        raise ValueError(f"rule {pattern!r}: mesh axes {repeated} occur more than once")


def _check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError for a mesh with other axes or axis types than those of `make_mesh`."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types != dict.fromkeys(AXES, AxisType.Auto):
        there = ", ".join(f"{name} ({kind.name})" for name, kind in types.items())
        raise ValueError(
            f"a mesh with axes {there}; needed are {', '.join(AXES)}, all of type Auto: make it"
            " with sharding.make_mesh"
        )


def _indivisible(
    path: str, shape: tuple[int, ...], dimension: int, sizes: dict[str, int], devices: int
) -> str:
    length = shape[dimension]
    over = " x ".join(f"{name}={size}" for name, size in sizes.items())
    divisors = [str(n) for n in range(1, devices + 1) if length % n == 0]
    return (
        f"{path} {shape}: {over} does not divide dimension {dimension}, {length}"
        f" (of up to {devices}, {', '.join(divisors)} do)"
    )
