"""Families of LoRA files by the names of their modules."""

import pytest

from framepack_jax.conversion import lora_names
from framepack_jax.conversion.lora_names import FAMILIES, HUNYUAN, WAN

HELIOS = WAN.config


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", (HUNYUAN, "diffusers'")),
        ("lora_unet_double_blocks_19_img_attn_qkv", (HUNYUAN, "Tencent's")),
        ("diffusion_model.single_blocks.3.modulation.lin", (HUNYUAN, "ComfyUI's")),
        ("transformer.blocks.39.attn2.to_out.0", (WAN, "diffusers'")),
        ("base_model.model.patch_mid", (WAN, "diffusers'")),
        ("lora_unet_blocks_0.cross_attn.v", (WAN, "original")),
        ("lora_transformer_blocks_0_attn1_to_q", (WAN, "diffusers'")),
        ("model.diffusion_model.time_projection.1", (WAN, "original")),
        # LTX-Video, Cosmos, Stable Diffusion.
        ("transformer.transformer_blocks.0.attn1.to_q", None),
        ("lora_unet_blocks_0_self_attn_q_proj", None),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", None),
        ("text_encoder.layers.0.q_proj", None),
    ],
)
def test_names_tell_the_family(module: str, expected) -> None:
    assert lora_names.recognise([module, "something.else"]) == expected


def test_most_modules_decide() -> None:
    """Both families have a proj_out."""
    modules = ["proj_out", "blocks.0.ffn.net.2", "transformer_blocks.0.attn.to_q", "blocks.1.ffn.2"]
    assert lora_names.recognise(modules) == (WAN, "diffusers'")
    mixed = ["proj_out", "blocks.0.cross_attn.k"]
    assert lora_names.recognise(mixed)[0] is WAN
    for family in FAMILIES.values():
        assert lora_names.recognise(["proj_out"], family) == (family, "diffusers'")


def test_families_by_config() -> None:
    for kind, family in FAMILIES.items():
        assert isinstance(family.config, kind)
        assert lora_names.family_of(family.config) is family
        assert {"diffusers", "original", "kohya", "comfyui"} <= family.namings.keys()
    assert WAN.release(HELIOS).architecture == "helios"
    assert HUNYUAN.release(HUNYUAN.config).version == "framepack"
