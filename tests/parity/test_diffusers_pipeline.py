"""A whole diffusers pipeline, converted and sampled: the golden one, and one made on the spot."""

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import (
    FramepackSamplingType,
)
from einops import rearrange
from PIL import Image
from safetensors.numpy import load_file
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from framepack_jax import conditioning, packing
from framepack_jax.cli import convert
from framepack_jax.generation.layout import fit_images, make_layout
from framepack_jax.generation.pipeline import FramePack, Inputs, Settings
from framepack_jax.generation.request import Request
from framepack_jax.packing import Section
from tests.fixtures.paths import GOLDEN
from tests.fixtures.torch_reference import randomize, relative_error

SCHEDULES = {
    "inverted": "f1k1_x_g{}_f1k1f2k2f16k4_td",
    "vanilla": "f1k1_x_f16k4f2k2f1k1_g{}",
}

FACTS = json.loads((GOLDEN / "diffusers_pipeline" / "reference.json").read_text())


def inputs_of(pipe: FramePack, image, prompt: str, negative: str, settings: Settings) -> Inputs:
    """Inputs of a video of the image's size; of one section, so that they serve all."""
    return planned(pipe, Request(prompt, image, negative), settings)[1]


def planned(
    pipe: FramePack, request: Request, settings: Settings, sections: int = 1
) -> tuple[tuple[Section, ...], Inputs]:
    """The plan and the inputs of a video of the image's size."""
    height, width = request.image.shape[:2]
    layout = make_layout(pipe.geometry, request, sections=sections, height=height, width=width)
    inputs = pipe.encode([fit_images(pipe.geometry, request, layout)], layout, settings)
    return layout.plan, inputs


def pixels(pipe: FramePack, plan, inputs, settings, noise) -> np.ndarray:
    """All frames (P, H, W, 3) in [0, 1], before they become uint8."""
    made = pipe.sample(plan, inputs, settings, noise=noise)
    spans = [(start, np.asarray(frames)[0]) for _, start, frames, _ in pipe.decode(plan, made)]
    frames = np.concatenate([frames for _, frames in sorted(spans, key=lambda span: span[0])])
    return np.clip(frames / 2 + 0.5, 0, 1)


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "diffusers_pipeline"


@pytest.fixture(scope="module")
def arrays(folder):
    return load_file(folder / "reference.safetensors")


@pytest.fixture(scope="module")
def image(folder) -> np.ndarray:
    return np.asarray(Image.open(folder / "image.png").convert("RGB"))


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("diffusers") / "bundle"
    convert.main(["--pipeline", str(folder / "pipeline"), "--output", str(root)])
    return root


@pytest.fixture(scope="module")
def pipe(converted) -> FramePack:
    return FramePack.load(converted, dtype="float32")


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:prompt")
@pytest.mark.parametrize("name", FACTS["prompts"])
def test_prompts(pipe, arrays, name: str) -> None:
    prompt, encoders = FACTS["prompts"][name], pipe.encoders
    assert encoders.template == FACTS["prompt_template"]["template"]
    ids, mask, start = conditioning.tokenize_prompt(encoders.tokenizer, encoders.template, [prompt])
    assert start == FACTS["prompt_template"]["crop_start"]
    np.testing.assert_array_equal(ids, arrays[f"llama_ids_{name}"])
    np.testing.assert_array_equal(mask, arrays[f"llama_mask_{name}"])
    ids = conditioning.tokenize_summary(encoders.tokenizer_2, [prompt], 77)
    np.testing.assert_array_equal(ids, arrays[f"clip_ids_{name}"])
    text, valid, pooled = conditioning.encode_prompt(encoders, [prompt])
    np.testing.assert_array_equal(valid, arrays[f"prompt_mask_{name}"])
    valid = np.asarray(valid)
    theirs = arrays[f"prompt_embeds_{name}"]
    assert relative_error(np.asarray(text)[valid], theirs[valid]) < 2e-4
    assert relative_error(pooled, arrays[f"pooled_{name}"]) < 2e-4


@pytest.mark.golden
def test_image(pipe, arrays, image) -> None:
    theirs = rearrange(arrays["siglip_pixels"], "b c h w -> b h w c")
    assert relative_error(pipe.encoders.image_processor(image[None]), theirs) < 1e-6
    states = conditioning.encode_image(pipe.encoders, image[None])
    assert relative_error(states, arrays["siglip_last_hidden_state"]) < 2e-4
    ours = inputs_of(pipe, image, "", "", Settings()).given[0][:, None]
    theirs = rearrange(arrays["image_latents_mode"], "b c t h w -> b t h w c")
    assert relative_error(ours, theirs) < 2e-4


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:prompt")
@pytest.mark.parametrize("name", FACTS["runs"])
def test_frames(converted, arrays, image, name: str) -> None:
    run = FACTS["runs"][name]
    assert image.shape == (FACTS["height"], FACTS["width"], 3)
    schedule = SCHEDULES[run["sampling"]].format(FACTS["latent_window_size"])
    pipe = FramePack.load(converted, dtype="float32", schedule=packing.parse(schedule))
    settings = Settings(
        steps=FACTS["steps"],
        sampler=FACTS["sampler"],
        distilled_guidance=FACTS["guidance_scale"],
        cfg_scale=run.get("cfg", 1.0),
    )
    negative = FACTS["negative_prompt"] if run.get("negative") else ""
    inputs = inputs_of(pipe, image, FACTS["prompts"][run["prompt"]], negative, settings)
    plan = packing.plan(pipe.schedule, run["sections"])
    noise = [
        rearrange(arrays[f"{name}/noise{i}"], "b c t h w -> b t h w c") for i in range(len(plan))
    ]
    ours = pixels(pipe, plan, inputs, settings, noise)
    theirs = arrays[f"{name}/frames_every_3rd"].astype(np.float32)
    assert np.abs(ours[::3] - theirs).max() < 1e-3


