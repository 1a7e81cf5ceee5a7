"""Attention divided over a mesh of devices."""

import os
import subprocess
import sys

from tests.fixtures.paths import ROOT

ON_MESH = """
import functools
import jax, jax.numpy as jnp, numpy as np
from framepack_jax.ops import attention, splash
from framepack_jax.ops.causal_frames import TargetFrames, attend_by_frame
from framepack_jax.parallel import sharding

interpreted = functools.partial(splash.attend, interpret=True)
attention._FUSED = {"splash": attention._Fused("cpu", "cpu", splash.refusal, interpreted)}
q = jax.random.normal(jax.random.key(0), (2, 41, 6, 8))
k = jax.random.normal(jax.random.key(1), (2, 41, 3, 8))
valid = jnp.arange(41)[None, :] < jnp.array([[41], [17]])

def both(causal, q, k, valid):
    def loss(q, k):
        out = attention.attend(q, k, jnp.sin(k), valid, causal=causal)
        return jnp.sum(jnp.sin(jnp.where(valid[:, :, None, None], out, 0)))
    return jax.value_and_grad(loss, (0, 1))(q, k)

def exchanged(x):
    there = attention.to_heads(sharding.constrain(x, None, sharding.TOKENS, None, None))
    return there, attention.to_tokens(jnp.sin(there))

def check(expected, found, *case):
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        error = float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(a)))
        assert error < 1e-5, (case, error)

with attention.use("xla"):
    one = [jax.jit(functools.partial(both, causal))(q, k, valid) for causal in (False, True)]
CASES = (
    ({"fsdp": 2, "context": 3}, "splash", False),  # samples and key heads
    ({"data": 2, "context": 4}, "splash", False),  # samples and queries, padded
    ({"fsdp": 8}, "xla", False),  # queries alone
    ({"data": 4, "tensor": 2}, "xla", True),  # nothing: every device does it all
)
for sizes, kernel, causal in CASES:
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)), attention.use(kernel):
        found = jax.jit(functools.partial(both, causal))(q, k, valid)
    check(one[causal], found, sizes, kernel)

frames = TargetFrames(9, 3, 8)

def by_frame(q, k):
    def loss(q, k):
        out = attend_by_frame(q, k, jnp.sin(k), valid, None, frames)
        return jnp.sum(jnp.sin(jnp.where(valid[:, :, None, None], out, 0)))
    return jax.value_and_grad(loss, (0, 1))(q, k)

with attention.use("xla"):
    one = jax.jit(by_frame)(q, k)
for sizes in ({"fsdp": 2, "context": 3}, {"fsdp": 2, "context": 4}):
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)), attention.use("xla"):
        check(one, jax.jit(by_frame)(q, k), sizes, "by frame")

few = jax.random.normal(jax.random.key(3), (2, 7, 6, 8))

def prompt(q, k):
    def loss(q, k):
        return jnp.sum(jnp.sin(attention.attend(q, k, jnp.sin(k), local=True)))
    return jax.value_and_grad(loss, (0, 1))(q, k)

with attention.use("xla"):
    one = jax.jit(prompt)(q, few)
for sizes in ({"fsdp": 2, "context": 2, "tensor": 2}, {"context": 4}):
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)), attention.use("xla"):
        divided = jax.jit(prompt).lower(q, few).compile()
        check(one, divided(q, few), sizes, "local")
    assert "all-to-all" not in divided.as_text(), sizes

x = jax.random.normal(jax.random.key(2), (1, 41, 6, 2))
for sizes in ({"fsdp": 2, "context": 4}, {"fsdp": 4, "context": 2}, {"context": 2, "tensor": 3}):
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
        check((x, jnp.sin(x)), jax.jit(exchanged)(x), sizes)
print("same on", len(jax.devices()))
"""


def test_every_kernel_is_divided_over_a_mesh() -> None:
    """8 devices in a process of their own, because their number is fixed when JAX starts."""
    root = ROOT
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # half the time
    environment["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    run = subprocess.run(
        [sys.executable, "-c", ON_MESH], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "same on 8", run.stderr
