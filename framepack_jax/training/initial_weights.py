"""Weights that a transformer starts its training from."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from framepack_jax import bundle
from framepack_jax.models.quantization import QUANTIZED
from framepack_jax.training import checkpoints, state
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.state import Params, TrainState

if TYPE_CHECKING:
    from framepack_jax.training.flow_matching_task import FlowMatchingTask


def first_state(task: "FlowMatchingTask") -> tuple[TrainState[jax.Array], Params, str]:
    """Return (state before the first step, frozen parameters, where they come from)."""
    cfg, model, tx, mesh = task.cfg, task.model, task.tx, task.mesh
    if cfg.init == "scratch":
        params = state.random_params(cfg, model, mesh)
        return *state.init_state(cfg, model, tx, mesh, params), "random weights"
    if cfg.init == "bundle":
        params = load_network(task)
        origin = f"the transformer of {task.bundle_path}"
        return *state.init_state(cfg, model, tx, mesh, params), origin
    run, step = checkpoints.parse_run(cfg.init)
    part = checkpoints.exported_part(checkpoints.read_record(run))
    trained = checkpoints.restore_params(run, step, task.abstract.params, part)
    frozen = load_frozen(task)
    return state.with_params(cfg, model, tx, mesh, trained), frozen, f"{run} at step {step}"


def load_network(task: "FlowMatchingTask") -> Params:
    """Load all parameters of the bundle's transformer, trained ones in float32.

    Raises RunError if they are quantized."""
    cfg, path, manifest = task.cfg, task.bundle_path, task.manifest
    stored = bundle.stored_dtypes(path, manifest, "transformer").values()
    if quantized := set(QUANTIZED).intersection(stored):
        raise RunError(
            f"bundle {path} keeps its transformer in {quantized.pop()}, and training takes"
            " weights of 16 or 32 bits; train from one that was converted without that --dtype"
        )
    dtype: str | None = "float32" if cfg.trainable == "all" else cfg.dtype
    if state.trains_embeddings(cfg):
        dtype = None  # trained embeddings and frozen weights have types of their own
    params = bundle.load_params(
        path, manifest, "transformer", dtype=dtype and jnp.dtype(dtype), mesh=task.mesh
    )
    if dtype is not None:
        return params
    wanted = flatten_dict(task.abstract.params) | flatten_dict(task.frozen)
    leaves = flatten_dict(params)
    return unflatten_dict({p: leaves[p].astype(wanted[p].dtype) for p in leaves})


def load_teacher(task: "FlowMatchingTask") -> Params:
    """Load the weights of a teacher that are trained in full here, as the run starts from them,
    always from their first place. Beside adapters they are the bundle's."""
    cfg, kept = task.cfg, flatten_dict(task.teacher)
    if not kept:
        return {}
    if cfg.init == "bundle" or cfg.trainable == "lora":
        params = bundle.load_params(
            task.bundle_path, task.manifest, "transformer", dtype=jnp.dtype(cfg.dtype),
            mesh=task.mesh,
        )  # fmt: skip
        leaves = flatten_dict(params)
        return unflatten_dict({path: leaves[path] for path in kept})
    run, step = checkpoints.parse_run(cfg.init)
    part = checkpoints.exported_part(checkpoints.read_record(run))
    return checkpoints.restore_params(run, step, task.teacher, part)


def load_frozen(task: "FlowMatchingTask") -> Params:
    """Load the frozen parameters alone, for a run whose trained ones come from a checkpoint."""
    if not jax.tree.leaves(task.frozen):
        return task.frozen
    kept = flatten_dict(task.frozen)
    leaves = flatten_dict(load_network(task))
    return unflatten_dict({path: leaves[path].astype(kept[path].dtype) for path in kept})
