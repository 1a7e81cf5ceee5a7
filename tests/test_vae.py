"""The causal 3-D autoencoder against diffusers' AutoencoderKLHunyuanVideo."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from framepack_jax.models import vae
from framepack_jax.models.vae import Config, Tiling
from framepack_jax.ops import conv
from tests.torch_reference import randomize, relative_error, to_jax

PARITY = 2e-4
DEFAULT = Tiling()
CONFIGS = {
    "a": Config(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4),
    "b": Config(channels=(8, 12, 20, 24), layers_per_block=2, norm_groups=2, latent_channels=6),
}
NAMES = (
    (r"(down|up)_blocks\.(\d+)\.", r"\1_\2."),
    (r"mid_block\.", "mid."),
    (r"resnets\.(\d+)\.", r"resnet_\1."),
    (r"attentions\.0\.", "attention."),
    (r"(down|up)samplers\.0\.conv\.", r"\1sample."),
    (r"group_norm\.|conv_norm_out\.", lambda m: {"g": "norm.", "c": "norm_out."}[m[0][0]]),
    (r"conv_shortcut\.", "shortcut."),
    (r"to_out\.0\.", "out."),
    (r"^quant_conv\.", "encoder.quant."),
    (r"^post_quant_conv\.", "decoder.post_quant."),
    (r"\.conv\.", "."),
)


def vae_params(state_dict: Mapping[str, torch.Tensor]) -> dict:
    """Our parameters from diffusers' names."""
    leaves = {}
    for name, tensor in state_dict.items():
        for pattern, here in NAMES:
            name = re.sub(pattern, here, name)
        *path, kind = name.split(".")
        array = to_jax(tensor)
        if kind == "weight" and array.ndim == 1:
            kind = "scale"
        elif kind == "weight":
            kind, array = "kernel", jnp.moveaxis(array, (0, 1), (-1, -2))
        leaves[(*path, kind)] = array
    for path in [path[:-2] for path in leaves if path[-2:] == ("to_q", "kernel")]:
        for kind, axis in (("kernel", 1), ("bias", 0)):
            parts = [leaves.pop((*path, f"to_{x}", kind))[..., None, :] for x in "qkv"]
            leaves[(*path, "qkv", kind)] = jnp.stack(parts, axis=axis)
    return unflatten_dict(leaves)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """(config, our parameters, diffusers' model), the same random weights in both."""
    cfg = CONFIGS[request.param]
    model = AutoencoderKLHunyuanVideo(
        latent_channels=cfg.latent_channels,
        block_out_channels=cfg.channels,
        layers_per_block=cfg.layers_per_block,
        norm_num_groups=cfg.norm_groups,
    )
    randomize(model, seed=len(cfg.channels) + cfg.layers_per_block)
    return cfg, vae_params(model.state_dict()), model


@pytest.fixture
def tiled(pair):
    """Sets diffusers' spatial tiling for one test; returns the function that does."""
    model = pair[2]
    yield lambda size, stride: model.enable_tiling(size, size, None, stride, stride)
    model.use_tiling = False


