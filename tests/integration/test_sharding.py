"""Meshes, the tables of rules at full size, and 8 devices against one.

Run as a script with names of meshes, this file measures the last on 8 devices that the CPU pretends
to be, and prints the numbers as JSON: the number of devices is settled when JAX starts, so a test
cannot change it.
"""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from framepack_jax import bundle, packing
from framepack_jax.data.batch import Batch, Conditions, Meta
from framepack_jax.diffusion import flow, sampler, solver_table
from framepack_jax.models import registry
from framepack_jax.models.autoencoder import ROWS
from framepack_jax.models.encoders import umt5
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig, VaeConfig
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.spec import TRANSFORMER as WAN
from framepack_jax.models.wan.vae_config import WanVaeConfig
from framepack_jax.ops import attention
from framepack_jax.parallel import sharding
from framepack_jax.training import flow_matching
from framepack_jax.training.config import HistoryConfig, TrainConfig
from framepack_jax.training.rollouts import with_rollouts
from framepack_jax.training.state import Model
from tests.fixtures.compiling import quick_flags
from tests.fixtures.paths import ROOT
from tests.fixtures.random_networks import difference, example, on_devices, wan_example

DOCUMENT = ROOT / "docs" / "measurements" / "sharding.md"
# Where the part of the document starts that is compared.
COMPARED = "\n## Bytes a device"
GROUPS = {
    "fsdp=8": {"fsdp": 8},
    "tensor=8": {"tensor": 8},
    "fsdp=4, tensor=2": {"fsdp": 4, "tensor": 2},
}
MESHES = ("data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2")
MORE_MESHES = ("data=2,fsdp=4", "fsdp=4,tensor=2", "data=2,context=4")
# Of the twelve heads of the network here fsdp takes four parts, so that queries are left to
# context, as with 24 heads on fsdp=8,context=2.
ONE_SAMPLE = "fsdp=4,context=2"
SAMPLER = "data=2,context=2,tensor=2"
VAES = {
    "hunyuan_vae": VaeConfig(
        channels=(8, 16), norm_groups=4, layers_per_block=1, space_compression=2,
        time_compression=2, latent_channels=4,
    ),
    "wan_vae": WanVaeConfig(
        width=8, multipliers=(1, 2), layers_per_block=1, halves_time=(True,), latent_channels=4
    ),
}  # fmt: skip
WAN_MESH = "fsdp=2,context=2,tensor=2"
# Of the network's input in `example`: 6 of context and 12 of the target, 3 of an image, 5 of text.
TOKENS = 26
# Names of operations that no gradient made.
FORWARD = r'(?![^"]*transpose\()[^"]*'


def abstract_mesh(**sizes: int) -> AbstractMesh:
    lengths = tuple(sizes.get(name, 1) for name in sharding.AXES)
    return AbstractMesh(lengths, sharding.AXES, (AxisType.Auto,) * len(lengths))


@functools.cache
def full_size(kind: str, cfg=None):
    """Shapes of all parameters, in bfloat16, and their specs."""
    spec = registry.NETWORKS[kind]
    params = spec.abstract_params(cfg or spec.config())
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    return params, sharding.resolve(spec.sharding_rules, params)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_flag_names_the_sizes_of_a_mesh():
    assert sharding.parse_mesh("fsdp=4,context=2") == {"fsdp": 4, "context": 2}
    assert sharding.parse_mesh(" tensor = 8 , data=-1") == {"tensor": 8, "data": -1}


@pytest.mark.parametrize(
    "text", ["", "fsdp", "fsdb=4", "fsdp=0", "fsdp=-2", "fsdp=2.5", "fsdp=2,fsdp=2", "fsdp=2,"]
)
def test_a_bad_flag_is_refused_with_the_axes_there_are(text):
    with pytest.raises(ValueError, match=r"data, fsdp, context, tensor") as error:
        sharding.parse_mesh(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 4, "tensor": 4}, r"fsdp=4.*tensor=4: the sizes multiply to 16, but there are 8"),
        ({"fsdp": 4}, r"fsdp=4.*multiply to 4, but there are 8"),
        ({"fsdp": -1, "tensor": 3}, r"fsdp=-1.*tensor=3: 8 devices cannot be divided by 3"),
        ({"fsdp": -1, "data": -1}, r"one of them may be -1"),
        ({"context": 0}, r"context=0.*sizes are 1 or more"),
    ],
)
def test_a_mesh_that_is_not_of_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes, devices=jax.devices()[:1] * 8)


