"""Random pipelines saved by diffusers, of other sizes than the goldens: converted, and sampled with
the same random numbers, they give the same frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from einops import rearrange
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    UMT5Config,
    UMT5EncoderModel,
)

from framepack_jax.conditioning import prompt_start
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.generation.noise import draw
from framepack_jax.generation.options import VideoOptions
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.settings import Settings
from tests.fixtures.paths import GOLDEN
from tests.fixtures.torch_reference import randomize

PROMPT, NEGATIVE = "the girl  dances on a red sofa &amp; laughs", "blurred static"
TOKENS, WINDOW, SECTIONS, SEED = 24, 2, 2, 5
HEIGHT, WIDTH = 128, 192
SIZES = {
    "num_attention_heads": 3, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 36,
    "freq_dim": 16, "text_dim": 20,
}  # fmt: skip
HELIOS = {**SIZES, "rope_dim": (4, 4, 4)}


def wan_parts() -> dict:
    """Tokenizer, text encoder and VAE of the Wan family."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "helios" / "pipeline" / "tokenizer")
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=20, d_kv=10, d_ff=30, num_layers=2, num_heads=2,
            relative_attention_num_buckets=12, relative_attention_max_distance=16,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=6, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        latents_mean=np.linspace(-1, 1, 16).tolist(), latents_std=np.linspace(0.5, 2, 16).tolist(),
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": randomize(text, 1), "vae": randomize(vae, 2)}


def helios() -> HeliosPipeline:
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    transformer = randomize(HeliosTransformer3DModel(**HELIOS), 3)
    return HeliosPipeline(**wan_parts(), scheduler=scheduler, transformer=transformer)


def mid() -> HeliosPyramidPipeline:
    return HeliosPyramidPipeline(
        **wan_parts(), scheduler=HeliosScheduler(use_dynamic_shifting=True),
        transformer=randomize(HeliosTransformer3DModel(**HELIOS), 3), is_cfg_zero_star=True,
    )  # fmt: skip


def distilled() -> HeliosPyramidPipeline:
    scheduler = HeliosDMDScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    return HeliosPyramidPipeline(
        **wan_parts(), scheduler=scheduler, is_distilled=True,
        transformer=randomize(HeliosTransformer3DModel(**HELIOS), 3),
    )  # fmt: skip


def wan() -> WanPipeline:
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    transformer = randomize(WanTransformer3DModel(**SIZES), 3)
    return WanPipeline(**wan_parts(), scheduler=scheduler, transformer=transformer)


def hunyuan() -> HunyuanVideoPipeline:
    folder = GOLDEN / "diffusers_pipeline" / "pipeline"
    llama = LlamaConfig(
        vocab_size=530, hidden_size=40, intermediate_size=56, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=1, rms_norm_eps=1e-5,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=410, hidden_size=20, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=2, eos_token_id=1, bos_token_id=0, hidden_act="gelu",
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=3, attention_head_dim=12, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, mlp_ratio=3.0, text_embed_dim=40, pooled_projection_dim=20,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(6, 12, 12, 18), layers_per_block=1, norm_num_groups=3
    )
    return HunyuanVideoPipeline(
        text_encoder=randomize(LlamaModel(llama), 1),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=randomize(CLIPTextModel(clip), 2),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        transformer=randomize(transformer, 3),
        vae=randomize(vae, 4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(x, "b t h w c -> b c t h w")))


def convert(pipeline, folder: Path, *, rope_axes: str | None = None) -> FramePack:
    pipeline.save_pretrained(folder / "pipeline")
    based = isinstance(pipeline, WanPipeline | HunyuanVideoPipeline)
    schedule = f"g{WINDOW}" if based else f"f1k1_x_f16k4f2k2f1k1_g{WINDOW}"
    tokens = None if isinstance(pipeline, HunyuanVideoPipeline) else TOKENS
    make_bundle(
        BundleRequest(
            output=str(folder / "bundle"), pipeline=folder / "pipeline", schedule=schedule,
            text_tokens=tokens, rope_axes=rope_axes,
        )
    )  # fmt: skip
    return FramePack.load(folder / "bundle")


