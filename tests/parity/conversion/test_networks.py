"""Names and layouts of every network, compared tensor by tensor."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoFramepackTransformer3DModel,
)
from safetensors.torch import save_file

from framepack_jax.conversion import engine, tables
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.hunyuan.config import VaeConfig
from tests.fixtures.checkpoints import (
    CLIP,
    LLAMA,
    RELEASED,
    SIGLIP,
    abstract_checkpoint,
    assert_every_number_moved_once,
    assert_same,
    fused,
    plan_of,
    state_of,
    write_folder,
)
from tests.fixtures.torch_reference import randomize


def test_diffusers_transformer(framepack, tmp_path) -> None:
    leaves = dict(plan_of(write_folder(framepack, tmp_path / "model")).leaves())
    tensors = state_of(framepack)
    single = "single_transformer_blocks.2"
    out = tensors[f"{single}.proj_out.weight"]
    expected = {
        "single/02/attn_out/kernel": out[:, :32].T,
        "single/02/mlp_out/kernel": out[:, 32:].T,
        "single/02/mlp_out/bias": tensors[f"{single}.proj_out.bias"],
        "single/02/q_norm/scale": tensors[f"{single}.attn.norm_q.weight"],
        "single/02/qkv/kernel": fused(tensors, [f"{single}.attn.to_{x}.weight" for x in "qkv"]),
        "double/01/txt_mod/kernel": tensors["transformer_blocks.1.norm1_context.linear.weight"].T,
        "refiner/00/norm2/bias": tensors[
            "context_embedder.token_refiner.refiner_blocks.0.norm2.bias"
        ],
        "head/mod/kernel": tensors["norm_out.linear.weight"].T,
        "embed/guidance_in/bias": tensors["time_text_embed.guidance_embedder.linear_1.bias"],
        "embed/image_down/kernel": tensors["image_projection.down.weight"].T,
    }
    assert_same({path: leaves[path] for path in expected}, expected)
    bias = leaves["double/00/txt_qkv/bias"]
    for part, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        theirs = tensors[f"transformer_blocks.0.attn.{name}.bias"]
        np.testing.assert_array_equal(bias[part, 1], theirs[16:])
    patch, conv = leaves["embed/context_k2/kernel"], tensors["clean_x_embedder.proj_2x.weight"]
    for t, h, w, c in [(0, 0, 0, 0), (1, 2, 3, 5), (1, 3, 0, 15)]:
        row = ((t * 4 + h) * 4 + w) * 16 + c
        np.testing.assert_array_equal(patch[row], conv[:, c, t, h, w])


def test_vae(autoencoder, tmp_path) -> None:
    plan = plan_of(write_folder(autoencoder, tmp_path / "vae"), "vae")
    assert plan.cfg == VaeConfig(
        channels=(4, 8, 8), layers_per_block=1, norm_groups=2, latent_channels=5,
        space_compression=4,
    )  # fmt: skip
    leaves, tensors = dict(plan.leaves()), state_of(autoencoder)
    assert_every_number_moved_once(leaves, tensors)
    theirs = tensors["encoder.down_blocks.1.resnets.0.conv1.conv.weight"]
    ours = leaves["encoder/down_1/resnet_0/conv1/kernel"]
    np.testing.assert_array_equal(ours[2, 0, 1], theirs[:, :, 2, 0, 1].T)
    shortcut = tensors["encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight"]
    ours = leaves["encoder/down_1/resnet_0/shortcut/kernel"]
    np.testing.assert_array_equal(ours[0, 0, 0], shortcut[:, :, 0, 0, 0].T)
    qkv = leaves["decoder/mid/attention/qkv/kernel"]
    theirs = tensors["decoder.mid_block.attentions.0.to_v.weight"]
    np.testing.assert_array_equal(qkv[:, 2, 0], theirs.T)
    upsample = tensors["decoder.up_blocks.0.upsamplers.0.conv.conv.bias"]
    np.testing.assert_array_equal(leaves["decoder/up_0/upsample/bias"], upsample)


def llava() -> tuple[torch.nn.Module, transformers.PretrainedConfig]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LLAMA),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            image_size=14, patch_size=7,
        ),
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), config


def llamas() -> dict[str, tuple[dict[str, torch.Tensor], transformers.PretrainedConfig]]:
    """Return one text model under every naming: (state dict, config)."""
    config = transformers.LlamaConfig(**LLAMA)
    bare = randomize(transformers.LlamaModel(config), 4)
    causal = randomize(transformers.LlamaForCausalLM(config), 5)
    causal.model.load_state_dict(bare.state_dict())
    wrapped, wrapped_config = llava()
    wrapped.model.language_model.load_state_dict(bare.state_dict())
    new = wrapped.state_dict()
    old = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head", "language_model.lm_head")
        .replace("model.vision_tower", "vision_tower")
        .replace("model.multi_modal", "multi_modal"): tensor
        for name, tensor in new.items()
    }
    assert "model.language_model.norm.weight" in new and "language_model.model.norm.weight" in old
    return {
        "bare": (bare.state_dict(), config),
        "causal": (causal.state_dict(), config),
        "llava": (new, wrapped_config),
        "old llava": (old, wrapped_config),
    }


def test_llama_under_every_prefix(tmp_path) -> None:
    found = {}
    for name, (state, config) in llamas().items():
        config.save_pretrained(tmp_path / name)
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / name / "m.safetensors")
        plan = plan_of(tmp_path / name, "text_encoder")
        assert (plan.cfg.layers, plan.cfg.heads, plan.cfg.kv_heads) == (3, 4, 2)
        assert (plan.cfg.rope_theta, plan.cfg.norm_eps) == (1e4, 1e-6)
        found[name] = dict(plan.leaves())
    for leaves in found.values():
        assert_same(leaves, found["bare"])
    tensors = {k: v.numpy() for k, v in llamas()["bare"][0].items()}
    used = {
        k: v for k, v in tensors.items() if k[:9] not in ("layers.3.", "layers.4.", "norm.weig")
    }
    assert_every_number_moved_once(leaves, used)
    theirs = tensors["layers.2.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(leaves["layers/02/k/kernel"][:, 1, 3], theirs[8 + 3])
    theirs = tensors["layers.1.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(leaves["layers/01/mlp_norm/scale"], theirs)
    theirs = tensors["layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(leaves["layers/01/down/kernel"], theirs.T)


def test_clip_bare_and_inside_the_whole_model(tmp_path) -> None:
    text = transformers.CLIPTextConfig(**CLIP)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    whole_config = transformers.CLIPConfig(text_config=CLIP, vision_config=vision)
    bare = randomize(transformers.CLIPTextModel(text), 6)
    whole = randomize(transformers.CLIPModel(whole_config), 7)
    weights = {k.removeprefix("text_model."): v for k, v in bare.state_dict().items()}
    whole.text_model.load_state_dict(
        {k: weights[k.removeprefix("text_model.")] for k in whole.text_model.state_dict()}
    )
    plans = [
        plan_of(write_folder(model, tmp_path / name), "text_encoder_2")
        for name, model in {"bare": bare, "whole": whole}.items()
    ]
    leaves, from_whole = (dict(plan.leaves()) for plan in plans)
    assert plans[0].cfg == plans[1].cfg
    assert (plans[0].cfg.heads, plans[0].cfg.eos_token_id) == (3, 2)
    assert_same(from_whole, leaves)
    assert_every_number_moved_once(leaves, {k: v.numpy() for k, v in weights.items()})
    theirs = weights["encoder.layers.1.self_attn.v_proj.weight"].numpy()
    np.testing.assert_array_equal(leaves["layers/01/qkv/kernel"][:, 2, 1, 4], theirs[8 + 4])
    theirs = weights["embeddings.position_embedding.weight"].numpy()
    np.testing.assert_array_equal(leaves["position_embedding/embedding"], theirs)


def test_siglip_without_its_head(tmp_path) -> None:
    model = randomize(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP)), 8)
    plan = plan_of(write_folder(model, tmp_path / "siglip"), "image_encoder")
    assert (plan.cfg.image_size, plan.cfg.heads, plan.cfg.activation) == (17, 2, "gelu_tanh")
    leaves = dict(plan.leaves())
    tensors = {k.removeprefix("vision_model."): v for k, v in state_of(model).items()}
    used = {k: v for k, v in tensors.items() if not k.startswith("head.")}
    assert 0 < len(used) < len(tensors)
    assert_every_number_moved_once(leaves, used)
    theirs = tensors["embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(leaves["patch/kernel"][(3 * 7 + 5) * 3 + 2], theirs[:, 2, 3, 5])


@pytest.mark.parametrize("role", RELEASED)
def test_released_encoders_are_known_by_width(role: str, tmp_path) -> None:
    model, sizes = RELEASED[role]
    with torch.device("meta"):
        state = model(model.config_class(**sizes, intermediate_size=6)).state_dict()
    cfg = engine.make_job(tables.recognise(abstract_checkpoint(state, tmp_path), role)).cfg
    thin = {"layers": 1, "mlp_width": 6}
    if "vocab_size" in sizes:
        thin["vocab_size"] = 7
    assert cfg == dataclasses.replace(type(cfg)(), **thin)
    narrow = {k: v[tuple(slice(n // 2) for n in v.shape)] for k, v in state.items()}
    checkpoint = abstract_checkpoint(narrow, tmp_path)
    with pytest.raises(ConversionError, match=r"needs its config\.json"):
        engine.make_job(tables.recognise(checkpoint, role))


def test_full_size_models_fit(tmp_path) -> None:
    """Every tensor of the released models has its place; counts are those of the originals."""
    with torch.device("meta"):
        models = {
            "transformer": HunyuanVideoFramepackTransformer3DModel(
                has_image_proj=True, has_clean_x_embedder=True
            ),
            "vae": AutoencoderKLHunyuanVideo(),
        }
    counts = {"transformer": 12_874_314_816, "vae": 246_478_803}
    for role, model in models.items():
        checkpoint = abstract_checkpoint(model.state_dict(), tmp_path)
        plan = engine.make_job(tables.recognise(checkpoint, role))
        assert plan.cfg == type(plan.cfg)()
        assert plan.nbytes() == 2 * counts[role]