@pytest.mark.parametrize(
    ("count", "heads", "fsdp", "context"),
    [(1, 24, 1, 1), (4, 24, 4, 1), (8, 24, 8, 1), (16, 24, 8, 2), (32, 24, 8, 4),
     (64, 24, 8, 8), (256, 24, 32, 8), (3, 24, 1, 3), (12, 24, 4, 3), (48, 24, 8, 6),
     (16, 12, 4, 4), (8, 2, 4, 2), (4, 5, 4, 1)],
)  # fmt: skip
def test_devices_are_divided_for_one_video(count, heads, fsdp, context):
    sizes = sharding.default_sizes(count, heads)
    assert sizes == {"fsdp": fsdp, "context": context}
    TRANSFORMER.check_mesh(TransformerConfig(heads=heads), sizes)


def test_every_network_of_the_released_bundle_loads_on_the_mesh_of_its_devices():
    manifest = bundle.read_manifest(bundle.resolve("framepack_i2v"))
    configs = {role: bundle.role_config(manifest, role)[1] for role in bundle.ROLES}
    trees = [full_size(manifest.roles[role].kind, cfg) for role, cfg in configs.items()]
    cfg = configs["transformer"]
    refused = []
    for count in range(1, 65):
        try:
            sizes = sharding.default_sizes(count, cfg.heads)
        except ValueError:
            refused.append(count)
            continue
        mesh = abstract_mesh(**sizes)
        assert mesh.size == count
        TRANSFORMER.check_mesh(cfg, mesh)
        for params, specs in trees:
            sharding.shard(params, specs, mesh)
    assert set(range(1, 65)) - set(refused) == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}


def test_devices_that_divide_no_video_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"10 devices .* 24 heads: .* 1, 2, 3, 4, 6, 8, 12, 16;"):
        sharding.default_sizes(10, 24)


def test_devices_for_no_video_are_refused():
    with pytest.raises(ValueError, match="0 devices and 24 heads: expected at least one of each"):
        sharding.default_sizes(0, 24)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 5}, r"tensor=1 and context=5 .* 24 .*context must be one of 1, 2, 3, 4, 6, 8"),
        ({"context": 8, "tensor": 2}, r"tensor=2 and context=8 .*context must be one of 1, 2, 3"),
        ({"tensor": 16}, r"tensor=16 and context=1 .*tensor must be one of 1, 2, 3, 4, 6, 8, 12"),
    ],
)
def test_a_mesh_that_does_not_divide_the_heads_is_refused(sizes, message):
    for mesh in (sizes, abstract_mesh(**sizes)):
        with pytest.raises(ValueError, match=message):
            TRANSFORMER.check_mesh(TransformerConfig(), mesh)
    # What is left after the heads divides queries.
    TRANSFORMER.check_mesh(TransformerConfig(), abstract_mesh(fsdp=16, context=2))


def test_rules_are_matched_to_whole_paths():
    params = {"a": {"kernel": shape(2, 4)}, "aa": {"kernel": shape(4)}}
    rules = ((r"a/kernel", ("fsdp", None)), (r"aa/kernel", ()))
    found = sharding.resolve(rules, params)
    assert found["a"]["kernel"] == PartitionSpec("fsdp", None)
    assert found["aa"]["kernel"] == PartitionSpec()


