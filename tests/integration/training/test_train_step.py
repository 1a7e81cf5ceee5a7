"""The program of a step, before it is compiled."""

import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from framepack_jax.training import flow_matching, train_step
from framepack_jax.training.config import LoRAConfig, OptimizerConfig
from framepack_jax.training.flow_matching_task import Networks
from tests.fixtures.training_steps import begin, changed, set_up


def products(jaxpr, times: int = 1) -> int:
    """FLOPs of all matrix products of a program, loops counted."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inner = math.prod(shape[i] for i in contracted)
            total += 2 * times * math.prod(eqn.outvars[0].aval.shape) * inner
            del batched
        inside = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    total += products(sub, inside)
    return total


def test_no_frozen_kernel_has_a_gradient(batches) -> None:
    """The backward pass of adapters has no product that makes something of a kernel's shape, and
    costs less than that of all parameters by one forward pass of the linear layers."""
    batch, costs, made = batches[0], {}, {}
    for trainable in ("all", "lora"):
        cfg = changed(trainable=trainable, lora=LoRAConfig(rank=1, alpha=1.0))
        setup, begun, frozen = begin(cfg)
        keys = flow_matching.sample_keys(jax.random.key(cfg.seed), batch.meta.element)

        def loss(params, setup=setup, frozen=frozen, keys=keys):
            sigmas = jnp.full(4, 0.5)
            networks = setup.merge(params, Networks(frozen, {}))
            return setup.losses(networks, batch, keys, sigmas).mean()

        program = jax.make_jaxpr(jax.value_and_grad(loss))(begun.params).jaxpr
        costs[trainable] = products(program)
        made[trainable] = outputs(program)
        if trainable == "lora":
            forward = products(jax.make_jaxpr(loss)(begun.params).jaxpr)
            blocks = [flatten_dict(frozen[name]) for name in ("double", "single")]
    kernels = {
        math.prod(leaf.shape[1:])
        for leaves in blocks
        for path, leaf in leaves.items()
        if path[-1] == "kernel" and "mod" not in path[-2]
    }
    assert kernels <= made["all"]
    assert not kernels & made["lora"]
    # At these sizes attention is more than half of a forward pass.
    assert costs["all"] - costs["lora"] > 0.35 * forward


def outputs(jaxpr) -> set[int]:
    """Sizes of the results of matrix products that sum over samples and tokens, as gradients of
    kernels are."""
    found = set()
    for eqn in jaxpr.eqns:
        dot = eqn.primitive.name == "dot_general"
        if dot and len(eqn.params["dimension_numbers"][0][0]) > 1:
            found.add(math.prod(eqn.outvars[0].aval.shape))
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    found |= outputs(sub)
    return found


def test_steps_and_learning_rate_are_not_in_the_program(batches) -> None:
    """So that a run that goes on with others compiles nothing."""
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batches[0])

    def program(**fields) -> str:
        setup = set_up(changed(**fields))
        arguments = setup.abstract, Networks(setup.frozen, {}), batch, train_step.RATE
        return train_step.jit_train_step(setup).lower(*arguments).as_text()

    other = OptimizerConfig(learning_rate=3e-5, warmup_steps=7, schedule="cosine")
    assert program() == program(steps=77, optimizer=other)
    assert program() != program(optimizer=OptimizerConfig(weight_decay=0.5))
