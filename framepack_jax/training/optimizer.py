"""Optimizers and the sharding of their state.

Each optimizer is a chain of optax: clip by the global norm, the optimizer, decoupled weight decay
on matrices, the learning rate. The learning rate is an argument of the update, so the compiled step
depends neither on it nor on the number of steps. Statistics of a stack of layers are computed for
each layer.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from optax.contrib import MuonDimensionNumbers

from framepack_jax.models.lora_layers import LORA_A, LORA_B
from framepack_jax.training.config import OptimizerConfig

MATRICES = ("kernel", "embedding", LORA_A, LORA_B)
# Matrices that Muon does not train: embeddings, modulations, first and last layers.
NOT_HIDDEN = re.compile(r"^(embed|head)/|(mod|gate|conv_in|conv_out|quant|post_quant)/\w+$")
# Typical root mean square of Adam's updates (arXiv 2502.16982, section 2.2).
ADAM_RMS = 0.2
COSINE_END = 0.1
Params = dict[str, Any]


def make(cfg: OptimizerConfig, stacks: Iterable[str]) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of gradients into updates; its `update` takes `learning_rate`.
    `stacks` names the top-level entries of the parameters that have a layer axis."""
    match cfg.name:
        case "adamw":
            scale = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
        case "adam8bit":
            scale = scale_by_adam_8bit(cfg.b1, cfg.b2, cfg.eps)
        case "muon":
            scale = scale_by_muon(cfg.b1, cfg.b2, cfg.eps, stacks)
        case "adafactor":
            scale = per_layer(
                optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), stacks
            )
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        scale,
        optax.add_decayed_weights(cfg.weight_decay, mask=_matrices),
        _scale_by_learning_rate(),
    )


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    def init(params: Params) -> optax.ScaleByScheduleState:
        del params
        # Checkpoints store the number of updates here.
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        updates: Params, state: Any, params: Params | None = None, *, learning_rate: Any, **_: Any
    ) -> tuple[Params, Any]:
        del params
        scaled = jax.tree.map(lambda u: jnp.asarray(-learning_rate, u.dtype) * u, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def learning_rate(cfg: OptimizerConfig, steps: int) -> Callable[[int], np.float32]:
    """Return the function from a step (from 0) to the learning rate of a run of `steps`: linear
    warmup, then constant or half a cosine down to a tenth."""
    warm = min(cfg.warmup_steps, steps)

    def rate(step: int) -> np.float32:
        if step < warm:
            share = (step + 1) / warm
        elif cfg.schedule == "cosine":
            done = min(1.0, (step - warm) / max(1, steps - warm))
            share = COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * done)) / 2
        else:
            share = 1.0
        return np.float32(cfg.learning_rate * share)

    return rate


def _matrices(params: Params) -> Params:
    return unflatten_dict({path: path[-1] in MATRICES for path in flatten_dict(params)})


def per_layer(
    inner: optax.GradientTransformation, stacks: Iterable[str]
) -> optax.GradientTransformation:
    """Apply a transformation to each layer of the stacks separately, so that statistics do not mix
    layers. The state is {top-level name: state}, with a layer axis in a stack."""
    stacks = frozenset(stacks)

    def each(function: Any, name: str, *args: Any) -> Any:
        return jax.vmap(function)(*args) if name in stacks else function(*args)

    def init(params: Params) -> Params:
        return {name: each(inner.init, name, params[name]) for name in params}

    def update(updates: Params, state: Params, params: Params | None = None) -> Any:
        assert params is not None
        done = {
            name: each(inner.update, name, updates[name], state[name], params[name])
            for name in updates
        }
        return {n: new for n, (new, _) in done.items()}, {n: s for n, (_, s) in done.items()}

    return optax.GradientTransformation(init, update)