def test_every_parameter_without_one_fitting_rule_is_named():
    params = {
        "a": {"kernel": shape(2, 4), "bias": shape(4)},
        "b": shape(3),
        "c": shape(3),
        "d": shape(3),
    }
    rules = ((r"a/.*", ("fsdp", None)), (r".*/kernel", ("fsdp", None)), (r"c", (None,)))
    rules += ((r"d", ()), (r"d", ()))
    with pytest.raises(ValueError) as error:
        sharding.resolve(rules, params)
    message = str(error.value)
    assert "a/kernel (2, 4) has 2 rules 'a/.*', '.*/kernel'" in message
    assert "a/bias (4,): rule 'a/.*' has 2 dimensions" in message
    assert "b (3,) has 0 rules" in message
    assert "d (3,) has 2 rules 'd', 'd'" in message
    assert "\n  c" not in message


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("fsdb",), r"rule 'a': unknown mesh axes \['fsdb'\]; there are data, fsdp"),
        ((("tensor", "fsdb"),), r"unknown mesh axes \['fsdb'\]"),
        (("fsdp", ("tensor", "fsdp")), r"rule 'a': mesh axes \['fsdp'\] occur more than once"),
    ],
)
def test_a_misspelt_rule_is_refused_though_nothing_has_it(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.resolve(((r"a", axes),), {})


def test_what_a_mesh_does_not_divide_is_named_and_not_replicated():
    params, specs = full_size("hunyuan_packed_dit")
    with pytest.raises(ValueError) as error:
        sharding.shard(params, specs, abstract_mesh(tensor=16))
    message = str(error.value)
    assert (
        "double/img_qkv/kernel (20, 3072, 3, 24, 128): tensor=16 does not divide dimension 3, 24"
        " (of up to 16, 1, 2, 3, 4, 6, 8, 12 do)"
    ) in message
    assert message.count("\n") == 8, "kernel and bias of four projections to heads"

    two = {"a": shape(12)}
    specs = {"a": PartitionSpec(("tensor", "fsdp"))}
    sharding.shard(two, specs, abstract_mesh(tensor=2, fsdp=6))
    with pytest.raises(ValueError, match=r"a \(12,\): tensor=2 x fsdp=4 does not divide dim.* 0"):
        sharding.shard(two, specs, abstract_mesh(tensor=2, fsdp=4))


@pytest.mark.parametrize("names", [("x",), sharding.AXES[:3], sharding.AXES])
def test_a_mesh_made_elsewhere_is_refused(names):
    # Meshes that jax.make_mesh makes are Explicit: constraints would be assertions there.
    mesh = AbstractMesh((1,) * len(names), names, (AxisType.Explicit,) * len(names))
    with pytest.raises(ValueError, match=rf"{names[0]} \(Explicit\).*sharding.make_mesh"):
        sharding.shard({}, {}, mesh)


@pytest.mark.parametrize("kind", registry.NETWORKS)
def test_every_rule_of_a_network_has_parameters(kind):
    spec = registry.NETWORKS[kind]
    params, _ = full_size(kind)
    paths = [path for path, _ in sharding._leaves(params)]
    unused = [p for p, _ in spec.sharding_rules if not any(re.fullmatch(p, path) for path in paths)]
    assert not unused


@pytest.mark.parametrize("kind", registry.NETWORKS)
def test_layers_are_never_divided(kind):
    _, specs = full_size(kind)
    for name in registry.NETWORKS[kind].stacks:
        for spec in jax.tree.leaves(specs[name], is_leaf=lambda x: isinstance(x, PartitionSpec)):
            assert not spec or spec[0] is None, spec


def test_bytes_of_the_13b_transformer_on_a_device():
    params, specs = full_size("hunyuan_packed_dit")

    def device_bytes(**sizes: int) -> int:
        return sharding.device_bytes(params, sharding.shard(params, specs, abstract_mesh(**sizes)))

    total, width, text = 12_874_314_816, 3072, 4096
    assert device_bytes() == device_bytes(data=4, context=2) == 2 * total

    # What is left whole by either: biases of what adds to the stream and of modulations, norms.
    whole = 20 * 2 * ((6 + 1 + 1) * width + 2 * 128) + 40 * ((3 + 1) * width + 2 * 128)
    whole += 2 * ((2 + 1 + 1) * width + 4 * width)
    whole += (5 + 1 + 4 + 1) * width + (2 * width + 64)
    # By `fsdp` also the biases of heads and of hidden columns.
    by_fsdp = whole + (20 * 2 + 40 + 2) * (3 + 4) * width
    assert device_bytes(fsdp=8) == 2 * ((total - by_fsdp) // 8 + by_fsdp)
    # By `tensor` also what has neither: embeddings of patches and text, the last projection.
    by_tensor = whole + (64 + 64 + 512 + 4096 + text) * width + 64 * width
    assert device_bytes(tensor=8) == 2 * ((total - by_tensor) // 8 + by_tensor)
    assert (device_bytes(fsdp=8), device_bytes(tensor=8)) == (3_224_436_864, 3_269_175_936)


def test_the_document_says_what_the_code_resolves(tmp_path):
    prose, _, compared = DOCUMENT.read_text().partition(COMPARED)
    renewed = tables()
    new = tmp_path / "sharding.md"
    new.write_text(prose + renewed)
    assert COMPARED + compared == renewed, f"{DOCUMENT} is stale: copy {new} over it"


def tables() -> str:
    """The part of the document that is made from the code."""
    sections, sizes = [], []
    for kind in registry.NETWORKS:
        params, specs = full_size(kind)
        shardings = {
            name: sharding.shard(params, specs, abstract_mesh(**mesh))
            for name, mesh in GROUPS.items()
        }
        held = [sharding.device_bytes(params, of_mesh) for of_mesh in shardings.values()]
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        sizes.append(" | ".join([kind, *(f"{number:,}" for number in (total, *held))]))
        sections.append(f"## {kind}\n\n{limits(params, specs)}\n\n{parameters(params, specs)}")
    head = f"## Bytes a device, in bfloat16\n\n| network | one device | {' | '.join(GROUPS)} |\n"
    head += "|---|" + "--:|" * (1 + len(GROUPS)) + "\n" + "".join(f"| {row} |\n" for row in sizes)
    return "\n" + "\n".join([head, *(f"{section}\n" for section in sections)])


def limits(params, specs) -> str:
    """The sizes of axes that a network takes."""
    lengths: dict[tuple[str, ...], list[int]] = {}
    for (_, leaf), spec in zip(sharding._leaves(params), _specs(specs), strict=True):
        for length, axis in zip(leaf.shape, spec, strict=False):
            for names in {(name,) for name in sharding._names([axis])} | {_tuple(axis)}:
                lengths.setdefault(names, []).append(length)
    lengths.pop((), None)
    if not lengths:
        return "Every parameter is whole on every device."
    rules = [f"`{' x '.join(k)}` divides {math.gcd(*v):,}" for k, v in sorted(lengths.items())]
    return f"Sizes of the axes: {'; '.join(rules)}."


def parameters(params, specs) -> str:
    rows = []
    for (path, leaf), spec in zip(sharding._leaves(params), _specs(specs), strict=True):
        axes = (*spec, *(None,) * (len(leaf.shape) - len(spec)))
        dimensions = [
            f"{length} ({', '.join(_tuple(axis))})" if axis else str(length)
            for length, axis in zip(leaf.shape, axes, strict=True)
        ]
        rows.append(f"| `{path}` | {' x '.join(dimensions)} |")
    if all(not spec for spec in _specs(specs)):
        return f"{len(rows)} parameters, from `{sharding._leaves(params)[0][0]}` on."
    return "\n".join(["| parameter | dimensions |", "|---|---|", *rows])


def _specs(specs) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _tuple(axis) -> tuple[str, ...]:
    return tuple(sharding._names([axis]))


def constrained(sizes: dict[str, int], lengths: tuple[int, ...], *axes) -> PartitionSpec:
    """Return the sharding that a constraint asks for on a mesh."""

    def f(x):
        return sharding.constrain(x, *axes)

    with jax.sharding.use_abstract_mesh(abstract_mesh(**sizes)):
        jaxpr = jax.make_jaxpr(jax.jit(f))(shape(*lengths))
    [call] = jaxpr.eqns
    [constraint] = call.params["jaxpr"].eqns
    return constraint.params["sharding"].spec


def test_a_constraint_divides_what_is_long_enough():
    stream = (sharding.BATCH, sharding.TOKENS, None)
    both, context = {"data": 2, "fsdp": 4}, {"fsdp": 4, "context": 2}
    found = constrained(both, (8, 10, 6), *stream)
    assert found == PartitionSpec(("data", "fsdp"), "context", None)
    # A batch too small for fsdp leaves it to the tokens; 10 tokens over 4 devices are padded.
    found = constrained(both, (2, 10, 6), *stream)
    assert found == PartitionSpec("data", ("context", "fsdp"), None)
    found = constrained(context, (1, 10, 6), *stream)
    assert found == PartitionSpec("data", ("context", "fsdp"), None)
    # Too few tokens for all: the later axis is left out.
    assert constrained(context, (1, 2, 6), *stream) == PartitionSpec("data", "context", None)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 3, "fsdp": 2}, {"data": 2, "context": 2}])