def sample(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(x: torch.Tensor) -> jax.Array:
    return to_jax(x.movedim(1, -1))


@torch.no_grad()
def assert_encodes_alike(pair, video: torch.Tensor, tiling: Tiling = DEFAULT) -> None:
    cfg, params, model = pair
    theirs = model.encode(video).latent_dist
    mean, logvar = vae.encode(cfg, params, ours(video), tiling)
    assert relative_error(mean, theirs.mean.movedim(1, -1)) < PARITY
    assert relative_error(logvar, theirs.logvar.movedim(1, -1)) < PARITY


@torch.no_grad()
def assert_decodes_alike(pair, latents: torch.Tensor, tiling: Tiling = DEFAULT) -> None:
    cfg, params, model = pair
    theirs = model.decode(latents).sample.movedim(1, -1)
    assert relative_error(vae.decode(cfg, params, ours(latents), tiling), theirs) < PARITY


def test_parameters_are_those_of_the_converted_checkpoint(pair):
    cfg, params, _ = pair
    shapes = jax.eval_shape(lambda key: vae.init(cfg, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize("frames", [1, 9, 17, 25, 29])
def test_encoder_matches_diffusers(pair, frames):
    assert_encodes_alike(pair, sample((2, 3, frames, 24, 32)))


@pytest.mark.parametrize("frames", [1, 3, 5, 8, 12])
def test_decoder_matches_diffusers(pair, frames):
    assert_decodes_alike(pair, sample((2, pair[0].latent_channels, frames, 3, 4)))


@pytest.mark.parametrize("frames", [9, 21])
def test_spatial_tiles_match_diffusers(pair, tiled, frames):
    tiled(32, 24)
    tiling = Tiling(size=32, stride=24)
    assert_encodes_alike(pair, sample((1, 3, frames, 64, 80)), tiling)
    latents = sample((1, pair[0].latent_channels, 1 + frames // 4, 8, 10))
    assert_decodes_alike(pair, latents, tiling)


def test_whole_clip_at_once_matches_diffusers(pair):
    model = pair[2]
    model.use_framewise_encoding = model.use_framewise_decoding = False
    try:
        whole = Tiling(frames=None)
        assert_encodes_alike(pair, sample((1, 3, 25, 16, 16)), whole)
        assert_decodes_alike(pair, sample((1, pair[0].latent_channels, 7, 2, 3)), whole)
    finally:
        model.use_framewise_encoding = model.use_framewise_decoding = True


def test_log_variance_is_clamped(pair):
    cfg, params, _ = pair
    video = ours(sample((1, 3, 1, 8, 8)))
    encoder = jax.tree.map(lambda p: p, params["encoder"])
    encoder["quant"] = {**encoder["quant"], "bias": 1000 * encoder["quant"]["bias"]}
    _, logvar = vae.encode(cfg, {"encoder": encoder}, video)
    assert logvar.min() == -30 and logvar.max() == 20


def test_image_latent_is_the_first_of_a_still_clip_without_norms_over_time(pair):
    """A frame repeated gives every group norm the statistics of the single frame, and attention
    the same keys several times: the clip's first latent is the image's latent."""
    cfg, params, _ = pair
    image = ours(sample((1, 3, 1, 16, 24)))
    clip = jnp.repeat(image, 9, axis=1)
    first, _ = vae.encode(cfg, params, image)
    still, _ = vae.encode(cfg, params, clip)
    assert relative_error(still, jnp.repeat(first, 3, axis=1)) < PARITY


def test_half_precision_stays_close_and_keeps_its_dtype(pair):
    cfg, params, _ = pair
    half = vae.stack.cast(params, jnp.bfloat16)
    latents = ours(sample((1, cfg.latent_channels, 6, 3, 4)))
    video = vae.decode(cfg, half, latents.astype(jnp.bfloat16))
    assert video.dtype == jnp.bfloat16
    assert relative_error(video, vae.decode(cfg, params, latents)) < 0.1
    mean, logvar = vae.encode(cfg, half, video)
    assert mean.dtype == logvar.dtype == jnp.bfloat16
    assert relative_error(mean, vae.encode(cfg, params, video.astype(jnp.float32))[0]) < 0.1


def test_gradient_is_finite_and_reaches_every_parameter():
    cfg = CONFIGS["a"]
    params = vae.init(cfg, jax.random.key(0))
    video = ours(sample((1, 3, 21, 16, 16)))

    def loss(params):
        mean, logvar = vae.encode(cfg, params, video)
        decoded = vae.decode(cfg, params, mean + jnp.exp(logvar / 2))
        return jnp.mean(jnp.square(decoded - video)) + jnp.mean(logvar)

    for path, leaf in jax.tree.leaves_with_path(jax.grad(loss)(params)):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_full_size_has_the_released_number_of_parameters():
    params = jax.eval_shape(lambda key: vae.init(Config(), key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 246_478_803


@pytest.mark.parametrize(
    ("channels", "space", "time", "strides"),
    [
        ((8, 8, 8, 8), 8, 4, ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        ((8, 8, 8), 4, 4, ((2, 2, 2), (2, 2, 2), (1, 1, 1))),
        ((8, 8, 8, 8, 8), 16, 4, ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        ((8, 8, 8), 2, 4, ((2, 2, 2), (2, 1, 1), (1, 1, 1))),
    ],
)
def test_strides_follow_diffusers_for_other_compressions(channels, space, time, strides):
    cfg = Config(
        channels=channels, layers_per_block=1, norm_groups=4,
        space_compression=space, time_compression=time,
    )  # fmt: skip
    assert cfg.strides == strides
    model = AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * len(channels),
        up_block_types=("HunyuanVideoUpBlock3D",) * len(channels),
        block_out_channels=channels, layers_per_block=1, norm_num_groups=4,
        spatial_compression_ratio=space, temporal_compression_ratio=time,
    )  # fmt: skip
    pair = cfg, vae_params(randomize(model, seed=5).state_dict()), model
    assert_encodes_alike(pair, sample((1, 3, 5, 2 * space, space)))
    assert_decodes_alike(pair, sample((1, 16, 2, 2, 1)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Config(channels=(8, 8), space_compression=8), "space_compression is 8"),
        (lambda: Config(time_compression=3), "time_compression is 3"),
        (lambda: vae.encode(Config(), {}, jnp.zeros((1, 1, 12, 16, 3))), "got 12x16"),
        (lambda: vae.encode(Config(), {}, jnp.zeros((1, 3, 1, 16, 16))), r"\(B, T, H, W, 3\)"),
        (lambda: vae.decode(Config(), {}, jnp.zeros((1, 16, 1, 2, 2))), r"\(B, T, H, W, 16\)"),
        (
            lambda: vae.decode(Config(), {}, jnp.zeros((1, 1, 2, 2, 16)), Tiling(size=60)),
            "size 60 at a stride of None",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    kernel=st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    stride=st.tuples(*[st.integers(1, 2)] * 3),
)
def test_convolution_ignores_the_future_and_both_forms_agree(data, sizes, kernel, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *sizes, 3)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(*kernel, 3, 4)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=4), jnp.float32)
    out = conv.causal_conv3d(x, weights, bias, stride)
    assert out.shape == (2, *(-(-n // s) for n, s in zip(sizes, stride, strict=True)), 4)
    now = data.draw(st.integers(0, sizes[0] - 1))
    changed = conv.causal_conv3d(x.at[:, now + 1 :].add(7.0), weights, bias, stride)
    assert jnp.array_equal(out[:, : now // stride[0] + 1], changed[:, : now // stride[0] + 1])
    pad = [(0, 0), (kernel[0] - 1, 0), *[(k // 2, k // 2) for k in kernel[1:]], (0, 0)]
    padded = jnp.pad(x, pad, mode="edge")
    forms = [form(padded, weights, stride) for form in (conv.by_volume, conv.by_frames)]
    np.testing.assert_allclose(*forms, rtol=1e-5, atol=1e-5)


def test_attention_reads_no_later_frame():
    cfg = CONFIGS["a"]
    x = ours(sample((2, 16, 4, 2, 3)))
    block = vae.Attention(cfg)
    params = block.init(jax.random.key(0), x)
    # A change that moves no group statistic: the channels of a group trade places.
    later = x.at[:, 2:].set(x[:, 2:].reshape(2, 2, 2, 3, 4, 4)[..., ::-1].reshape(2, 2, 2, 3, 16))
    before, after = (block.apply(params, y) for y in (x, later))
    np.testing.assert_allclose(before[:, :2], after[:, :2], atol=1e-5)
    assert jnp.abs(before[:, 2:] - after[:, 2:]).max() > 1e-2