def ours(pipe: FramePack, settings: Settings, noise: list[list[np.ndarray]]) -> np.ndarray:
    """Frames (P, H, W, 3) in [0, 1]."""
    options = VideoOptions(
        negative_prompt=NEGATIVE, sections=len(noise), height=HEIGHT, width=WIDTH
    )
    request, layout = options.prepare(pipe.geometry, None, PROMPT)
    inputs = pipe.encode([request], layout, settings)
    made = pipe.sample(layout.plan, inputs, settings, noise=noise)
    clips = [np.asarray(clip)[0] for _, _, clip, _ in pipe.decode(layout.plan, made)]
    return np.clip(np.concatenate(clips) / 2 + 0.5, 0, 1)


def noise_of(pipe: FramePack, sections: int) -> list[list[np.ndarray]]:
    shape = WINDOW, HEIGHT // 8, WIDTH // 8, 16
    return [draw(pipe.sampling.recipe, [SEED], i, shape) for i in range(sections)]


@pytest.mark.parametrize(
    ("make", "steps", "scale"),
    [(helios, 3, 4.0), (mid, (3, 2, 2), 4.0), (distilled, (2, 2, 2), 1.0)],
)
def test_helios(make, steps, scale: float, tmp_path, monkeypatch) -> None:
    pipeline = make()
    pipe = convert(pipeline, tmp_path)
    noise = noise_of(pipe, SECTIONS)
    starts = iter([channels_first(section[0]) for section in noise])
    blocks = iter([channels_first(x) for section in noise for x in section[1:]])
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *_, **__: next(starts))
    monkeypatch.setattr(
        pipeline, "sample_block_noise", lambda *_, **__: next(blocks), raising=False
    )
    counts = {"num_inference_steps": steps} if isinstance(steps, int) else {}
    if not counts:
        counts = {
            "pyramid_num_inference_steps_list": list(steps),
            "is_amplify_first_chunk": make is distilled,
        }
    theirs = pipeline(
        PROMPT, NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=SECTIONS * 5,
        guidance_scale=scale, max_sequence_length=TOKENS, history_sizes=[16, 2, 1],
        num_latent_frames_per_chunk=WINDOW, output_type="np", **counts,
    ).frames[0]  # fmt: skip
    frames = ours(pipe, Settings(steps=steps, cfg_scale=scale), noise)
    assert len(frames) == SECTIONS * 5
    assert np.abs(frames[: len(theirs)] - theirs).max() < 2e-3


def test_base_wan(tmp_path) -> None:
    pipeline = wan()
    pipe = convert(pipeline, tmp_path)
    noise = noise_of(pipe, 1)
    theirs = pipeline(
        PROMPT, NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=5, num_inference_steps=4,
        guidance_scale=3.0, max_sequence_length=TOKENS, latents=channels_first(noise[0][0]),
        output_type="np",
    ).frames[0]  # fmt: skip
    frames = ours(pipe, Settings(steps=4, cfg_scale=3.0), noise)
    assert frames.shape == theirs.shape and np.abs(frames - theirs).max() < 2e-3


def test_base_hunyuan_video(tmp_path) -> None:
    pipeline = hunyuan()
    pipe = convert(pipeline, tmp_path, rope_axes="4,4,4")
    template = pipe.encoders.template
    start = prompt_start(pipe.encoders.tokenizer, template)
    noise = noise_of(pipe, 1)
    theirs = pipeline(
        PROMPT, height=HEIGHT, width=WIDTH, num_frames=5, num_inference_steps=4,
        guidance_scale=6.0, latents=channels_first(noise[0][0]), output_type="np",
        prompt_template={"template": template, "crop_start": start}
    ).frames[0]  # fmt: skip
    frames = ours(pipe, Settings(steps=4, distilled_guidance=6.0), noise)
    assert frames.shape == theirs.shape and np.abs(frames - theirs).max() < 2e-3