def test_a_constraint_divides_a_batch_as_attention_does(sizes):
    for batch in range(1, 9):
        found = constrained(sizes, (batch, 12, 6), sharding.BATCH, sharding.TOKENS, None)
        with jax.sharding.use_abstract_mesh(abstract_mesh(**sizes)):
            expected = attention.layout(batch, 24).batch
        assert tuple(name for name in _tuple(found[0]) if name in sizes) == expected, batch


def test_rows_are_divided_by_what_divides_no_batch():
    def rows(batch: int) -> PartitionSpec:
        axes = (sharding.BATCH, None, ROWS, None, None)
        return constrained({"data": 4, "fsdp": 2}, (batch, 9, 64, 64, 3), *axes)

    assert rows(1) == PartitionSpec(None, None, ("context", "fsdp", "tensor", "data"), None, None)
    assert rows(2)[0] == "fsdp" and "data" in rows(2)[2]
    assert rows(8)[0] == ("data", "fsdp") and "data" not in rows(8)[2]


def test_a_constraint_does_nothing_without_a_mesh():
    x = jnp.ones((2, 4))
    assert sharding.constrain(x, "data", "tensor") is x
    [call] = jax.make_jaxpr(jax.jit(lambda x: sharding.constrain(x, "data", None)))(x).eqns
    assert not call.params["jaxpr"].eqns


