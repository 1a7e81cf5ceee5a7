"""Train state: which parameters are trained, how they are initialised and sharded.

Trained parameters are float32 masters. The other parameters are frozen in the compute dtype; they
are not part of the state nor of checkpoints.
"""

import dataclasses
import functools
import re
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle
from framepack_jax.models import lora, lora_layers
from framepack_jax.models.network_spec import DenoiserSpec
from framepack_jax.models.params import merge_params, partition_params
from framepack_jax.parallel import sharding
from framepack_jax.training import draws, optimizer
from framepack_jax.training.config import LoRAConfig, RunConfig, TrainConfig

Params = dict[str, Any]
Leaf = TypeVar("Leaf")
# The embeddings that a base HunyuanVideo model does not have.
NEW_EMBEDDINGS = r"embed/(context_\w+|image_\w+)/\w+"


class TrainState(Generic[Leaf], struct.PyTreeNode):
    """State of a run between two steps: trained `params`, their moving average `ema` or None, and
    the number of updates that were skipped, in all and in a row.

    `Leaf` is jax.Array, jax.ShapeDtypeStruct (abstract) or PartitionSpec."""

    step: Leaf
    params: Params
    opt_state: Any
    ema: Params | None
    skipped: Leaf
    skipped_in_a_row: Leaf

    @property
    def updates(self) -> Any:
        """Number of updates that were made, as the optimizer counts them."""
        return self.step - self.skipped  # type: ignore[operator]


def ema_decay(cfg: RunConfig, updates: jax.Array) -> jax.Array | float:
    """Return the decay of the moving average in the update after `updates` others. With a warm-up
    it is min(ema, (1 + t) / (10 + t))."""
    if not cfg.ema_warmup:
        return cfg.ema
    return jnp.minimum(cfg.ema, (1.0 + updates) / (10.0 + updates))


def apply_gradients(
    state: TrainState[jax.Array],
    grads: Params,
    loss: jax.Array,
    tx: optax.GradientTransformationExtraArgs,
    ema: jax.Array | float,
    rate: jax.Array,
    limit: jax.Array | None = None,
) -> tuple[TrainState[jax.Array], jax.Array]:
    """Return (state after an update, norm of the gradient). If the loss or the gradient is not
    finite, or the norm exceeds `limit`, the update is skipped and counted. `ema` is the decay of
    the moving average, `rate` the learning rate."""
    norm = optax.tree.norm(grads)
    usable = jnp.isfinite(loss) & jnp.isfinite(norm)
    if limit is not None:
        usable &= norm <= limit
    updates, opt_state = tx.update(grads, state.opt_state, state.params, learning_rate=rate)
    params = optax.apply_updates(state.params, updates)
    average = state.ema and jax.tree.map(lambda e, p: ema * e + (1 - ema) * p, state.ema, params)
    kept = functools.partial(jnp.where, usable)
    new = TrainState(
        step=state.step + 1,
        params=jax.tree.map(kept, params, state.params),
        opt_state=jax.tree.map(kept, opt_state, state.opt_state),
        ema=jax.tree.map(kept, average, state.ema),
        skipped=state.skipped + ~usable,
        skipped_in_a_row=jnp.where(usable, 0, state.skipped_in_a_row + 1),
    )
    return new, norm


class Model(NamedTuple):
    """The trained network: the spec of its kind and its config."""

    spec: DenoiserSpec
    cfg: Any


def model_of(cfg: TrainConfig, manifest: bundle.Manifest) -> Model:
    """Return the transformer of a bundle, with the sizes in `cfg.network`, and causal if `cfg` says
    so. Raises BundleError, and ValueError if this trainer cannot train it as configured."""
    spec, config = bundle.denoiser_config(manifest)
    _check_objective(cfg, manifest, spec)
    if cfg.network:
        fields = dataclasses.asdict(config) | dict(cfg.network)
        config = bundle.config_from_json(type(config), fields)
    if cfg.causal:
        config = dataclasses.replace(config, causal=True)
    return Model(spec, config)


