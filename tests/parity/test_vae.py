"""The causal 3-D autoencoder against diffusers' AutoencoderKLHunyuanVideo."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from framepack_jax.models.hunyuan import vae, vae_blocks
from framepack_jax.models.hunyuan.config import VaeConfig
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.tiling import Tiling
from framepack_jax.ops import conv
from tests.fixtures.reference_params import vae_params
from tests.fixtures.torch_reference import randomize, relative_error, to_jax

PARITY = 2e-4
DEFAULT = Tiling()
SMALL = VaeConfig(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4)


Pair = tuple[VaeConfig, dict, AutoencoderKLHunyuanVideo]


def torch_model(cfg: VaeConfig) -> AutoencoderKLHunyuanVideo:
    blocks = len(cfg.channels)
    return AutoencoderKLHunyuanVideo(
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        latent_channels=cfg.latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * blocks,
        up_block_types=("HunyuanVideoUpBlock3D",) * blocks,
        block_out_channels=cfg.channels,
        layers_per_block=cfg.layers_per_block,
        norm_num_groups=cfg.norm_groups,
        spatial_compression_ratio=cfg.space_compression,
        temporal_compression_ratio=cfg.time_compression,
    )


def make_pair(cfg: VaeConfig) -> Pair:
    """(config, our parameters, diffusers' model), the same random weights in both."""
    model = randomize(torch_model(cfg), seed=cfg.layers_per_block)
    return cfg, vae_params(model.state_dict()), model


@pytest.fixture(scope="module")
def small() -> Pair:
    return make_pair(SMALL)


def random_params(module: nn.Module, x: jax.Array) -> dict:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)


