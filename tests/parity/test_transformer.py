"""The packed DiT, rung by rung, against live diffusers; what masks and kernels promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel, HunyuanVideoTransformer3DModel
from einops import rearrange

from framepack_jax.models import registry
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.blocks import DoubleBlock, SingleBlock
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.params import stack_layers, unstack_layers
from framepack_jax.packing import PackedContext, embedding_kernel, group_tokens
from tests.fixtures.torch_reference import convert_module, randomize, relative_error

WINDOW, HEIGHT, WIDTH, TEXT = 3, 10, 14, 20
LENGTHS = np.array([[TEXT], [7]])
INDICES = {"k4": range(10, 26), "k2": (8, 9), "k1": (0, 7), "target": (4, 5, 6)}
velocity = jax.jit(transformer.velocity, static_argnames=("cfg", "dtype"))


def torch_video(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rearrange(x, "b t h w c -> b c t h w").copy())


@pytest.fixture(scope="module")
def module() -> HunyuanVideoFramepackTransformer3DModel:
    return randomize(
        HunyuanVideoFramepackTransformer3DModel(
            num_attention_heads=3, attention_head_dim=12, num_layers=2, num_single_layers=2,
            mlp_ratio=3.0, text_embed_dim=32, pooled_projection_dim=24, rope_axes_dim=(2, 4, 6),
            image_proj_dim=20, has_image_proj=True, has_clean_x_embedder=True,
        ),
        seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(module, tmp_path_factory):
    return convert_module(module, "transformer", tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "x": (2, WINDOW, HEIGHT, WIDTH, 16),
        "k1": (2, 2, HEIGHT, WIDTH, 16),
        "k2": (2, 2, HEIGHT, WIDTH, 16),
        "k4": (2, 16, HEIGHT, WIDTH, 16),
        "text": (2, TEXT, 32),
        "pooled": (2, 24),
        "image": (2, 9, 20),
    }
    return {k: random.standard_normal(shape, dtype=np.float32) for k, shape in shapes.items()}


def ours_of(inputs):
    """(x, sigma, context, conditions) of a batch of two prompts of different lengths."""

    def indices(name: str) -> np.ndarray:
        return np.tile(np.asarray(INDICES[name], np.int32), (2, 1))

    context = PackedContext(
        latents=(inputs["k4"], inputs["k2"], inputs["k1"][:, :1], inputs["k1"][:, 1:]),
        indices=(indices("k4"), indices("k2"), indices("k1")[:, :1], indices("k1")[:, 1:]),
        target_indices=indices("target"),
        kernels=("k4", "k2", "k1", "k1"),
    )
    conditions = Conditions(
        inputs["text"],
        np.arange(TEXT)[None, :] < LENGTHS,
        inputs["pooled"],
        inputs["image"],
        np.array([6.0, 3.0], np.float32),
    )
    return inputs["x"], np.array([0.7, 0.2], np.float32), context, conditions


@pytest.fixture(scope="module")
def captured(module, inputs):
    """Outputs of the parts of diffusers' forward pass by name; "x" is the whole."""
    x, sigma, _, conditions = ours_of(inputs)
    parts = {
        "vec": module.time_text_embed, "text": module.context_embedder,
        "image": module.image_projection, "double": module.transformer_blocks[0],
        "single_in": module.transformer_blocks[-1], "single": module.single_transformer_blocks[0],
        "head_in": module.single_transformer_blocks[-1], "head": module.proj_out,
    }  # fmt: skip
    outputs = {}

    def keep(name):
        return lambda module, args, output: outputs.update({name: output})

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]

    def keep_inputs(module, args):
        outputs["img"] = args[0]

    hooks.append(module.transformer_blocks[0].register_forward_pre_hook(keep_inputs))
    with torch.no_grad():
        outputs["x"] = module(
            torch_video(x),
            torch.from_numpy(1000 * sigma),
            torch.from_numpy(conditions.text),
            torch.from_numpy(conditions.text_valid.astype(np.float32)),
            torch.from_numpy(conditions.pooled),
            torch.from_numpy(conditions.image),
            torch.tensor(INDICES["target"]),
            guidance=torch.from_numpy(1000 * conditions.guidance),
            latents_clean=torch_video(inputs["k1"]),
            indices_latents_clean=torch.tensor(INDICES["k1"]),
            latents_history_2x=torch_video(inputs["k2"]),
            indices_latents_history_2x=torch.tensor(INDICES["k2"]),
            latents_history_4x=torch_video(inputs["k4"]),
            indices_latents_history_4x=torch.tensor(list(INDICES["k4"])),
            return_dict=False,
        )[0]
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.fixture(scope="module")
def tokens(model, inputs):
    cfg, params = model
    return jax.jit(transformer.embed, static_argnums=0)(cfg, params, *ours_of(inputs))


