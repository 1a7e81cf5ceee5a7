"""The attention entry against float64: chunks, masks, grouped queries, gradients, kernels.

The fused kernels run on the CPU where they can: splash interpreted, and for cuDNN its wrapper
around XLA's form of the same function. What is lowered for which platform is read in the program.
"""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce, repeat

from framepack_jax.ops import attention, cudnn, splash
from framepack_jax.ops.attention import attend
from framepack_jax.parallel import sharding
from tests.fixtures.torch_reference import relative_error

MARKS = {"cpu": [], "tpu": ["tpu_custom_call"], "cuda": ["__cudnn$fmhaSoftmax"]}


def weights_of(q, k, valid, causal) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) of (B, L, N, D) and (B, S, N, D)."""
    scores = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(q.shape[-1])
    if valid is not None:
        scores = np.where(valid[:, None, None, :], scores, -np.inf)
    if causal:
        rows, columns = np.indices(scores.shape[-2:])
        scores = np.where((columns <= rows)[None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def widened(q, k, v) -> tuple[np.ndarray, ...]:
    """All three as float64, a key head for every query head."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    return q, *(repeat(x, "b s m d -> b s (m g) d", g=q.shape[2] // x.shape[2]) for x in (k, v))


def reference(q, k, v, valid=None, causal=False) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v in float64."""
    q, k, v = widened(q, k, v)
    return np.einsum("bnls,bsnd->blnd", weights_of(q, k, valid, causal), v)


def reference_gradients(q, k, v, upstream, valid=None, causal=False) -> list[np.ndarray]:
    """Gradients of sum(upstream * attention) by q, k and v in float64, written out."""
    kv_heads = k.shape[2]
    q, k, v = widened(q, k, v)
    upstream = upstream.astype(np.float64)
    weights = weights_of(q, k, valid, causal)
    dv = np.einsum("bnls,blnd->bsnd", weights, upstream)
    dweights = np.einsum("blnd,bsnd->bnls", upstream, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dscores /= np.sqrt(q.shape[-1])
    dq = np.einsum("bnls,bsnd->blnd", dscores, k)
    dk = np.einsum("bnls,blnd->bsnd", dscores, q)
    return [dq, *(reduce(x, "b s (m g) d -> b s m d", "sum", m=kv_heads) for x in (dk, dv))]


def draw(queries: int, keys: int, heads: int = 4, kv_heads: int = 4) -> list[np.ndarray]:
    random = np.random.default_rng(queries)
    shapes = (2, queries, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


def abstract(length: int, width: int = 64, heads: int = 2, dtype=jnp.bfloat16) -> tuple:
    """q, k, v and valid of one sequence, as shapes."""
    x = jax.ShapeDtypeStruct((1, length, heads, width), dtype)
    return x, x, x, jax.ShapeDtypeStruct((1, length), bool)


@pytest.fixture
def cudnn_installed(monkeypatch):
    """JAX as it is beside its CUDA plugin, for tracing and lowering."""
    yield from _cudnn(monkeypatch, lambda: 91000)


@pytest.fixture
def cudnn_missing(monkeypatch):
    """JAX as it is without its CUDA plugin."""

    def missing():
        raise RuntimeError("cuDNN is not detected.")

    yield from _cudnn(monkeypatch, missing)


def _cudnn(monkeypatch, version):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", version)
    cudnn.installed.cache_clear()
    yield
    cudnn.installed.cache_clear()


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """`jax.nn.dot_product_attention` with the arguments of cuDNN and the mathematics of XLA."""
    fused = jax.nn.dot_product_attention

    def by_xla(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        assert q.shape[1] % 128 == 0 and k.shape[1] % 128 == 0
        with jax.numpy_rank_promotion("allow"):
            return fused(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


def lowered(function, platform: str, *args) -> list[str]:
    """The fused kernels in the program for a platform, in order."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"tpu_custom_call|__cudnn\$\w+", text)


