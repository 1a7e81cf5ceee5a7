"""Low-rank adapters (LoRA, arXiv 2106.09685): combine, attach to a network's kernels, merge.

A LoRA maps the path of a kernel of one layer, as "double/07/img_qkv/kernel", to its Factors, in
files and in training. `attach` stacks it into the parameters as the leaves `lora_a` and `lora_b`,
with which `lora_layers` computes x W + (x a) b. A compiled step takes them like any other weight,
so another LoRA of the same ranks needs no new program.

Shapes: r the rank, "in" and "out" those of the kernel (in, ...out).
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from framepack_jax.models import lora_layers, offload
from framepack_jax.models.lora_layers import LORA_A, LORA_B
from framepack_jax.models.params import Params
from framepack_jax.parallel import sharding
from framepack_jax.utils.messages import shorten

# Factors are small compared with kernels: every device holds both whole.
SHARDINGS = ((rf".*/({LORA_A}|{LORA_B})", ()),)
# The adapters of a training run, in its folder `bundle`.
FILE = "lora.safetensors"


class Factors(NamedTuple):
    """The change a diag(scale) b of one kernel: a (in, r), b (r, ...out), scale (r,), on the host.

    `scale` is alpha / rank times a weight, one number a rank because combined adapters have their
    own. It is separate from b, so that a LoRA is written bit for bit as it was read, and is
    multiplied in once, in float32, when factors are attached.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray

    @property
    def rank(self) -> int:
        return self.a.shape[1]


LoRA = dict[str, Factors]


def parse_weight(text: str) -> tuple[str, float]:
    """Parse a flag FILE or FILE:WEIGHT to (file, weight); the default weight is 1.

    FILE may be a training run (`file_of`). Raises ValueError if no file is named.
    """
    match = re.fullmatch(r"(.+?)(?::([-+]?(?:\d+\.?\d*|\.\d+)))?", text)
    if match is None:
        raise ValueError(f"LoRA {text!r}: expected FILE or FILE:WEIGHT, as style.safetensors:0.8")
    file, weight = match.groups("1")
    return file_of(file), float(weight)


def file_of(path: str | Path) -> str:
    """Return the file of adapters of a training run, named as RUN or RUN/bundle; any other path is
    returned as it is. Raises ValueError if the run has none."""
    folder = Path(path)
    for file in (folder / FILE, folder / "bundle" / FILE):
        if file.exists():
            return str(file)
    if (folder / "run.json").exists() and (folder / "checkpoints").exists():
        raise ValueError(
            f"{path} is a training run without {FILE}: if it trained adapters (--trainable lora),"
            f" make it with framepack export-run {path}; any other run has a model, for --bundle"
        )
    return str(path)


def combine(loras: Iterable[tuple[Mapping[str, Factors], float]]) -> LoRA:
    """Combine several (LoRA, weight) by the sum of their changes, concatenating factors along r."""
    parts: dict[str, list[Factors]] = {}
    for lora, weight in loras:
        for path, factors in lora.items():
            parts.setdefault(path, []).append(factors._replace(scale=factors.scale * weight))
    return {path: _side_by_side(several) for path, several in parts.items()}


def _side_by_side(parts: list[Factors]) -> Factors:
    a, b, scale = zip(*parts, strict=True)
    scale = np.concatenate(scale)
    return Factors(np.concatenate(alike(a), axis=1), np.concatenate(alike(b)), scale)


