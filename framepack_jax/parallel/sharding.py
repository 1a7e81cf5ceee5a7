"""Where arrays lie on many devices: meshes, tables of rules for parameters, constraints.

A mesh has four axes:

    data      independent videos
    fsdp      also divides the batch; each weight is kept in pieces and gathered where it is used
    context   divides the tokens of one video
    tensor    divides attention heads and feed-forward width (Megatron-LM, arXiv 1909.08053)

Networks know no mesh. Beside each stands a table of rules, (regular expression, axes), for its
parameters; what is computed in between passes through `constrain`, which does nothing where no
mesh is set. `with jax.set_mesh(make_mesh(...))` sets one.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")
# What divides a batch, and the tokens of a sample: where the batch is too small for `fsdp`, that
# divides the tokens as well.
BATCH = ("data", "fsdp")
TOKENS = ("context", "fsdp")
# Gathering weights moves more bytes than exchanging tokens for heads: `fsdp` stays within a node.
NEAREST_LAST = ("data", "context", "fsdp", "tensor")
REST = -1

# What divides one dimension: nothing, a mesh axis, or several, the first cutting coarsest.
Axis = str | tuple[str, ...] | None
# (regular expression, one entry for each dimension); () replicates whatever the dimensions are.
Rules = Sequence[tuple[str, tuple[Axis, ...]]]


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes for `make_mesh` from a flag: "fsdp=4,context=2" -> {"fsdp": 4, "context": 2}.

    Raises ValueError where an axis is unknown or there twice, or a size is no positive whole number
    (nor -1, which stands for all devices that the other axes leave).
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
    """Sizes for `make_mesh` that divide ONE video over `count` devices best.

    `fsdp`, the powers of two that count and heads share, divides weights, and attention by heads;
    what is left of the devices is `context`, which then divides queries. Where `context` would not
    divide the heads, it takes the part that does and `fsdp` the rest. `fsdp` is a power of two in
    any case: a width divides by no other number in every network of a bundle (3072 by 3, but 4096
    not).

    Raises ValueError where count or heads is below 1, and where there are no such sizes.
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
    """The largest odd divisor."""
    return n // (n & -n)


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of `devices` (default: all of `jax.devices()`), all four axes in it.

    One size may be -1: all devices that the others leave. Raises ValueError where the sizes do not
    multiply to the number of devices.
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
    # Some machines have no link pattern for a shape unless a physical axis serves two of the mesh.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes[name] for name in NEAREST_LAST), devices, allow_split_physical_axes=True
    )
    grid = grid.transpose([NEAREST_LAST.index(name) for name in AXES])
    # Auto: the compiler completes what constraints leave open (meshes are Explicit by default).
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resolve(rules: Rules, params: Any) -> Any:
    """The tree of `params` (arrays or `jax.ShapeDtypeStruct`s) with a PartitionSpec for each leaf.

    A rule speaks of the parameters whose whole path, as "double/img_qkv/kernel", its expression
    matches. Raises ValueError that names, all together, the parameters without a rule, with more
    than one, and with a rule of another number of dimensions.
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
            "every parameter needs exactly one sharding rule; mend the table SHARDINGS of its"
            " network:\n  " + "\n  ".join(problems)
        )
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def shard(params: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of `params` (arrays or `jax.ShapeDtypeStruct`s) by the specs of `resolve`.

    Raises ValueError that names every parameter with a dimension that its axes do not divide:
    nothing is replicated silently.
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
    """Bytes of `params` (arrays or `jax.ShapeDtypeStruct`s) that one device holds."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in leaves
    )


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Ask the compiler to divide x over these mesh axes, one entry for each of its dimensions.

    A batch, which is what the entry `BATCH` is for, goes to those axes that divide it exactly
    (`dividing`). Of several axes for another dimension, the last are left out where it is too short
    for all; those that remain may not divide it: the compiler pads. An axis named for several
    dimensions goes to the first that takes it. Without a mesh (`jax.set_mesh`) and outside of
    `jax.jit` this does nothing. Raises ValueError, mesh or not, for an unknown axis and where there
    are more or fewer entries than dimensions.
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
    """Those of the mesh axes, taken in order, that together divide the length; of axes that `sizes`
    does not name, none."""
    taken: tuple[str, ...] = ()
    for name in names:
        if name in sizes and length % math.prod(sizes[a] for a in (*taken, name)) == 0:
            taken = (*taken, name)
    return taken


def fitting(axes: Iterable[Axis], shape: tuple[int, ...], mesh: AbstractMesh) -> PartitionSpec:
    """For each dimension the axes that are not taken yet: of a batch those that divide it, as
    attention needs them; else as many as leave no device empty."""
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
    """(path, leaf) pairs; a path is as `double/img_qkv/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _names(axes: Iterable[Axis]) -> list[str]:
    """The mesh axes in the entries of some dimensions."""
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
        raise ValueError(f"rule {pattern!r}: mesh axes {repeated} are there more than once")


def _check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError for a mesh that this module would not have made."""
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