def scale_by_muon(
    b1: float, b2: float, eps: float, stacks: Iterable[str]
) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982): orthogonalised momentum for the matrices of hidden layers.

    Updates are scaled to the size of Adam's, so both take the same learning rates. All other
    parameters use Adam: embeddings, modulations, the head, biases and norms."""
    stacks = frozenset(stacks)

    def axes(params: Params) -> Params:
        leaves = flatten_dict(params)
        return unflatten_dict({p: _muon_axes(p, leaf, stacks) for p, leaf in leaves.items()})

    def labels(params: Params) -> Params:
        found = flatten_dict(axes(params))
        return unflatten_dict({p: "muon" if sides else "adam" for p, sides in found.items()})

    def as_adam(updates: Params, params: Params | None) -> Params:
        del params

        def scaled(x: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
            sides = (math.prod(x.shape[i] for i in side) for side in axes)
            return x * (ADAM_RMS * math.sqrt(max(sides)))

        return jax.tree.map(scaled, updates, axes(updates))

    orthogonal = optax.contrib.scale_by_muon(beta=b1, weight_dimension_numbers=axes)
    return optax.partition(
        {
            "muon": optax.chain(orthogonal, optax.stateless(as_adam)),
            "adam": optax.scale_by_adam(b1, b2, eps),
        },
        labels,
    )


def _muon_axes(path: tuple[str, ...], leaf: Any, stacks: frozenset[str]) -> Any:
    """Return the axes of a parameter that are the inputs and outputs of a matrix; other axes are
    batch axes. Returns None if it is not a matrix of a hidden layer, and masked nodes unchanged."""
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    if path[-1] not in MATRICES or NOT_HIDDEN.search("/".join(path)):
        return None
    first, last = int(path[0] in stacks), leaf.ndim - 1
    if path[-2].endswith("qkv") and path[-1] != LORA_A:
        # (inputs, 3, heads, width): one matrix each for queries, keys and values.
        return MuonDimensionNumbers((first,), tuple(range(first + 2, leaf.ndim)))
    # The taps of a convolution are inputs too.
    return MuonDimensionNumbers(tuple(range(first, last)), (last,))


class Quantized(NamedTuple):
    """A tensor in 8 bits, with the largest magnitude of each row (a row is along the last axis)."""

    codes: jax.Array
    peak: jax.Array


class Adam8bitState(NamedTuple):
    """Moments of `scale_by_adam_8bit`, each leaf a `Quantized`."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count; checkpoints hold this name
    mu: Params
    nu: Params


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) with moments stored in 8 bits, after arXiv 2110.02861.

    A code is the logarithm of a number's ratio to the largest of its row. Small numbers therefore
    keep their order of magnitude, and a positive second moment never becomes zero. Codes round up
    and down in turn: otherwise a moment that shrinks by less than one code would never shrink.
    """

    def init(params: Params) -> Adam8bitState:
        def zeros(dtype: Any) -> Params:
            return jax.tree.map(
                lambda p: Quantized(jnp.zeros(p.shape, dtype), jnp.zeros(p.shape[:-1])), params
            )

        return Adam8bitState(jnp.zeros([], jnp.int32), zeros(jnp.int8), zeros(jnp.uint8))

    def update(updates: Params, state: Adam8bitState, params: Params | None = None) -> Any:
        del params
        count = optax.safe_increment(state.count)

        def moved(g: jax.Array, m: Quantized, v: Quantized) -> tuple[Any, Any, Any]:
            mu = b1 * _number(m, FIRST) + (1 - b1) * g
            nu = b2 * _number(v, SECOND) + (1 - b2) * g * g
            step = (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            return step, _code(mu, FIRST, count), _code(nu, SECOND, count)

        leaves, tree = jax.tree.flatten(updates)
        moments = (
            jax.tree.leaves(m, is_leaf=lambda x: isinstance(x, Quantized))
            for m in (state.mu, state.nu)
        )
        parts = zip(*map(moved, leaves, *moments), strict=True)
        steps, mu, nu = (jax.tree.unflatten(tree, list(part)) for part in parts)
        return steps, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


class Coding(NamedTuple):
    """Codes 1 .. `levels` for ratios to the peak from 1 / `span` to 1, and code 0 for zero. Smaller
    ratios get code 0 if the coding is signed, and code 1 otherwise."""

    levels: int
    span: float
    signed: bool
    dtype: Any


FIRST = Coding(127, 1e6, True, jnp.int8)
SECOND = Coding(255, 1e12, False, jnp.uint8)
# Irrational strides, so that neighbours and successive steps round up and down in turn.
ALONG, PER_STEP = 0.7548776662466927, 0.6180339887498949


def _number(x: Quantized, coding: Coding) -> jax.Array:
    codes = x.codes.astype(jnp.float32)
    exponent = (jnp.abs(codes) - 1) / (coding.levels - 1) - 1
    share = jnp.where(codes == 0, 0, jnp.exp(exponent * math.log(coding.span)))
    return jnp.sign(codes) * share * x.peak[..., None]


def _code(x: jax.Array, coding: Coding, count: jax.Array) -> Quantized:
    peak = jnp.max(jnp.abs(x), axis=-1)
    share = jnp.abs(x) / jnp.where(peak > 0, peak, 1)[..., None]
    exponent = jnp.log(jnp.where(share > 0, share, 1)) / math.log(coding.span)
    code = 1 + (coding.levels - 1) * (1 + exponent)
    place = sum(
        jax.lax.broadcasted_iota(jnp.float32, x.shape, axis) * (ALONG ** (axis + 1) % 1)
        for axis in range(x.ndim)
    )
    turn = (place + count.astype(jnp.float32) * PER_STEP) % 1
    code = jnp.clip(jnp.floor(code + turn), 0 if coding.signed else 1, coding.levels)
    signed = jnp.sign(x) * code if coding.signed else jnp.where(x > 0, code, 0)
    return Quantized(signed.astype(coding.dtype), peak)


def state_specs(state: Any, params: Params, specs: Params) -> Any:
    """Return the PartitionSpec of each leaf of an optimizer's state.

    `state` and `params` are abstract (from `jax.eval_shape`); `specs` are the parameters'. A
    leaf is sharded as its parameter, without the axes that the statistic reduces. Scalars without a
    parameter are replicated. Raises ValueError if a leaf has another shape.
    """
    owners = {
        path: (leaf.shape, tuple(specs_leaf) + (None,) * (leaf.ndim - len(specs_leaf)))
        for (path, leaf), specs_leaf in zip(
            flatten_dict(params).items(), flatten_dict(specs).values(), strict=True
        )
    }
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree.unflatten(tree, [_spec_of(_names(path), leaf, owners) for path, leaf in leaves])


def _names(path: Iterable[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _spec_of(
    path: tuple[str, ...], leaf: Any, owners: Mapping[tuple[str, ...], Any]
) -> PartitionSpec:
    found = [owner for owner in owners if _is_within(owner, path)]
    if leaf.ndim == 0 or not found:
        if leaf.ndim > 1:
            name = "/".join(path)
            raise ValueError(f"optimizer state {name} {leaf.shape} belongs to no parameter")
        return PartitionSpec()
    shape, spec = owners[max(found, key=len)]
    if leaf.shape == shape:
        return PartitionSpec(*spec)
    for axes in itertools.combinations(range(len(shape)), leaf.ndim):
        if tuple(shape[axis] for axis in axes) == leaf.shape:
            return PartitionSpec(*(spec[axis] for axis in axes))
    # optax's placeholder for a tensor that is not factored: one number for each layer of a stack.
    if leaf.size in (1, shape[0]):
        return PartitionSpec()
    raise ValueError(
        f"optimizer state {'/'.join(path)} is {leaf.shape}, which is not a subset of the axes of"
        f" its parameter {shape}; its sharding is not known"
    )


def _is_within(owner: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Return True if a path contains the names of a parameter in their order."""
    rest = iter(path)
    return all(name in rest for name in owner)