def alike(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return arrays in one dtype: theirs, or float32 if they differ."""
    same = len({x.dtype for x in arrays}) == 1
    return list(arrays) if same else [x.astype(np.float32) for x in arrays]


def scaled(factors: Factors) -> np.ndarray:
    """Return diag(scale) b in float32."""
    scale = factors.scale.astype(np.float32)
    return factors.b.astype(np.float32) * scale.reshape(-1, *[1] * (factors.b.ndim - 1))


def attach(
    params: Params,
    lora: Mapping[str, Factors],
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Params:
    """Add a LoRA to parameters (layers stacked, arrays or `jax.ShapeDtypeStruct`s).

    Beside each kernel it puts the leaves `lora_a` (in, r) and `lora_b` (r, ...out) of `dtype`, with
    scale multiplied in and a leading layer axis in a stack. All layers of a stack get the largest
    of their ranks; factors are padded with zeros. On a `mesh` they are placed by SHARDINGS. Raises
    ValueError that names kernels that do not fit.
    """
    leaves = flatten_dict(params)
    shapes = flatten_dict(offload.stacked_shapes(params))
    _check(shapes, lora)
    groups: dict[tuple[str, ...], dict[int | None, Factors]] = {}
    for path, factors in lora.items():
        kernel, layer = _place(path)
        groups.setdefault(kernel[:-1], {})[layer] = factors
    added: dict[tuple[str, ...], np.ndarray] = {}
    for module, layers in groups.items():
        shape = shapes[*module, "kernel"].shape
        for name, array in zip((LORA_A, LORA_B), _stacked(layers, shape), strict=True):
            added[*module, name] = array.astype(dtype)
    offloaded = {n for n, leaf in params.items() if isinstance(leaf, offload.OffloadedLayers)}
    beside = {path: leaf for path, leaf in added.items() if path[0] not in offloaded}
    attached = unflatten_dict(leaves | flatten_dict(_on_devices(unflatten_dict(beside), mesh)))
    for name in offloaded:
        own = {path[1:]: leaf for path, leaf in added.items() if path[0] == name}
        attached[name] = _beside_layers(params[name], own, mesh)
    return attached


def _on_devices(factors: Params, mesh: Mesh | None) -> Params:
    if mesh is None:
        return jax.device_put(factors)
    specs = sharding.resolve(SHARDINGS, factors)
    return jax.device_put(factors, sharding.shard(factors, specs, mesh))


def _beside_layers(
    layers: offload.OffloadedLayers,
    factors: Mapping[tuple[str, ...], np.ndarray],
    mesh: Mesh | None,
) -> offload.OffloadedLayers:
    """Add stacked factors to every layer, in the memory of its kernels."""

    def beside(number: int, layer: Params) -> Params:
        own = unflatten_dict({path: leaf[number] for path, leaf in factors.items()})
        own = offload.put(_on_devices(own, mesh), _memory_kind(layer))
        return unflatten_dict(flatten_dict(layer) | flatten_dict(own))

    return layers.map(beside)


def _memory_kind(layer: Params) -> str:
    """Return the memory of a layer; for a layer just read from disk, the device, where it goes."""
    leaf = jax.tree.leaves(layer)[0]
    kind = leaf.sharding.memory_kind if isinstance(leaf, jax.Array) else None
    return kind or "device"


def _place(path: str) -> tuple[tuple[str, ...], int | None]:
    """ "double/07/img_qkv/kernel" -> (("double", "img_qkv", "kernel"), 7); no layer, None."""
    first, second, *rest = path.split("/")
    return ((first, *rest), int(second)) if second.isdigit() else ((first, second, *rest), None)


def _check(leaves: Mapping[tuple[str, ...], Any], lora: Mapping[str, Factors]) -> None:
    if any(path[-1] == LORA_A for path in leaves):
        raise ValueError("the parameters have a LoRA already; combine several before attaching")
    problems = []
    for path, factors in lora.items():
        kernel, layer = _place(path)
        shape = leaves[kernel].shape if kernel in leaves else ()
        if layer is not None:
            shape = shape[1:] if layer < next(iter(shape), 0) else ()
        if not shape:
            problems.append(f"{path}: the network has no such kernel")
        elif (factors.a.shape[0], *factors.b.shape) != (shape[0], factors.rank, *shape[1:]):
            problems.append(
                f"{path}: a {factors.a.shape} and b {factors.b.shape} do not make {shape}"
            )
    if problems:
        listed = shorten(problems, separator="\n  ")
        raise ValueError(
            f"{len(problems)} of {len(lora)} kernels of the LoRA do not fit the network; is it of"
            f" this model?\n  {listed}"
        )


def _stacked(
    layers: Mapping[int | None, Factors], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of a kernel of this shape in float32; layers without factors get zeros."""
    rank = max(factors.rank for factors in layers.values())
    count = () if None in layers else shape[:1]
    inputs, *outputs = shape[len(count) :]
    a = np.zeros((*count, inputs, rank), np.float32)
    b = np.zeros((*count, rank, *outputs), np.float32)
    for layer, factors in layers.items():
        here = () if layer is None else layer
        a[here][:, : factors.rank] = factors.a
        b[here][: factors.rank] = scaled(factors)
    return a, b


def extract(params: Params) -> LoRA:
    """Return the LoRA in parameters, layer by layer, with scale 1.

    It inverts `attach` up to the rank: ranks and layers with zeros in both factors are dropped.
    """
    lora: LoRA = {}
    for (*module, name), a in sorted(flatten_dict(params).items()):
        if name != LORA_A:
            continue
        leaves = functools.reduce(lambda tree, part: tree[part], module, params)
        a, b = jax.device_get((a, leaves[LORA_B]))
        first, *rest = module
        if a.ndim == 2:
            lora |= _nonzero("/".join((*module, "kernel")), a, b)
        else:
            for i in range(len(a)):
                lora |= _nonzero("/".join((first, f"{i:02d}", *rest, "kernel")), a[i], b[i])
    return lora


def _nonzero(path: str, a: np.ndarray, b: np.ndarray) -> LoRA:
    used = a.any(axis=0) | b.any(axis=tuple(range(1, b.ndim)))
    if not used.any():
        return {}
    return {path: Factors(a[:, used], b[used], np.ones(used.sum()))}


def merge(params: Params, *, donate: bool = False) -> Params:
    """Merge attached factors into their kernels: W + a b.

    Computed in float32, one layer at a time, and rounded to the kernel's dtype. Other leaves pass
    through. With `donate` the kernels of `params` are changed in place and invalid afterwards, as a
    network that fills most of a device needs. Raises ValueError if a kernel is quantized, before
    any is changed.
    """
    offloaded = [leaf for leaf in params.values() if isinstance(leaf, offload.OffloadedLayers)]
    for part in (params, *(leaf.layers[0] for leaf in offloaded)):
        leaves = flatten_dict(part)
        for *module, name in leaves:
            if name == LORA_A:
                lora_layers.check_mergeable(leaves[*module, "kernel"])
    return dict(_merged(params, donate))


def _merged(params: Mapping[str, Any], donate: bool) -> Iterator[tuple[str, Any]]:
    for name, leaf in params.items():
        if isinstance(leaf, offload.OffloadedLayers):
            yield name, leaf.map(lambda _, layer: _merged_layer(layer, donate))
        elif not isinstance(leaf, dict):
            yield name, leaf
        elif LORA_A not in leaf:
            yield name, dict(_merged(leaf, donate))
        else:
            kernel = jnp.asarray(leaf["kernel"])
            # Adding in place invalidates the kernel.
            own = kernel if donate else kernel.copy()
            summed = _add_layers(own, leaf[LORA_A], leaf[LORA_B])
            rest = {k: v for k, v in leaf.items() if k not in (LORA_A, LORA_B)}
            yield name, rest | {"kernel": jax.device_put(summed, kernel.sharding)}


def _merged_layer(layer: Params, donate: bool) -> Params:
    """Merge one layer on the device and return it to its memory."""
    kind = _memory_kind(layer)
    donate &= kind == "device"
    return jax.block_until_ready(offload.put(dict(_merged(offload.on_device(layer), donate)), kind))


@functools.partial(jax.jit, donate_argnames="kernel")
def _add_layers(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    def fold(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return lora_layers.merge_kernel({"kernel": kernel, LORA_A: a, LORA_B: b})["kernel"]

    if a.ndim == 2:
        return fold(kernel, a, b)
    return jax.lax.fori_loop(
        0, len(a), lambda i, kernel: kernel.at[i].set(fold(kernel[i], a[i], b[i])), kernel
    )