def valid_rows(streams, valid: np.ndarray) -> np.ndarray:
    """Image and text tokens that are not padding."""
    both = [x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in streams]
    return np.concatenate(both, axis=1)[valid]


def test_embedders(tokens, captured) -> None:
    assert relative_error(tokens.vec, captured["vec"][0]) < 2e-4
    assert relative_error(tokens.img, captured["img"]) < 2e-4
    assert relative_error(tokens.txt[:, :9], captured["image"]) < 2e-4


def test_refiner(tokens, captured) -> None:
    valid = np.arange(TEXT)[None, :] < LENGTHS
    ours, theirs = np.asarray(tokens.txt[:, 9:]), captured["text"].numpy()
    assert relative_error(ours[valid], theirs[valid]) < 2e-4


def test_double_block(model, tokens, captured) -> None:
    cfg, params = model
    first = jax.tree.map(lambda x: x[0], params["double"])
    img, txt, *rest = tokens
    ours = jax.jit(DoubleBlock(cfg).apply)({"params": first}, (img, txt), *rest)
    valid = np.asarray(tokens.valid)
    assert relative_error(valid_rows(ours, valid), valid_rows(captured["double"], valid)) < 2e-4


def test_single_block(model, tokens, captured) -> None:
    cfg, params = model
    first = jax.tree.map(lambda x: x[0], params["single"])
    both = np.concatenate([x.numpy() for x in captured["single_in"]], axis=1)
    _, _, *rest = tokens
    ours = jax.jit(SingleBlock(cfg).apply)({"params": first}, both, *rest)
    valid = np.asarray(tokens.valid)
    assert relative_error(np.asarray(ours)[valid], valid_rows(captured["single"], valid)) < 2e-4


def test_head(model, inputs, tokens, captured) -> None:
    cfg, params = model
    img = captured["head_in"][0].numpy()
    ours = transformer.head(cfg, params, img, captured["vec"][0].numpy(), inputs["x"].shape)
    assert relative_error(ours, rearrange(captured["x"], "b c t h w -> b t h w c")) < 2e-4


def test_whole_step(model, inputs, captured) -> None:
    cfg, params = model
    ours = velocity(cfg, params, *ours_of(inputs))
    assert relative_error(ours, rearrange(captured["x"], "b c t h w -> b t h w c")) < 2e-4


def test_bfloat16_is_close_and_ends_in_float32(model, inputs, captured) -> None:
    cfg, params = model
    ours = velocity(cfg, params, *ours_of(inputs), dtype=jnp.bfloat16)
    assert ours.dtype == jnp.float32
    assert relative_error(ours, rearrange(captured["x"], "b c t h w -> b t h w c")) < 5e-2


def test_a_batch_of_two_equals_two_of_one(model, inputs) -> None:
    """Different prompt lengths, noise levels, guidance and sections side by side."""
    cfg, params = model
    x, sigma, context, conditions = ours_of(inputs)
    indices = [i + np.array([[0], [5]], np.int32) for i in context.indices]
    context = context.replace(indices=tuple(indices), target_indices=context.target_indices + 2)
    together = velocity(cfg, params, x, sigma, context, conditions)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (x, sigma, context, conditions))
        assert relative_error(together[i : i + 1], velocity(cfg, params, *one)) < 1e-5


def test_masked_text_changes_nothing(model, inputs) -> None:
    cfg, params = model
    x, sigma, context, conditions = ours_of(inputs)
    text = conditions.text.copy()
    text[1, 7:] = 1e3
    changed = velocity(cfg, params, x, sigma, context, conditions.replace(text=text))
    np.testing.assert_array_equal(changed, velocity(cfg, params, x, sigma, context, conditions))
    text[1, 6] = 1.0
    changed = velocity(cfg, params, x, sigma, context, conditions.replace(text=text))
    assert (
        relative_error(changed[1], velocity(cfg, params, x, sigma, context, conditions)[1]) > 1e-4
    )


def test_text_without_any_token_is_finite(model, inputs) -> None:
    cfg, params = model
    x, sigma, context, conditions = ours_of(inputs)
    nothing = conditions.replace(text_valid=np.zeros((2, TEXT), bool))
    assert np.isfinite(velocity(cfg, params, x, sigma, context, nothing)).all()


def test_base_model(tmp_path) -> None:
    """HunyuanVideo without context, image tokens and guidance."""
    base = HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=24, rope_axes_dim=(4, 6, 6),
        guidance_embeds=False,
    )  # fmt: skip
    cfg, params = convert_module(randomize(base, 1), "transformer", tmp_path)
    assert cfg.context_kernels == () and cfg.image_dim is None and not cfg.guidance
    random = np.random.default_rng(1)
    x = random.standard_normal((1, 2, 6, 8, 16), dtype=np.float32)
    text = random.standard_normal((1, 5, 32), dtype=np.float32)
    pooled = random.standard_normal((1, 24), dtype=np.float32)
    conditions = Conditions(text, np.ones((1, 5), bool), pooled)
    context = PackedContext((), (), np.arange(2, dtype=np.int32)[None, :], ())
    ours = velocity(cfg, params, x, np.array([0.3], np.float32), context, conditions)
    with torch.no_grad():
        theirs = base(
            torch_video(x), torch.tensor([300.0]), torch.from_numpy(text), torch.ones(1, 5),
            torch.from_numpy(pooled), return_dict=False,
        )[0]  # fmt: skip
    assert relative_error(ours, rearrange(theirs, "b c t h w -> b t h w c")) < 2e-4