def sample(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(x: torch.Tensor) -> jax.Array:
    return to_jax(x.movedim(1, -1))


@torch.no_grad()
def assert_encodes_alike(
    pair: Pair, video: torch.Tensor, tiling: Tiling = DEFAULT, error: float = PARITY
) -> None:
    cfg, params, model = pair
    theirs = model.encode(video).latent_dist
    mean, logvar = vae.encode(cfg, params, ours(video), tiling)
    assert relative_error(mean, theirs.mean.movedim(1, -1)) < error
    assert relative_error(logvar, theirs.logvar.movedim(1, -1)) < error


@torch.no_grad()
def assert_decodes_alike(
    pair: Pair, latents: torch.Tensor, tiling: Tiling = DEFAULT, error: float = PARITY
) -> None:
    cfg, params, model = pair
    theirs = model.decode(latents).sample.movedim(1, -1)
    assert relative_error(vae.decode(cfg, params, ours(latents), tiling), theirs) < error


# Every shape of tile is compiled for seconds: the tests below share the few that they use.


@pytest.mark.parametrize("frames", [1, 9, 33])
def test_encoder_matches_diffusers(small, frames):
    """33 frames are three clips of 17, 17 and 9."""
    assert_encodes_alike(small, sample((1, 3, frames, 16, 24)))


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_decoder_matches_diffusers(small, frames):
    """Nine latent frames are three clips of 5, 5 and 3."""
    assert_decodes_alike(small, sample((1, 16, frames, 2, 3)))


def test_tiles_in_time_and_space_match_diffusers(small):
    """At sizes where diffusers has no narrower square: sides add up to the picture's."""
    tiling = Tiling(frames=8, frame_stride=8, size=16, stride=16)
    with diffusers_tiles(small[2], tiling):
        assert_encodes_alike(small, sample((1, 3, 17, 16, 32)), tiling)
        assert_decodes_alike(small, sample((1, 16, 5, 2, 4)), tiling)


def test_deeper_and_wider_network_matches_diffusers():
    cfg = VaeConfig(channels=(8, 12, 12, 24), layers_per_block=2, norm_groups=2, latent_channels=6)
    deep = make_pair(cfg)
    shapes = jax.eval_shape(lambda key: vae.init(cfg, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, deep[1]) == jax.tree.map(jnp.shape, shapes)
    assert_encodes_alike(deep, sample((1, 3, 9, 16, 8)))
    assert_decodes_alike(deep, sample((1, 6, 3, 2, 1)))


@contextlib.contextmanager
def diffusers_tiles(model: AutoencoderKLHunyuanVideo, tiling: Tiling) -> Iterator[None]:
    """diffusers' model set to a tiling, and to its own default afterwards."""
    before = vars(model).copy()
    model.use_framewise_encoding = model.use_framewise_decoding = tiling.frames is not None
    size, stride = tiling.size, tiling.stride
    model.enable_tiling(size, size, tiling.frames, stride, stride, tiling.frame_stride)
    model.use_tiling = size is not None
    yield
    vars(model).update(before)


class Standin(torch.nn.Module):
    """In place of a network: something cheap whose values depend on where in its tile a cell lies
    and on the size of the tile, so that every seam shows."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.function(x.movedim(1, -1).numpy())).movedim(-1, 1).clone()


def ramp(x: np.ndarray) -> np.ndarray:
    places = np.indices(x.shape[1:4]).transpose(1, 2, 3, 0)
    return (x * (1 + places @ np.array([0.1, 0.2, 0.3]) / x.shape[2])[..., None]).astype(np.float32)


def shrink(x: np.ndarray) -> np.ndarray:
    return ramp(x[:, ::4, ::8, ::8])


def grow(x: np.ndarray) -> np.ndarray:
    return ramp(np.repeat(np.repeat(np.repeat(x, 4, 1)[:, 3:], 8, 2), 8, 3))


@pytest.mark.parametrize(
    ("frames", "rows", "tiling"),
    [
        (17, 2, DEFAULT),
        (41, 2, DEFAULT),
        (29, 5, Tiling(frames=12, frame_stride=8)),
        (25, 6, Tiling(frames=None, size=24, stride=24)),
        (25, 3, Tiling(frames=8, frame_stride=4, size=24, stride=24)),
    ],
)
def test_seams_match_diffusers(monkeypatch, frames, rows, tiling):
    cfg = VaeConfig(4, 2, 2, (4, 4, 4, 4), 1, 4)
    model = torch_model(cfg)
    for name, standin in (
        ("encoder", Standin(shrink)),
        ("decoder", Standin(grow)),
        ("quant_conv", torch.nn.Identity()),
        ("post_quant_conv", torch.nn.Identity()),
    ):
        setattr(model, name, standin)
    monkeypatch.setattr(vae, "_encode", lambda cfg, params, x: shrink(np.asarray(x)))
    monkeypatch.setattr(vae, "_decode", lambda cfg, params, x: grow(np.asarray(x)))
    pair = cfg, {"encoder": {}, "decoder": {}}, model
    with diffusers_tiles(model, tiling):
        assert_encodes_alike(pair, sample((1, 4, frames, 8 * rows, 48)), tiling, 1e-6)
        assert_decodes_alike(pair, sample((1, 2, 1 + frames // 4, rows, 6)), tiling, 1e-6)


@pytest.mark.parametrize("rows", [4, 8, 9, 11, 19])
def test_squares_have_one_shape_and_fade_evenly(monkeypatch, rows):
    """A network that gives where its square begins: between two squares that rises as a line."""
    size, stride, columns = 4, 3, 9
    seen = set()

    def first_cell(cfg, params, x):
        seen.add(x.shape)
        frames, *area = 1 + 4 * (x.shape[1] - 1), 8 * x.shape[2], 8 * x.shape[3]
        return jnp.broadcast_to(x[:, :1, :1, :1], (1, frames, *area, 2))

    monkeypatch.setattr(vae, "_decode", first_cell)
    places = np.indices((rows, columns), np.float32).transpose(1, 2, 0)[None, None]
    tiling = Tiling(frames=None, size=8 * size, stride=8 * stride)
    cfg = VaeConfig(4, 2, 2, (4, 4, 4, 4), 1, 4)
    found = vae.decode(cfg, {"decoder": {}}, jnp.asarray(places), tiling)
    assert seen == {(1, 1, size, size, 2)}

    def fades(length: int) -> np.ndarray:
        starts = [*range(0, length - size, stride), length - size]
        ends = [(0.0, 0.0)]
        for before, after in itertools.pairwise(starts):
            ends += [(8 * after, before), (8 * (before + size), after)]
        return np.interp(np.arange(8 * length), *zip(*ends, strict=True))

    np.testing.assert_allclose(found[0, 0, :, 0, 0], fades(rows), atol=1e-5)
    np.testing.assert_allclose(found[0, 0, 0, :, 1], fades(columns), atol=1e-5)


def test_log_variance_is_clamped(small):
    cfg, params, _ = small
    quant = jax.tree.map(lambda p: 1000 * p, params["encoder"]["quant"])
    params = {"encoder": {**params["encoder"], "quant": quant}}
    _, logvar = vae.encode(cfg, params, ours(sample((1, 3, 1, 16, 24))))
    assert logvar.min() == -30 and logvar.max() == 20


def test_still_clip_repeats_the_latent_of_its_image(small):
    """A frame repeated gives every group norm the statistics of the single frame, and attention
    the same keys several times."""
    cfg, params, _ = small
    image = ours(sample((1, 3, 1, 16, 24)))
    first, _ = vae.encode(cfg, params, image)
    still, _ = vae.encode(cfg, params, jnp.repeat(image, 9, axis=1))
    assert relative_error(still, jnp.repeat(first, 3, axis=1)) < PARITY


def test_half_precision_stays_close_and_keeps_its_dtype(small):
    cfg, params, _ = small
    half = cast_params(params, jnp.bfloat16)
    latents = ours(sample((1, cfg.latent_channels, 3, 2, 3)))
    video = vae.decode(cfg, half, latents.astype(jnp.bfloat16))
    assert video.dtype == jnp.bfloat16
    assert relative_error(video, vae.decode(cfg, params, latents)) < 0.1
    mean, logvar = jax.eval_shape(lambda: vae.encode(cfg, half, video))
    assert mean.dtype == logvar.dtype == jnp.bfloat16


@pytest.mark.parametrize("block", ["down", "mid", "up"])
def test_gradient_is_finite_and_reaches_every_parameter(block):
    cfg = VaeConfig(
        channels=(4, 8), layers_per_block=1, norm_groups=2, space_compression=2, time_compression=2
    )
    module = {
        "down": vae_blocks.Down(cfg, 8, (2, 2, 2)),
        "mid": vae_blocks.Mid(cfg),
        "up": vae_blocks.Up(cfg, 8, (2, 2, 2)),
    }[block]
    x = ours(sample((1, 4, 3, 4, 4)))
    params = random_params(module, x)
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(module.apply(p, x) - 1))))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_full_size_has_the_released_number_of_parameters():
    params = jax.eval_shape(lambda key: vae.init(VaeConfig(), key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 246_478_803


@pytest.mark.parametrize(
    ("blocks", "space", "strides"),
    [
        (4, 8, ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        (3, 4, ((2, 2, 2), (2, 2, 2), (1, 1, 1))),
        (5, 16, ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        (3, 2, ((2, 2, 2), (2, 1, 1), (1, 1, 1))),
        (3, 8, ((2, 2, 2), (2, 2, 2), (1, 2, 2))),
    ],
)
def test_strides_follow_diffusers(blocks, space, strides):
    cfg = VaeConfig(
        channels=(4,) * blocks, layers_per_block=1, norm_groups=4, space_compression=space
    )
    assert cfg.strides == strides
    model = torch_model(cfg)
    for block, stride in zip(model.encoder.down_blocks, strides, strict=True):
        assert max(stride) == 1 or block.downsamplers[0].conv.conv.stride == stride
        assert (block.downsamplers is None) == (max(stride) == 1)
    for block, stride in zip(model.decoder.up_blocks, strides, strict=True):
        assert max(stride) == 1 or block.upsamplers[0].upsample_factor == stride
        assert (block.upsamplers is None) == (max(stride) == 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: VaeConfig(channels=(8, 8), space_compression=8), "space_compression is 8"),
        (lambda: VaeConfig(time_compression=3), "time_compression is 3"),
        (lambda: vae.encode(VaeConfig(), {}, jnp.zeros((1, 1, 12, 16, 3))), "got 12x16"),
        (lambda: vae.encode(VaeConfig(), {}, jnp.zeros((1, 3, 1, 16, 16))), r"\(B, T, H, W, 3\)"),
        (lambda: vae.decode(VaeConfig(), {}, jnp.zeros((1, 16, 1, 2, 2))), r"\(B, T, H, W, 16\)"),
        (
            lambda: vae.decode(VaeConfig(), {}, jnp.zeros((1, 1, 2, 2, 16)), Tiling(size=64)),
            "size 64 at a stride of None",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("sizes", "kernel", "stride"),
    [
        ((5, 4, 3), (3, 3, 3), (1, 1, 1)),
        ((5, 4, 6), (3, 3, 3), (2, 2, 2)),
        ((1, 5, 1), (3, 3, 1), (2, 1, 2)),
        ((4, 3, 3), (2, 1, 3), (1, 2, 1)),
        ((3, 2, 2), (1, 1, 1), (1, 1, 1)),
    ],
)
def test_convolution_ignores_the_future_and_all_forms_agree(sizes, kernel, stride):
    rng = np.random.default_rng(0)
    x, weights, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, *sizes, 3), (*kernel, 3, 4), (4,))
    )
    convolve = jax.jit(lambda x: conv.causal_conv3d(x, weights, bias, stride))
    out = convolve(x)
    assert out.shape == (2, *(-(-n // s) for n, s in zip(sizes, stride, strict=True)), 4)
    for now in range(sizes[0]):
        known = slice(0, now // stride[0] + 1)
        later = np.arange(sizes[0])[:, None, None, None] > now
        changed = convolve(np.where(later, np.float32(7), x))
        assert jnp.array_equal(out[:, known], changed[:, known])
    pad = [(0, 0), (kernel[0] - 1, 0), *[(k // 2, k // 2) for k in kernel[1:]], (0, 0)]
    padded = jnp.pad(x, pad, mode="edge")
    for form in (conv.by_volume, conv.by_frames, conv.by_pieces):
        np.testing.assert_allclose(
            form(padded, weights, stride), out - bias[None, None, None, None, :], atol=1e-5
        )


@pytest.mark.parametrize("channels", [3, conv.MAX_CONV_CHANNELS + 1])
@pytest.mark.parametrize(
    ("sizes", "kernel", "stride"),
    [
        ((5, 4, 6), (3, 3, 3), (1, 1, 1)),
        ((5, 6, 7), (3, 3, 3), (2, 2, 2)),
        ((4, 5, 4), (3, 3, 1), (2, 1, 2)),
        ((1, 3, 4), (3, 3, 3), (1, 2, 2)),
        ((3, 2, 2), (1, 1, 1), (1, 1, 1)),
    ],
)
def test_gradients_on_a_cpu_are_those_of_one_convolution(
    sizes, kernel, stride, channels, monkeypatch
):
    monkeypatch.setattr(conv, "PIECE_BYTES", 150)  # so that frames are cut into bands
    rng = np.random.default_rng(0)
    x, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, *sizes, channels), (*kernel, channels, 5))
    )
    pad = [(0, 0), (kernel[0] - 1, 0), *[(k // 2, k // 2) for k in kernel[1:]], (0, 0)]

    def reference(x, weights):
        return conv.by_volume(jnp.pad(x, pad, mode="edge"), weights, stride)

    expected, back = jax.vjp(reference, x, weights)
    padded = functools.partial(jnp.pad, pad_width=pad, mode="edge")
    out, our_back = jax.vjp(lambda x, w: conv.on_cpu(padded(x), w, stride), x, weights)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    towards = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for ours_, theirs in zip(our_back(towards), back(towards), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=2e-4)


def test_attention_reads_no_later_frame():
    cfg = SMALL
    x = ours(sample((2, 16, 4, 2, 3)))
    block = vae_blocks.Attention(cfg)
    params = random_params(block, x)
    # A change that moves no group statistic: the channels of a group trade places.
    later = x.at[:, 2:].set(x[:, 2:].reshape(2, 2, 2, 3, 4, 4)[..., ::-1].reshape(2, 2, 2, 3, 16))
    before, after = (block.apply(params, y) for y in (x, later))
    np.testing.assert_allclose(before[:, :2], after[:, :2], atol=1e-5)
    assert jnp.abs(before[:, 2:] - after[:, 2:]).max() > 1e-2