def test_a_misspelt_constraint_is_refused_without_a_mesh():
    with pytest.raises(ValueError, match=r"unknown mesh axes \['contxt'\]; there are data, fsdp"):
        sharding.constrain(jnp.ones((2, 4)), "data", ("fsdp", "contxt"))
    with pytest.raises(ValueError, match=r"1 axes \('data',\) for an array of shape \(2, 4\)"):
        sharding.constrain(jnp.ones((2, 4)), "data")


def measure(meshes: tuple[str, ...]) -> dict[str, dict]:
    """Return what `main` prints."""
    environment = {
        **os.environ,
        "XLA_FLAGS": quick_flags(8),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
        # Compiled programs are looked into.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    command = [sys.executable, __file__, *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured() -> dict[str, dict]:
    return measure(MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_compute_what_one_does(measured, mesh):
    check(measured, mesh)


@pytest.mark.slow
def test_eight_devices_divided_in_other_ways():
    found = measure(MORE_MESHES)
    for mesh in MORE_MESHES:
        check(found, mesh)


def check(measured: dict[str, dict], mesh: str) -> None:
    found = measured[mesh]
    assert found["velocity"] < 5e-6
    assert found["gradient"] < 3e-5
    assert found["gradients_lie_like_parameters"]
    sizes = sharding.parse_mesh(mesh)
    pieces = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert found["bytes"] == found["expected_bytes"] < 1.2 * measured["bytes"] / pieces
    # Weights in pieces are gathered, heads and tokens of a sample are summed or exchanged.
    used = {"fsdp": "all-gather", "tensor": "all-reduce", "context": "all-to-all"}
    for axis in sizes.keys() & used.keys():
        assert used[axis] in found["collectives"], axis


def test_one_sample_is_divided_by_tokens(measured):
    """Over `context`, and over `fsdp`, for which there is no batch to divide. The axes divide
    neither the 18 image tokens, nor the 5 of the prompt, nor all 26: they are padded."""
    found = measured[ONE_SAMPLE]
    assert found["velocity"] < 5e-6
    assert found["gradient"] < 3e-5
    # Weights are gathered, tokens exchanged for heads; products of parts are never summed.
    assert found["in_single_blocks"] == ["all-gather", "all-to-all"]
    # Of twelve heads and all queries a device has three and half, and all keys: attention is eight
    # times less work than on one device.
    assert found["scores"] == 3 * (TOKENS // 2) * TOKENS


def test_a_network_whose_norms_span_all_heads_is_divided_too(measured):
    """Wan's q and k are normalised over all heads, which `tensor` divides."""
    found = measured["wan"]
    assert found["velocity"] < 5e-6
    assert found["gradient"] < 3e-5
    assert found["gradients_lie_like_parameters"]
    assert {"all-gather", "all-reduce", "all-to-all"} <= set(found["collectives"])


def test_masked_tokens_of_a_tail_are_masked_on_a_mesh(measured):
    assert measured["tail"]["velocity"] < 5e-6 and measured["tail"]["gradient"] < 3e-5


def test_frames_that_read_no_later_frame_are_divided(measured):
    assert measured["causal"]["velocity"] < 5e-6 and measured["causal"]["gradient"] < 3e-5


def test_history_is_predicted_alike_on_a_mesh(measured):
    assert measured["rollouts"] < 5e-6


def test_the_sampler_on_a_mesh_makes_what_one_device_makes(measured):
    assert measured["sampler"] < 1e-5


def test_the_text_encoder_on_a_mesh_makes_what_one_device_makes(measured):
    assert measured["umt5"]["states"] < 1e-5
    assert {"all-gather", "all-reduce"} <= set(measured["umt5"]["collectives"])


@pytest.mark.parametrize("kind", VAES)
def test_a_picture_is_divided_by_rows(measured, kind):
    assert measured[kind]["video"] < 5e-6
    assert measured[kind]["temporaries"] < 0.6, "of those of one device, over 8"
    assert measured[kind]["rows"] == 256 // 8, "of any convolution on a device"


def main(meshes: list[str]) -> None:
    """Print, for each mesh, how far velocity and gradient are from those of one device."""
    cfg = TransformerConfig(
        in_channels=4, out_channels=4, heads=12, head_dim=6, double_layers=2, single_layers=2,
        refiner_layers=1, mlp_ratio=2.0, text_dim=16, pooled_dim=8, image_dim=8,
        rope_axes=(2, 2, 2), context_kernels=("k1",),
    )  # fmt: skip
    params, arrays, target = example(cfg)

    def loss(params, arrays, target):
        velocity = transformer.velocity(cfg, params, *arrays)
        return jnp.mean((velocity - target) ** 2), velocity

    gradient = jax.value_and_grad(loss, has_aux=True)
    expected = jax.device_get(jax.jit(gradient)(params, arrays, target))
    found = {name: on_mesh(name, gradient, params, (arrays, target), expected) for name in meshes}
    first = jax.tree.map(lambda x: x[:1], (arrays, target))
    expected = jax.device_get(jax.jit(gradient)(params, *first))
    found[ONE_SAMPLE] = on_mesh(ONE_SAMPLE, gradient, params, first, expected)
    found["rollouts"] = of_rollouts(cfg, params, arrays, target)
    found["causal"] = of_causal(cfg, params, *first)
    found["tail"] = of_tail(gradient, params, arrays, target)
    found["wan"] = of_wan()
    found["sampler"] = of_sampler(cfg, params, arrays)
    found |= {kind: of_vae(kind, cfg) for kind, cfg in VAES.items()}
    found["umt5"] = of_umt5()
    found["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps(found))


def of_rollouts(cfg: TransformerConfig, params, arrays, target) -> float:
    """The history that the network predicts itself, on a mesh that divides samples, tokens and
    heads, against what one device predicts."""
    train = TrainConfig(batch=8, dtype="float32", history=HistoryConfig(rollouts=1.0))
    _, _, context, given = arrays
    numbers = np.arange(8, dtype=np.int32)
    conditions = Conditions(given.text, given.text_valid, given.pooled, given.image)
    batch = Batch(
        target, context, (np.zeros((8, 1), bool),), conditions, Meta(*[numbers] * 4)
    )  # fmt: skip
    schedule, model = packing.parse("td_f1k1_g2"), Model(TRANSFORMER, cfg)

    def predict(params, batch):
        keys = flow_matching.sample_keys(jax.random.key(0), batch.meta.element)
        return with_rollouts(train, model, params, schedule, batch, keys).latents[0]

    expected = jax.device_get(jax.jit(predict)(params, batch))
    mesh = sharding.make_mesh(**sharding.parse_mesh(SAMPLER))
    placed = on_devices(params, mesh)
    with jax.set_mesh(mesh):
        samples = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
        found = jax.jit(predict)(placed, jax.device_put(batch, samples))
    assert difference(context.latents[0], expected) > 1e-3
    return difference(found, expected)


def of_causal(cfg: TransformerConfig, params, arrays, target) -> dict:
    """One sample whose frames read no later frame, on a mesh that divides heads and queries."""
    cfg = dataclasses.replace(cfg, causal=True)

    def loss(params, arrays, target):
        velocity = transformer.velocity(cfg, params, *arrays)
        return jnp.mean((velocity - target) ** 2), velocity

    gradient = jax.value_and_grad(loss, has_aux=True)
    expected = jax.device_get(jax.jit(gradient)(params, arrays, target))
    return on_mesh(ONE_SAMPLE, gradient, params, (arrays, target), expected)


def of_tail(gradient, params, arrays, target) -> dict:
    """A tail of eight places, of which each sample reads another number, on a mesh that divides
    samples, tokens and heads."""
    x, sigma, context, conditions = arrays
    random = np.random.default_rng(1)
    tail = random.standard_normal((8, 8, 1, 1, x.shape[-1]), dtype=np.float32)
    context = dataclasses.replace(
        context,
        latents=(tail, *context.latents),
        indices=(np.tile(np.arange(-8, 0, dtype=np.int32), (8, 1)), *context.indices),
        kernels=("ta_k1", *context.kernels),
        masked=np.arange(8, dtype=np.int32)[::-1].copy(),
    )
    batch = (x, sigma, context, conditions), target
    expected = jax.device_get(jax.jit(gradient)(params, *batch))
    return on_mesh(SAMPLER, gradient, params, batch, expected)


def of_wan() -> dict:
    """A network of Wan with context, for two samples, with tokens and heads divided."""
    cfg = WanConfig(
        in_channels=4, out_channels=4, heads=4, head_dim=6, layers=2, mlp_dim=16, text_dim=8,
        time_dim=8, rope_axes=(2, 2, 2), context_kernels=("k1",), clean_context=True,
        prompt_to_target=True,
    )  # fmt: skip
    params, arrays, target = wan_example(cfg)

    def loss(params, arrays, target):
        velocity = WAN.velocity(cfg, params, *arrays)
        return jnp.mean((velocity - target) ** 2), velocity

    gradient = jax.value_and_grad(loss, has_aux=True)
    expected = jax.device_get(jax.jit(gradient)(params, arrays, target))
    return on_mesh(WAN_MESH, gradient, params, (arrays, target), expected, WAN)


def on_mesh(name: str, gradient, params, batch, expected, spec=TRANSFORMER) -> dict:
    """`gradient` of a batch on the mesh of that name, against what one device computes."""
    mesh = sharding.make_mesh(**sharding.parse_mesh(name))
    placed = on_devices(params, mesh, spec)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    several = jax.tree.leaves(batch)[0].shape[0] > 1
    of_batch = PartitionSpec(sharding.BATCH) if several else PartitionSpec()
    batch = jax.device_put(batch, NamedSharding(mesh, of_batch))
    with jax.set_mesh(mesh):
        step = jax.jit(gradient, out_shardings=(None, shardings))
        compiled = step.lower(placed, *batch).compile()
        (_, velocity), gradients = compiled(placed, *batch)
    (_, expected_velocity), expected_gradients = expected
    return {
        "velocity": difference(velocity, expected_velocity),
        "gradient": difference(gradients, expected_gradients),
        "gradients_lie_like_parameters": all(
            g.sharding.is_equivalent_to(p.sharding, p.ndim)
            for g, p in zip(jax.tree.leaves(gradients), jax.tree.leaves(placed), strict=True)
        ),
        "bytes": sum(p.addressable_shards[0].data.nbytes for p in jax.tree.leaves(placed)),
        "expected_bytes": sharding.device_bytes(params, shardings),
        "collectives": collectives(compiled),
        "in_single_blocks": collectives(compiled, FORWARD + "SingleBlock"),
        "scores": largest_product(compiled, TOKENS),
    }


def of_sampler(cfg, params, arrays) -> float:
    """Two steps for two samples, on a mesh that divides samples, tokens and heads."""
    x, _, context, conditions = jax.tree.map(lambda x: x[:2], arrays)
    sigmas = flow.sigmas(2, 1.0)

    def denoise(params) -> np.ndarray:
        table = solver_table("unipc", sigmas)
        inputs = x, sampler.SamplerSettings(sigmas, table), context, conditions
        return sampler.denoise(TRANSFORMER, cfg, params, *inputs).latents

    mesh = sharding.make_mesh(**sharding.parse_mesh(SAMPLER))
    expected = denoise(params)
    with jax.set_mesh(mesh):
        return difference(denoise(on_devices(params, mesh)), expected)


def of_umt5() -> dict:
    """Two prompts of other lengths, with weights over all devices and heads over `tensor`."""
    cfg = umt5.Umt5Config(
        vocab_size=30, width=16, layers=2, heads=4, head_dim=6, mlp_width=24, buckets=8,
        max_distance=20,
    )  # fmt: skip
    params = umt5.init(cfg, jax.random.key(0))
    ids, valid = np.arange(22).reshape(2, 11), np.arange(11) < np.asarray([[11], [4]])
    mesh = sharding.make_mesh(**sharding.parse_mesh(MESHES[0]))
    specs = sharding.resolve(umt5.SHARDINGS, params)
    placed = jax.device_put(params, sharding.shard(params, specs, mesh))
    states = jax.jit(umt5.hidden_states, static_argnums=0)
    expected = states(cfg, params, ids, valid)
    with jax.set_mesh(mesh):
        compiled = states.lower(cfg, placed, ids, valid).compile()
        found = states(cfg, placed, ids, valid)
    return {"states": difference(found, expected), "collectives": collectives(compiled)}


def of_vae(kind: str, cfg) -> dict:
    """A clip encoded and decoded, with its rows over all devices: of one sample `data` too."""
    spec = registry.NETWORKS[kind]
    params = jax.jit(lambda: spec.init(cfg, jax.random.key(0)))()
    video = np.random.default_rng(0).standard_normal((1, 3, 256, 6, 3), dtype=np.float32)

    def there_and_back(params, video):
        return spec.decode(cfg, params, spec.encode(cfg, params, video)[0])

    expected = jax.jit(there_and_back).lower(params, video).compile()
    mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
    shardings = sharding.shard(params, sharding.resolve(spec.sharding_rules, params), mesh)
    placed = jax.device_put((params, video), (shardings, NamedSharding(mesh, PartitionSpec())))
    with jax.set_mesh(mesh):
        compiled = jax.jit(there_and_back).lower(*placed).compile()
        found = compiled(*placed)
    # Of (frames, rows, columns, channels), or with a sample before them.
    rows = re.findall(r" = \w+\[(?:\d,)?\d+,(\d+),\d+,\d+\]\S* convolution\(", compiled.as_text())
    temporaries = [c.memory_analysis().temp_size_in_bytes for c in (compiled, expected)]
    return {
        "video": difference(found, jax.device_get(expected(params, video))),
        "temporaries": temporaries[0] / temporaries[1],
        "rows": max(map(int, rows)),
    }


def largest_product(compiled, length: int) -> int:
    """Size, on a device, of the largest result of a matrix product with a dimension of `length`."""
    found = re.findall(r" = \w+\[([\d,]+)\]\S* dot\(", compiled.as_text())
    shapes = [[int(n) for n in lengths.split(",")] for lengths in found]
    return max((math.prod(shape) for shape in shapes if length in shape), default=0)


def collectives(compiled, where: str = '[^"]*') -> list[str]:
    """The kinds of collective operation in a compiled program, or in a module of it."""
    kinds_of = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf' ({kinds_of})(?:-start)?\(.*op_name="{where}[^"]*"', compiled.as_text())
    return sorted(set(found))


if __name__ == "__main__":
    main(sys.argv[1:])