def test_parameter_counts_at_full_size() -> None:
    full = TransformerConfig()
    assert registry.parameter_count("hunyuan_packed_dit", full) == 12_874_314_816
    base = dataclasses.replace(full, context_kernels=(), image_dim=None)
    assert registry.parameter_count("hunyuan_packed_dit", base) == 12_821_012_544


def test_full_size_step_by_shapes() -> None:
    """608 x 640, latent window 9: 17500 image tokens."""
    cfg = TransformerConfig()
    params = jax.eval_shape(lambda key: transformer.init(cfg, key), jax.random.key(0))

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    x = shape(1, 9, 76, 80, 16)
    frames = {"k4": 16, "k2": 2, "k1": 1}
    kernels = ("k4", "k2", "k1", "k1")
    context = PackedContext(
        tuple(shape(1, frames[k], 76, 80, 16) for k in kernels),
        tuple(shape(1, frames[k], dtype=jnp.int32) for k in kernels),
        shape(1, 9, dtype=jnp.int32),
        kernels,
    )
    conditions = Conditions(
        shape(1, 256, 4096), shape(1, 256, dtype=bool), shape(1, 768), shape(1, 729, 1152), shape(1)
    )
    args = (params, x, shape(1), context, conditions)
    embed = jax.eval_shape(lambda *a: transformer.embed(cfg, *a, dtype=jnp.bfloat16), *args)
    assert embed.img.shape == (1, 17500, 3072) and embed.img.dtype == jnp.bfloat16
    assert embed.txt.shape == (1, 985, 3072)
    out = jax.eval_shape(lambda *a: transformer.velocity(cfg, *a, dtype=jnp.bfloat16), *args)
    assert out.shape == x.shape and out.dtype == jnp.float32


@pytest.mark.parametrize("kernel", ["k1", "k2", "k4", "k8", "k16", "k1h4w4", "k1h2w6"])
def test_every_kernel_embeds(kernel: str) -> None:
    """Tokens and RoPE tables of any kernel have the length that `packing` says."""
    stored, _ = embedding_kernel(kernel)
    cfg = TransformerConfig(
        heads=1, head_dim=8, double_layers=1, single_layers=1, refiner_layers=1, text_dim=4,
        pooled_dim=4, image_dim=4, rope_axes=(2, 2, 4), context_kernels=(stored,),
    )  # fmt: skip
    params = jax.eval_shape(lambda key: transformer.init(cfg, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    index = jnp.zeros((1, 5), jnp.int32)
    latents = jnp.ones((1, 5, 10, 14, 16))
    context = PackedContext((latents,), (index,), index[:, :1], (kernel,))
    conditions = Conditions(
        jnp.ones((1, 2, 4)), jnp.ones((1, 2), bool), jnp.ones((1, 4)), jnp.ones((1, 3, 4)),
        jnp.ones(1),
    )  # fmt: skip
    args = (cfg, params, latents[:, :1], jnp.ones(1), context, conditions)
    tokens = jax.eval_shape(lambda: transformer.embed(*args))
    length = group_tokens(5, kernel, 10, 14) + 35
    assert tokens.img.shape == (1, length, 8)
    assert tokens.rope[0].shape == (1, length, 4)


def test_what_does_not_fit_is_named(model, inputs) -> None:
    cfg, params = model
    x, sigma, context, conditions = ours_of(inputs)
    context = context.replace(kernels=("k8", "k2", "k1", "k1"))
    with pytest.raises(ValueError, match="kernel k8"):
        velocity(cfg, params, x, sigma, context, conditions)
    with pytest.raises(ValueError, match="10 x 13"):
        velocity(cfg, params, x[:, :, :, :13], sigma, context, conditions)
    for name in ("guidance", "image"):
        with pytest.raises(ValueError, match=f"no {name}"):
            velocity(cfg, params, x, sigma, context, conditions.replace(**{name: None}))


def test_layers_split_and_join(model) -> None:
    _, params = model
    leaves = unstack_layers(params, TRANSFORMER.stacks)
    assert {"double/01/img_qkv/kernel", "single/00/mod/bias", "embed/patch/bias"} <= set(leaves)
    again = stack_layers(leaves, TRANSFORMER.stacks)
    jax.tree.map(np.testing.assert_array_equal, again, params)