@pytest.mark.parametrize("query_chunk", [256, 16, 7, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_do_not_show(query_chunk: int, causal: bool) -> None:
    q, k, v = draw(33, 33)
    valid = np.arange(33)[None, :] < np.array([[33], [5]])
    ours = attend(q, k, v, valid, causal=causal, query_chunk=query_chunk)
    assert relative_error(ours, reference(q, k, v, valid, causal)) < 1e-5


def test_grouped_queries_and_other_lengths() -> None:
    q, k, v = draw(9, 21, heads=6, kv_heads=2)
    assert relative_error(attend(q, k, v, query_chunk=4), reference(q, k, v)) < 1e-5


# queries, keys, key heads, causal, valid keys of the second sample (the first has all)
CASES = [
    (1, 1, 4, False, None),
    (7, 7, 4, True, 3),
    (130, 257, 2, False, 100),
    (257, 130, 2, False, None),
    (257, 257, 2, True, 130),
]


@pytest.mark.parametrize("kernel", ["chunked", "splash", "cudnn"])
@pytest.mark.parametrize("queries,keys,kv_heads,causal,valid_keys", CASES)
def test_outputs_and_gradients(
    kernel, queries, keys, kv_heads, causal, valid_keys, monkeypatch, cudnn_by_xla
) -> None:
    monkeypatch.setattr(splash, "TILE", (128, 128))  # several tiles, also at these lengths
    run = {
        "chunked": partial(attend, query_chunk=64),
        "splash": partial(splash.attend, interpret=True),
        "cudnn": cudnn.attend,
    }[kernel]
    arrays = draw(queries, keys, kv_heads=kv_heads)
    valid = valid_keys and np.arange(keys)[None, :] < np.array([[keys], [valid_keys]])
    upstream = np.random.default_rng(1).standard_normal(arrays[0].shape, dtype=np.float32)

    @jax.jit
    def both(q, k, v):
        out, gradients = jax.vjp(lambda *args: run(*args, valid, causal=causal), q, k, v)
        return out, gradients(upstream)

    out, gradients = both(*arrays)
    assert relative_error(out, reference(*arrays, valid, causal)) < 1e-5
    exact = reference_gradients(*arrays, upstream, valid, causal)
    for name, ours, theirs in zip("qkv", gradients, exact, strict=True):
        if np.abs(theirs).max() > 1e-9:  # of one key, the weights never change
            assert relative_error(ours, theirs) < 2e-5, name
        if valid is not None and name != "q":
            assert not np.asarray(ours)[1, valid_keys:].any(), name


def test_the_written_gradients_are_slopes() -> None:
    arrays = draw(5, 9, kv_heads=2)
    upstream = np.random.default_rng(1).standard_normal(arrays[0].shape)
    valid = np.arange(9)[None, :] < np.array([[9], [4]])
    gradients = reference_gradients(*arrays, upstream, valid)
    for i, gradient in enumerate(gradients):
        direction = np.random.default_rng(2).standard_normal(gradient.shape)
        ends = []
        for step in (1e-4, -1e-4):
            moved = [x + step * direction if j == i else x for j, x in enumerate(arrays)]
            ends.append(np.sum(upstream * reference(*moved, valid)))
        assert np.sum(gradient * direction) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5)


def test_gradients_never_hold_the_whole_matrix(compiled_anew) -> None:
    length, heads = 2048, 2
    whole = 4 * heads * length**2
    shapes = abstract(length, 8, heads, jnp.float32)
    gradient = jax.grad(lambda *args: jnp.sum(attend(*args, query_chunk=64)), (0, 1, 2))
    for function, most in ((partial(attend, query_chunk=64), whole / 8), (gradient, whole / 4)):
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert memory.temp_size_in_bytes < most


def test_kernels_of_other_platforms_leave_nothing_to_keep(cudnn_installed, compiled_anew) -> None:
    """Their residuals are branches of the same conditional; the compiler must drop them."""
    *_, valid = shapes = abstract(1024, 8)

    def loss(q, valid):
        def layer(x, _):
            return attend(x, x, x, valid), None

        return jnp.sum(jax.lax.scan(layer, q, length=6)[0].astype(jnp.float32))

    memory = {}
    for kernel in ("auto", "xla"):
        with attention.use(kernel):
            program = jax.jit(jax.grad(loss)).lower(shapes[0], valid).compile()
            memory[kernel] = program.memory_analysis().temp_size_in_bytes
    assert memory["auto"] <= memory["xla"] * 1.01


@pytest.mark.parametrize("platform", MARKS)
def test_a_gradient_that_keeps_results_runs_no_kernel_twice(
    platform, cudnn_installed, compiled_anew
) -> None:
    weights, (q, *_, valid) = jax.ShapeDtypeStruct((2, 64, 64), jnp.bfloat16), abstract(1100)

    def products(policy) -> list[str]:
        def layer(x, w):
            q = x @ w
            return attend(q, q, q, valid_keys) @ w, None

        valid_keys = jnp.ones(valid.shape, bool)
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

        def loss(w, x):
            return jnp.sum(jax.lax.scan(layer, x, w)[0].astype(jnp.float32))

        if platform != "cpu":
            return lowered(jax.grad(loss), platform, weights, q)
        text = jax.jit(jax.grad(loss)).lower(weights, q).compile().as_text()
        return re.findall(r" exponential\(", text)

    once, twice = map(products, (attention.KEEP_RESULTS, None))
    assert len(twice) == len(once) + 1


@pytest.mark.parametrize("run", [attend, partial(splash.attend, causal=False, interpret=True)])
def test_bfloat16_stays_bfloat16(run) -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(12, 12))
    out = run(q, k, v, None)
    assert out.dtype == jnp.bfloat16
    exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)))
    assert relative_error(out, exact) < 2e-2


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = draw(4, 4, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attend(q, k, v)
    q, k, v = draw(4, 5)
    with pytest.raises(ValueError, match="got 4, 5"):
        attend(q, k, v, causal=True)


def test_cudnn_reads_nothing_behind_the_last_valid_key(cudnn_by_xla) -> None:
    q, k, v = draw(9, 20)
    valid = np.arange(20)[None, :] < np.array([[20], [6]])
    ours = cudnn.attend(
        q, *(np.where(valid[:, :, None, None], x, np.nan) for x in (k, v)), valid, causal=False
    )
    assert relative_error(ours, reference(q, k, v, valid)) < 1e-5


@pytest.mark.parametrize("platform", MARKS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_lowering_chooses_the_kernel(platform, causal, cudnn_installed) -> None:
    run = partial(attend, causal=causal)
    assert lowered(run, platform, *abstract(1024)) == MARKS[platform]
    assert lowered(run, platform, *abstract(1023)) == []  # not worth a kernel

    queries, keys = abstract(4096)[0], abstract(256)[0]
    if not causal:  # many queries of few keys, such as those of a prompt
        assert lowered(run, platform, queries, keys, keys) == MARKS[platform]

    def loss(*args):
        return jnp.sum(run(*args).astype(jnp.float32))

    backward = {"cpu": [], "tpu": 2 * MARKS["tpu"], "cuda": ["__cudnn$fmhaSoftmaxBackward"]}
    gradients = lowered(jax.grad(loss, (0, 1, 2)), platform, *abstract(1100))
    assert gradients == MARKS[platform] + backward[platform]


def test_without_cudnn_all_else_lowers(cudnn_missing) -> None:
    assert lowered(attend, "tpu", *abstract(1024)) == MARKS["tpu"]
    assert lowered(attend, "cuda", *abstract(1024)) == []
    attention._warn.cache_clear()
    with attention.use("cudnn"), pytest.warns(UserWarning, match="install the extra cuda12"):
        jax.eval_shape(attend, *abstract(300))


def test_use_overrides_for_every_length(cudnn_installed) -> None:
    for kernel, platform in (("splash", "tpu"), ("cudnn", "cuda")):
        with attention.use("xla"):
            assert lowered(attend, platform, *abstract(2048)) == []
        with attention.use(kernel):
            assert lowered(attend, platform, *abstract(77)) == MARKS[platform]
            with pytest.raises(NotImplementedError, match="not found for platform cpu"):
                lowered(attend, "cpu", *abstract(77))
    with pytest.raises(ValueError, match=r"'flash': expected one of .*'splash'"):
        attention.use("flash").__enter__()


def test_use_is_part_of_the_key_of_compiled_programs() -> None:
    traced = []

    @jax.jit
    def run(q):
        traced.append(attention._wanted.value)
        return attend(q, q, q)

    q = jnp.ones((1, 3, 1, 8))
    run(q)
    run(q)
    with attention.use("xla"):
        run(q)
        run(q)
    run(q)
    assert traced == ["auto", "xla"]


@pytest.mark.parametrize(
    "kernel,platform,width,dtype,reason",
    [
        ("cudnn", "cuda", 64, jnp.float32, "bfloat16 and float16, not float32"),
        ("cudnn", "cuda", 512, jnp.bfloat16, "head width 512"),
        ("cudnn", "cuda", 20, jnp.bfloat16, "head width 20"),
        ("splash", "tpu", 64, jnp.float16, "bfloat16 and float32, not float16"),
        ("splash", "tpu", 1024, jnp.bfloat16, "head width 1024"),
    ],
)
def test_a_refused_shape_warns_once_and_is_done_by_xla(
    kernel, platform, width, dtype, reason, cudnn_installed
) -> None:
    attention._warn.cache_clear()
    shapes = abstract(300, width, dtype=dtype)
    with attention.use(kernel):
        with pytest.warns(UserWarning, match=f"{kernel} cannot attend .*300.*{reason}") as caught:
            assert lowered(attend, platform, *shapes) == []
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lowered(partial(attend), platform, *shapes) == []


def test_only_the_kernel_of_the_machine_is_missed(cudnn_installed) -> None:
    attention._warn.cache_clear()
    shapes = abstract(2048, 1024)  # too wide for both
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(attend, *shapes)
    for platform, kernel in (("tpu", "splash"), ("gpu", "cudnn")):
        with on_chip("", platform), pytest.warns(UserWarning) as caught:
            jax.eval_shape(attend, *shapes)
        assert [kernel in str(warning.message) for warning in caught] == [True]


def on_chip(kind: str, platform: str = "tpu"):
    """A context in which the mesh is of one device, which need not exist."""
    chip = jax.sharding.AbstractDevice(kind, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=chip)
    return jax.sharding.use_abstract_mesh(mesh)


def test_tiles() -> None:
    assert splash.tile(18741, 1024) == 896  # 21 tiles: 18816 tokens, where 1024 makes 19456
    assert [splash.tile(n, 1024) for n in (1, 128, 129, 1024, 2048)] == [128, 128, 256, 1024, 1024]
    for length in range(1025, 30000, 97):
        size = splash.tile(length, 1024)
        assert size % 128 == 0 and 512 <= size <= 1024
        assert -length % size <= -length % 1024


def test_tiles_by_chip_and_head_width() -> None:
    def tiles(kind: str, width: int) -> tuple[int, int]:
        with on_chip(kind):
            return splash._tiles(2**14, 2**14, width)

    assert tiles("TPU v5 lite", 128) == (1024, 1024)
    assert tiles("TPU v4", 128) == (512, 512)
    assert tiles("TPU v6 lite", 64) == (2048, 1024)
    assert tiles("TPU v6 lite", 512) == (512, 256)
    assert tiles("TPU v4", 512) == (128, 128)


def mesh_of(**sizes: int) -> jax.sharding.AbstractMesh:
    lengths = tuple(sizes.get(name, 1) for name in sharding.AXES)
    auto = (jax.sharding.AxisType.Auto,) * len(lengths)
    return jax.sharding.AbstractMesh(lengths, sharding.AXES, auto)


@pytest.mark.parametrize(
    "sizes,batch,heads,expected",
    [
        ({"fsdp": 8}, 1, 24, ((), ("fsdp",), ())),
        ({"fsdp": 8, "context": 2}, 1, 24, ((), ("fsdp",), ("context",))),
        ({"fsdp": 16}, 1, 24, ((), (), ("fsdp",))),
        ({"fsdp": 2, "context": 8}, 1, 24, ((), ("context",), ("fsdp",))),
        ({"fsdp": 4, "context": 2, "tensor": 3}, 1, 24, ((), ("tensor", "context", "fsdp"), ())),
        ({"fsdp": 4, "context": 2, "tensor": 2}, 1, 24, ((), ("tensor", "fsdp"), ("context",))),
        ({"data": 2, "fsdp": 4, "context": 2}, 8, 24, (("data", "fsdp"), ("context",), ())),
        ({"data": 2, "fsdp": 4, "context": 2}, 2, 24, (("data",), ("context", "fsdp"), ())),
        ({"data": 4, "tensor": 2}, 2, 3, ((), (), ("tensor",))),
        ({}, 2, 3, ((), (), ())),
    ],
)
def test_what_a_mesh_divides(sizes, batch, heads, expected) -> None:
    with jax.sharding.use_abstract_mesh(mesh_of(**sizes)):
        assert attention.layout(batch, heads) == expected