@pytest.fixture(scope="module")
def live(folder) -> HunyuanVideoFramepackPipeline:
    """A pipeline with random weights and sizes other than the golden one's."""
    transformer = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=3, attention_head_dim=12, num_layers=1, num_single_layers=3,
        num_refiner_layers=1, mlp_ratio=3.0, text_embed_dim=40, pooled_projection_dim=20,
        rope_axes_dim=(4, 4, 4), image_proj_dim=18, has_image_proj=True, has_clean_x_embedder=True,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(6, 12, 12, 18), layers_per_block=1, norm_num_groups=3
    )
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=530, hidden_size=40, intermediate_size=56, num_hidden_layers=4,
            num_attention_heads=5, num_key_value_heads=1, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=410, hidden_size=20, intermediate_size=36, num_hidden_layers=2,
            num_attention_heads=2, eos_token_id=1, bos_token_id=0, hidden_act="gelu",
        )
    )  # fmt: skip
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=18, intermediate_size=30, num_hidden_layers=3, num_attention_heads=3,
            image_size=56, patch_size=14,
        )
    )  # fmt: skip
    networks = (transformer, vae, llama, clip, siglip)
    for seed, network in enumerate(networks):
        randomize(network, seed)
    return HunyuanVideoFramepackPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "pipeline" / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "pipeline" / "tokenizer_2"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        feature_extractor=SiglipImageProcessor(size={"height": 56, "width": 56}),
        transformer=transformer, vae=vae, text_encoder=llama, text_encoder_2=clip,
        image_encoder=siglip,
    )  # fmt: skip


@pytest.mark.golden
@pytest.mark.parametrize(
    ("sampling", "ends"), [("inverted", False), ("inverted", True), ("vanilla", False)]
)
def test_live_pipeline_end_to_end(
    live, image, tmp_path, monkeypatch, sampling: str, ends: bool
) -> None:
    """Saved by diffusers, converted, sampled with the same noise, images and prompt."""
    window, sections, steps, prompt = 2, 2, 3, "a red circle moves left, 日本語"
    picture = Image.fromarray(image).resize((80, 112))
    last = picture.transpose(Image.Transpose.ROTATE_180) if ends else None
    noise = torch.randn((sections, 1, 16, window, 14, 10), generator=torch.manual_seed(5))
    drawn = iter(noise)
    encode = live.vae.encode

    def mode_latents(image, dtype=None, device=None, generator=None, latents=None):
        """diffusers samples the start latent; the mode is what can be compared."""
        return encode(image.unsqueeze(2)).latent_dist.mode() * live.vae.config.scaling_factor

    def image_states(image, device=None, dtype=None):
        """diffusers hands floats to the image processor; the authors, and we, the uint8 image."""
        pixels = live.feature_extractor(images=picture, return_tensors="pt").pixel_values
        return live.image_encoder(pixel_values=pixels).last_hidden_state

    monkeypatch.setattr(live, "prepare_image_latents", mode_latents)
    monkeypatch.setattr(live, "encode_image", image_states)
    monkeypatch.setattr(live, "prepare_latents", lambda *args, **kwargs: next(drawn).clone())
    live.set_progress_bar_config(disable=True)
    theirs = live(
        image=picture, last_image=last, prompt=prompt, height=112, width=80,
        latent_window_size=window,
        num_frames=sections * (4 * (window - 1) + 1), num_inference_steps=steps,
        guidance_scale=7.0, prompt_template=FACTS["prompt_template"], output_type="np",
        sampling_type=FramepackSamplingType(
            "inverted_anti_drifting" if sampling == "inverted" else sampling
        ),
    ).frames[0]  # fmt: skip
    assert next(drawn, None) is None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(tmp_path / "saved")
    root = tmp_path / "bundle"
    schedule = SCHEDULES[sampling].format(window)
    convert.main(
        ["--pipeline", str(tmp_path / "saved"), "--output", str(root), "--schedule", schedule]
    )
    pipe = FramePack.load(root, dtype="float32")
    settings = Settings(steps=steps, sampler="euler", distilled_guidance=7.0)
    end = None if last is None else np.asarray(last)
    request = Request(prompt, np.asarray(picture), end_image=end)
    plan, inputs = planned(pipe, request, settings, sections)
    noise = [rearrange(x.numpy(), "b c t h w -> b t h w c") for x in noise]
    ours = pixels(pipe, plan, inputs, settings, noise)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3