def _check_objective(cfg: TrainConfig, manifest: bundle.Manifest, spec: DenoiserSpec) -> None:
    """Raise ValueError if the network was trained for another task, or reads other captions."""
    if (stages := manifest.sampling.recipe.stages) > 1:
        raise ValueError(
            f"--trainable {cfg.trainable}: the bundle is sampled in {stages} stages of growing size"
            " (mid or distilled weights), whose noise levels are local to each stage; this trainer"
            " has no loss for them. Train the base model, and give its LoRA to sample.py"
        )
    tokens, read = cfg.data.text_tokens, manifest.text_tokens
    if spec.reads_padding and tokens not in (None, read):
        raise ValueError(
            f"--data.text-tokens {tokens}: this network reads captions with their padding, of"
            f" {read} tokens; leave the flag out"
        )


def abstract_params(cfg: TrainConfig, model: Model) -> tuple[Params, Params]:
    """Return the (trained, frozen) parameters of a run as `jax.ShapeDtypeStruct`s."""
    params = model.spec.abstract_params(model.cfg)
    trained, frozen = _partition(cfg, params)
    if cfg.trainable == "lora":
        targets = lora_targets(cfg.lora, model.spec)
        key = jax.random.key(0)
        factors = jax.eval_shape(lambda: init_lora(cfg.lora, targets, params, key))
        trained = merge_params(factors, trained)
    return _typed(trained, "float32"), _typed(frozen, cfg.dtype)


def _partition(cfg: TrainConfig, params: Params) -> tuple[Params, Params]:
    """Divide all parameters of a network into those that are trained in full, and the rest."""
    if cfg.trainable == "all":
        return params, {}
    if cfg.trainable == "lora" and not cfg.lora.context:
        return {}, params
    return partition_params(params, NEW_EMBEDDINGS)


def trains_embeddings(cfg: TrainConfig) -> bool:
    """Return True if a run trains the new embeddings in full, and freezes all other parameters."""
    return cfg.trainable == "context" or (cfg.trainable == "lora" and cfg.lora.context)


def lora_targets(cfg: LoRAConfig, spec: DenoiserSpec) -> str:
    """Return the regular expression of the layers that a LoRA adapts."""
    return spec.lora_targets if cfg.targets is None else cfg.targets


def _typed(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), params)


def factor_scale(cfg: TrainConfig) -> float:
    """Return the scale of adapters, alpha / rank, or 1 without adapters."""
    return cfg.lora.alpha / cfg.lora.rank if cfg.trainable == "lora" else 1.0


def init_lora(cfg: LoRAConfig, targets: str, params: Params, key: jax.Array) -> Params:
    """Return adapters of the layers `targets` that change nothing yet: `lora_a` (in, r) normal with
    variance 1 / in, `lora_b` (r, ...out) zero, with a layer axis in a stack. Raises ValueError if
    `targets`, a regular expression, matches no layer."""
    leaves = flatten_dict(params)
    # Kernels of stacks have a layer axis.
    layers = [p[:-1] for p, leaf in leaves.items() if p[-1] == "kernel" and leaf.ndim > 2]
    modules = [m for m in layers if re.fullmatch(targets, "/".join(m))]
    if not modules:
        raise ValueError(
            f"--lora.targets {targets!r} matches no linear layer of this network; it has"
            f" {', '.join(sorted('/'.join(m) for m in layers))}"
        )
    factors = {}
    for number, module in enumerate(sorted(modules)):
        count, inputs, *outputs = leaves[*module, "kernel"].shape
        draw = jax.random.normal(jax.random.fold_in(key, number), (count, inputs, cfg.rank))
        factors[*module, lora_layers.LORA_A] = draw * inputs**-0.5
        factors[*module, lora_layers.LORA_B] = jnp.zeros((count, cfg.rank, *outputs))
    return unflatten_dict(factors)


def partition_factors(trained: Params) -> tuple[Params, Params]:
    """Divide trained parameters into the factors of adapters, and those trained in full."""
    leaves = flatten_dict(trained)
    factors = {path for path in leaves if path[-1] in (lora_layers.LORA_A, lora_layers.LORA_B)}
    return (
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path in factors}),
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path not in factors}),
    )


