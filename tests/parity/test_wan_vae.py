"""Wan's causal autoencoder against diffusers' AutoencoderKLWan."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.numpy import load_file

from framepack_jax import conditioning, packing
from framepack_jax.generation.network import Network
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.models import registry
from framepack_jax.models.autoencoder import sample_posterior
from framepack_jax.models.params import Params, stack_layers
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.tiling import Tiling
from framepack_jax.models.wan import vae
from framepack_jax.models.wan.vae_config import WanVaeConfig
from framepack_jax.packing import Timeline
from tests.fixtures.checkpoints import plan_of
from tests.fixtures.torch_reference import convert_module, relative_error, to_jax
from tests.fixtures.wan import SMALL, TINY, torch_vae

PARITY = 2e-4
CHUNKS, WHOLE = Tiling(), Tiling(frames=None)

Pair = tuple[WanVaeConfig, Params, AutoencoderKLWan]


def make_pair(cfg: WanVaeConfig, folder) -> Pair:
    """(config, our parameters, diffusers' model), the same random weights in both."""
    model = torch_vae(cfg)
    found, params = convert_module(model, "vae", folder)
    assert found == cfg
    return cfg, params, model


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Pair:
    return make_pair(SMALL, tmp_path_factory.mktemp("vae"))


def sample(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ours(x: torch.Tensor) -> jax.Array:
    return to_jax(x.movedim(1, -1))


@torch.no_grad()
def assert_encodes_alike(pair: Pair, video: torch.Tensor, tiling: Tiling = CHUNKS) -> None:
    cfg, params, model = pair
    theirs = model.encode(video).latent_dist
    mean, logvar = vae.encode(cfg, params, ours(video), tiling)
    assert relative_error(mean, theirs.mean.movedim(1, -1)) < PARITY
    assert relative_error(logvar, theirs.logvar.movedim(1, -1)) < PARITY


@torch.no_grad()
def assert_decodes_alike(pair: Pair, latents: torch.Tensor, tiling: Tiling = CHUNKS) -> None:
    cfg, params, model = pair
    theirs = model.decode(latents).sample.movedim(1, -1)
    assert 0.01 < (theirs.abs() == 1).float().mean() < 0.9, "some are clamped"
    assert relative_error(vae.decode(cfg, params, ours(latents), tiling), theirs) < PARITY


@pytest.mark.parametrize("tiling", [CHUNKS, WHOLE])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decoder_matches_diffusers(small, frames, tiling):
    assert_decodes_alike(small, sample((2, 6, frames, 3, 5)), tiling)


@pytest.mark.parametrize("tiling", [CHUNKS, WHOLE])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encoder_matches_diffusers(small, frames, tiling):
    assert_encodes_alike(small, sample((2, 3, frames, 12, 20)), tiling)


def test_frames_beyond_the_last_chunk_are_not_read(tmp_path):
    """As diffusers, where a chunk has four frames."""
    cfg = WanVaeConfig(width=4, multipliers=(1, 2, 2), layers_per_block=1, halves_time=(True, True))
    assert_encodes_alike(make_pair(cfg, tmp_path), sample((1, 3, 8, 8, 4)))


def test_released_layout_matches_diffusers(tmp_path):
    cfg = WanVaeConfig(width=6, latent_channels=4)
    deep = make_pair(cfg, tmp_path)
    shapes = jax.eval_shape(lambda: vae.init(cfg, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, deep[1]) == jax.tree.map(jnp.shape, shapes)
    assert_encodes_alike(deep, sample((1, 3, 5, 16, 8)))
    assert_decodes_alike(deep, sample((1, 4, 2, 2, 1)))


def test_spatial_tiles_match_diffusers(tmp_path):
    """7 rows and 5 columns of latents in tiles of 4 every 3: at the border 1 row and 2 columns."""
    tiny = make_pair(TINY, tmp_path)
    tiny[2].enable_tiling(8, 8, 6, 6)
    tiling = Tiling(size=8, stride=6)
    assert_decodes_alike(tiny, sample((1, 3, 2, 7, 5)), tiling)
    assert_encodes_alike(tiny, sample((1, 3, 5, 14, 10)), tiling)


@pytest.mark.slow
def test_tiles_of_a_720p_video_match_diffusers(tmp_path):
    """The released layout at a twelfth of its width, in the tiles that diffusers takes by default:
    256 pixels every 192, in 4 rows and 7 columns."""
    pair = make_pair(WanVaeConfig(width=8), tmp_path)
    pair[2].enable_tiling()
    assert_decodes_alike(pair, sample((1, 16, 2, 90, 160)), Tiling(size=256, stride=192))


def rounded_otherwise(params: Params) -> Params:
    """Each weight is one unit in its last place larger or smaller."""
    random = np.random.default_rng(0)
    eps = np.finfo(np.float32).eps
    return jax.tree.map(lambda x: x * (1 + eps * random.choice([-1, 1], x.shape)), params)


def test_chunks_give_the_numbers_of_the_whole_clip(small):
    """As near as float32 can tell: like a clip whose weights are rounded otherwise."""
    cfg, params, _ = small
    near = jax.tree.map(np.float32, rounded_otherwise(params))
    latents = ours(sample((1, 6, 7, 3, 5)))
    chunks, whole = (vae.decode(cfg, params, latents, tiling) for tiling in (CHUNKS, WHOLE))
    rounding = relative_error(vae.decode(cfg, near, latents, WHOLE), whole)
    assert relative_error(chunks, whole) < 3 * rounding < 1e-4
    video = ours(sample((1, 3, 13, 12, 20)))
    found = (vae.encode(cfg, p, video, t) for p, t in
             ((params, CHUNKS), (params, WHOLE), (near, WHOLE)))  # fmt: skip
    for chunks, whole, other in zip(*found, strict=True):
        assert relative_error(chunks, whole) < 3 * relative_error(other, whole) < 1e-4


def test_gradient_through_chunks_is_that_of_the_whole_clip():
    params = jax.jit(lambda: vae.init(TINY, jax.random.key(0)))()
    video = jnp.tanh(ours(sample((1, 3, 5, 4, 4))))

    def gradient(tiling: Tiling) -> Params:
        def loss(params: Params) -> jax.Array:
            mean, logvar = vae.encode(TINY, params, video, tiling)
            z = sample_posterior(mean, logvar, jnp.ones_like(mean))
            return jnp.mean(jnp.square(vae.decode(TINY, params, z, tiling) - video))

        return jax.jit(jax.grad(loss))(params)

    chunks, whole = gradient(CHUNKS), gradient(WHOLE)
    for (path, a), b in zip(jax.tree.leaves_with_path(chunks), jax.tree.leaves(whole), strict=True):
        assert jnp.abs(b).max() > 0, jax.tree_util.keystr(path)
        assert jnp.abs(a - b).max() < 1e-4 * jnp.abs(b).max(), jax.tree_util.keystr(path)


def test_memory_of_chunks_does_not_grow_with_the_clip(compiled_anew):
    """Neither does the program. At once, both grow with every frame."""

    def compiled(frames: int, tiling: Tiling) -> tuple[int, int]:
        latents = jax.ShapeDtypeStruct((1, frames, 8, 8, SMALL.latent_channels), jnp.float32)
        params = registry.NETWORKS["wan_vae"].abstract_params(SMALL)
        program = jax.jit(lambda p, z: vae.decode(SMALL, p, z, tiling)).lower(params, latents)
        found = program.compile().memory_analysis()
        assert found.output_size_in_bytes == 4 * (1 + 2 * (frames - 1)) * 32 * 32 * 3
        return found.temp_size_in_bytes, len(program.as_text().splitlines())

    few, many = compiled(4, CHUNKS), compiled(16, CHUNKS)
    assert many[1] == few[1]
    assert many[0] < 1.05 * few[0]
    assert compiled(16, WHOLE)[0] > 2 * many[0]


@torch.no_grad()
def test_pipeline_encodes_and_decodes_as_diffusers(small):
    """Normalised latents by mode and by sample, and a section decoded alone."""
    cfg, params, model = small
    network = Network(registry.NETWORKS["wan_vae"], cfg, params)
    mean, std = (np.asarray(model.config[f"latents_{name}"]) for name in ("mean", "std"))
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 12, 20, 3), np.uint8)
    theirs = model.encode(torch.from_numpy(frames / 127.5 - 1).float().movedim(-1, 1)).latent_dist
    key = jax.random.key(0)
    spread = to_jax(theirs.std.movedim(1, -1))
    noise = spread * jax.random.normal(key, spread.shape)
    centre, scale = (x[None, None, None, None] for x in (mean, std))
    for given, drawn in ((None, 0), (key, noise)):
        expected = (to_jax(theirs.mean.movedim(1, -1)) + drawn - centre) / scale
        found = conditioning.clip_latents(*network, frames, mean, std, given)
        assert relative_error(found, expected) < PARITY
    pipe = FramePack(None, network, None, mean, std, packing.parse("g5"))
    clip = pipe.decode_clip((0, 5), Timeline.of(np.asarray(found)))
    latents = torch.from_numpy(np.asarray(found * scale + centre)).float().movedim(-1, 1)
    assert relative_error(clip, model.decode(latents).sample.movedim(1, -1)) < PARITY


def test_half_precision_stays_close_and_keeps_its_dtype(small):
    cfg, params, _ = small
    half = cast_params(params, jnp.bfloat16)
    latents = ours(sample((1, 6, 2, 3, 5)))
    video = vae.decode(cfg, half, latents.astype(jnp.bfloat16))
    assert video.dtype == jnp.bfloat16
    error = jnp.abs(video.astype(jnp.float32) - vae.decode(cfg, params, latents))
    assert error.mean() < 0.02


def test_full_size_has_the_parameters_of_diffusers():
    with torch.device("meta"):
        model = AutoencoderKLWan()
    found = registry.parameter_count("wan_vae", WanVaeConfig())
    assert found == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.golden
def test_golden_clip(golden):
    folder = golden / "helios"
    reference = load_file(folder / "reference.safetensors")
    pixels, mode, decoded = (
        jnp.asarray(np.moveaxis(reference[f"vae/{name}"], 1, -1))
        for name in ("pixels", "mode", "decoded")
    )
    plan = plan_of(folder / "pipeline" / "vae", "vae")
    fields = json.loads((folder / "pipeline" / "vae" / "config.json").read_text())
    assert plan.cfg.time_compression == fields["scale_factor_temporal"]
    params = stack_layers(dict(plan.leaves()), vae.STACKS)
    mean, _ = vae.encode(plan.cfg, params, pixels)
    assert relative_error(mean, mode) < PARITY
    for tiling in (CHUNKS, WHOLE):
        assert relative_error(vae.decode(plan.cfg, params, mode, tiling), decoded) < PARITY