def to_lora(cfg: TrainConfig, factors: Params) -> lora.LoRA:
    """Divide trained adapters into layers, as LoRA files store them."""
    leaves, adapters = flatten_dict(jax.device_get(factors)), {}
    for path, a in leaves.items():
        if path[-1] != lora_layers.LORA_A:
            continue
        b = leaves[*path[:-1], lora_layers.LORA_B]
        scale = np.full(a.shape[-1], factor_scale(cfg), np.float32)
        top, *rest = path[:-1]
        for i in range(len(a)):
            name = "/".join((top, f"{i:02d}", *rest, "kernel"))
            adapters[name] = lora.Factors(a[i], b[i], scale)
    return adapters


def abstract_state(
    cfg: TrainConfig,
    model: Model,
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh | AbstractMesh,
) -> tuple[TrainState[jax.ShapeDtypeStruct], Params]:
    """Return (state, frozen parameters) of a run as `jax.ShapeDtypeStruct`s with shardings."""
    trained, frozen = abstract_params(cfg, model)
    rules = (*model.spec.sharding_rules, *lora.SHARDINGS)
    specs = sharding.resolve(rules, trained)
    sharding.shard(trained, specs, mesh)
    opt_state = jax.eval_shape(tx.init, trained)
    opt_specs = optimizer.state_specs(opt_state, trained, specs)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(number, trained, opt_state, trained if cfg.ema else None, number, number)
    where = TrainState(
        PartitionSpec(), specs, opt_specs, specs if cfg.ema else None,
        PartitionSpec(), PartitionSpec(),
    )  # fmt: skip
    frozen_specs = sharding.resolve(rules, frozen)
    sharding.shard(frozen, frozen_specs, mesh)

    def place(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, state, where), jax.tree.map(place, frozen, frozen_specs)


def abstract_teacher(cfg: TrainConfig, trained: Params) -> Params:
    """Return what a teacher has beside the frozen parameters, as `jax.ShapeDtypeStruct`s: a copy of
    the parameters among `trained` that are trained in full, in the compute dtype. Without
    distillation, return nothing."""
    if not cfg.distill.steps:
        return {}
    _, own = partition_factors(trained)
    dtype = jnp.dtype(cfg.dtype)
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding), own)


def shardings(tree: Any) -> Any:
    """Return the shardings of the leaves of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_state(
    cfg: TrainConfig,
    model: Model,
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    params: Params,
) -> tuple[TrainState[jax.Array], Params]:
    """Return (state before the first step, frozen parameters). `params` are all parameters of the
    network, float32 if they are trained; the state takes over their memory."""
    trained, frozen = _partition(cfg, params)
    if cfg.trainable == "lora":
        key = jax.random.fold_in(jax.random.key(cfg.seed), draws.ADAPTERS)
        targets = lora_targets(cfg.lora, model.spec)
        abstract = abstract_state(cfg, model, tx, mesh)[0].params
        where = shardings(partition_factors(abstract)[0])
        draw = jax.jit(lambda: init_lora(cfg.lora, targets, params, key), out_shardings=where)
        trained = merge_params(draw(), trained)
    return with_params(cfg, model, tx, mesh, trained), frozen


def with_params(
    cfg: TrainConfig,
    model: Model,
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    trained: Params,
) -> TrainState[jax.Array]:
    """Return the state before the first step with these trained parameters."""
    where = shardings(abstract_state(cfg, model, tx, mesh)[0])
    opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(trained)
    zero = jax.jit(lambda: jnp.zeros([], jnp.int32), out_shardings=where.step)
    # A copy, as the step donates the memory of its state.
    copied = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=where.params)
    ema = copied(trained) if cfg.ema else None
    return TrainState(zero(), trained, opt_state, ema, zero(), zero())


def random_params(cfg: TrainConfig, model: Model, mesh: Mesh) -> Params:
    """Draw random parameters of the whole network, sharded on a mesh."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), draws.WEIGHTS)
    params = model.spec.abstract_params(model.cfg)
    where = sharding.shard(params, sharding.resolve(model.spec.sharding_rules, params), mesh)
    return jax.jit(lambda: model.spec.init(model.cfg, key), out_shardings=where)()
