"""LoRA files of Wan and Helios in every naming: read, written, and loaded by diffusers and ComfyUI.

The reference is PEFT's output on diffusers' networks.
"""

import copy
import re

import jax
import numpy as np
import pytest
import torch
from diffusers import HeliosPipeline, WanPipeline
from safetensors.numpy import load_file, save_file

from framepack_jax.conversion import lora as files
from framepack_jax.conversion import lora_names
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import lora, registry
from framepack_jax.models.lora import Factors
from framepack_jax.models.wan import transformer
from tests.fixtures.checkpoints import leaves_of, write
from tests.fixtures.lora import QUICK, assert_same_lora, changes, config_of, randomize_adapters
from tests.fixtures.torch_reference import convert_module, randomize, relative_error
from tests.fixtures.wan_networks import (
    MODULES,
    RELEASE_CONFIG,
    Tensors,
    arguments,
    draw,
    original_name,
    torch_velocity,
)

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch
velocity = jax.jit(transformer.velocity, static_argnames=("cfg",), compiler_options=QUICK)
PIPELINES = {"helios": HeliosPipeline, "wan": WanPipeline}
NAMINGS = tuple(lora_names.WAN.namings)
# What diffusers converts of files in other names: not the patch embeddings.
CONVERTED = {"diffusers": "", "original": "blocks|head|embed/t", "kohya": "blocks"}


@pytest.fixture(scope="module", params=["helios", "wan"])
def network(request, tmp_path_factory):
    """(name, module, config, parameters, inputs)."""
    module = randomize(MODULES[request.param](), seed=1)
    cfg, params = convert_module(module, "transformer", tmp_path_factory.mktemp("dit"))
    return request.param, module, cfg, params, draw(4, 6, cfg.text_dim)


@pytest.fixture(scope="module")
def peft(network, tmp_path_factory):
    """(what diffusers saves of adapters on all layers, the velocity of the adapted network)."""
    _, module, _, _, tensors = network
    adapted = copy.deepcopy(module)
    config = config_of(
        module,
        rank_pattern={"attn1.to_q": 3, r"^blocks.1.ffn.net.2": 5},
        alpha_pattern={"attn1.to_k": 2, r"^proj_out": 1},
    )
    adapted.add_adapter(config)
    randomize_adapters(adapted)
    folder = tmp_path_factory.mktemp("peft")
    adapted.save_lora_adapter(folder)
    (file,) = folder.iterdir()
    return file, torch_velocity(adapted, tensors)


def random_lora(cfg) -> lora.LoRA:
    """Factors for all kernels; q, k and v have one first factor."""
    random = np.random.default_rng(0)
    made = {}
    for path, leaf in registry.abstract_leaves("wan_packed_dit", cfg).items():
        if path.endswith("/kernel"):
            rank = int(random.integers(1, 4))
            a = random.standard_normal((leaf.shape[0], rank), np.float32) / leaf.shape[0] ** 0.5
            b = 0.3 * random.standard_normal((rank, *leaf.shape[1:]), np.float32)
            made[path] = Factors(np.float32(a), b, np.full(rank, 0.7))
    return made


def test_beside_the_kernels_as_in_peft(network, peft) -> None:
    _, module, cfg, params, tensors = network
    file, theirs = peft
    found = files.read(file, cfg)
    assert found.applied == found.modules == len(config_of(module).target_modules)
    assert found.ranks.keys() == {3, 4, 5} and "diffusers' names" in found.summary()
    attached = lora.attach(params, found.lora)
    given = arguments(cfg, tensors)
    assert relative_error(velocity(cfg, attached, *given), theirs) < 1e-5
    assert relative_error(torch_velocity(module, tensors), theirs) > 0.1
    merged = lora.merge({"embed": attached["embed"]})["embed"]["patch"]["kernel"]
    assert relative_error(merged, params["embed"]["patch"]["kernel"]) > 0.1


@pytest.mark.parametrize("naming", ["diffusers", "original", "kohya"])
def test_diffusers_loads_what_is_written(naming: str, network, tmp_path) -> None:
    """By its pipelines' own loaders, which convert the names of the release and musubi-tuner's."""
    name, module, cfg, params, tensors = network
    made = {p: f for p, f in random_lora(cfg).items() if re.match(CONVERTED[naming], p)}
    file = tmp_path / "x.safetensors"
    files.write(file, made, cfg, naming)
    state, metadata = PIPELINES[name].lora_state_dict(file, return_lora_metadata=True)
    adapted = copy.deepcopy(module)
    PIPELINES[name].load_lora_into_transformer(state, adapted, metadata=metadata)
    theirs = torch_velocity(adapted, tensors)
    ours = velocity(cfg, lora.attach(params, made), *arguments(cfg, tensors))
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(torch_velocity(module, tensors), theirs) > 0.1


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_goes_out_and_in(naming: str, network, tmp_path) -> None:
    _, _, cfg, _, _ = network
    made = random_lora(cfg)
    files.write(tmp_path / "x.safetensors", made, cfg, naming)
    found = files.read(tmp_path / "x.safetensors", cfg)
    assert not found.unmatched
    # The patch embeddings have one name in both.
    assert ("original" in found.naming) == (naming != "diffusers")
    for path, change in changes(found.lora).items():
        assert relative_error(change, changes(made)[path]) < 1e-6, path
    assert found.lora.keys() == made.keys()
    if lora_names.WAN.namings[naming].alpha:
        assert_same_lora(found.lora, made)


def comfyui_changes(module: torch.nn.Module, tensors: Tensors) -> Tensors:
    """What ComfyUI adds to the weights of the release, by the keys that `comfy/lora.py` looks up:
    `lora_unet_` and the name with underscores, or `diffusion_model.` and the name. Checks that it
    uses every tensor of the file."""
    tensors, added = dict(tensors), {}
    for name, weight in module.state_dict().items():
        original = original_name(name).removesuffix(".weight")
        for key in (f"lora_unet_{original.replace('.', '_')}", f"diffusion_model.{original}"):
            for ups, downs in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if (up := tensors.pop(f"{key}.{ups}.weight", None)) is not None:
                    down = tensors.pop(f"{key}.{downs}.weight")
                    scale = tensors.pop(f"{key}.alpha", np.float32(len(down))) / len(down)
                    product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
                    added[original] = scale * product.reshape(weight.shape)
    assert not tensors
    return added


@pytest.mark.parametrize("naming", ["original", "kohya", "comfyui"])
def test_comfyui_adds_the_same(naming: str, network, tmp_path) -> None:
    _, module, cfg, _, _ = network
    made = random_lora(cfg)
    file = tmp_path / "x.safetensors"
    files.write(file, made, cfg, naming)
    (tmp_path / "config.json").write_text(RELEASE_CONFIG)
    added = comfyui_changes(module, load_file(file))
    names = {original_name(name): tensor for name, tensor in module.state_dict().items()}
    leaves = {}
    for adapted in (False, True):
        state = {
            name: tensor + torch.from_numpy(np.float32(added[module]))
            if adapted and (module := name.removesuffix(".weight")) in added and name != module
            else tensor
            for name, tensor in names.items()
        }
        leaves[adapted] = leaves_of(write(state, tmp_path / f"{adapted}.safetensors"))
    ours = changes(made)
    for path, leaf in leaves[True].items():
        change = leaf - leaves[False][path]
        assert (path in ours) == bool(change.any()), path
        if path in ours:
            assert relative_error(change, ours[path]) < 1e-5, path


def spelt(tensors: Tensors, naming: str) -> Tensors:
    """diffusers' tensors in other names that trainers use."""
    made = {}
    for name, x in tensors.items():
        module, side = name.rsplit(".lora_", 1)
        original = original_name(module)
        down = {"A.weight": "down.weight", "B.weight": "up.weight"}[side]
        made |= {
            "pipeline": {f"transformer.{name}": x},
            "peft": {f"base_model.model.{module}.lora_{side}": x},
            "dotted": {f"diffusion_model.{original}.lora_{side}": x},
            "musubi": {f"lora_unet_{original.replace('.', '_')}.lora_{down}": x},
            # Some trainers flatten the block's number only.
            "half": {f"lora_unet_{original.replace('.', '_', 1)}.lora_{down}": x},
            "net": {f"net.{original}.lora_{side}": x},
        }[naming]
    return made


@pytest.mark.parametrize("naming", ["pipeline", "peft", "dotted", "musubi", "half", "net"])
def test_the_same_under_every_prefix(naming: str, network, peft, tmp_path) -> None:
    _, _, cfg, _, _ = network
    tensors = load_file(peft[0])
    for name, state in {"bare": tensors, "spelt": spelt(tensors, naming)}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    bare, other = (files.read(tmp_path / f"{n}.safetensors", cfg) for n in ("bare", "spelt"))
    assert not other.unmatched
    assert_same_lora(other.lora, bare.lora)


def factors(*modules: str) -> Tensors:
    return {
        f"{module}.lora_{side}.weight": np.ones((36, 2) if side == "B" else (2, 36), np.float32)
        for module in modules
        for side in "AB"
    }


def test_a_lora_of_the_other_family_is_named(network, tmp_path) -> None:
    _, _, cfg, _, _ = network
    file = tmp_path / "x.safetensors"
    hunyuan = lora_names.HUNYUAN.config
    # The head has one name in both.
    for modules in (
        ("transformer.transformer_blocks.0.attn.to_q", "transformer.proj_out"),
        ("diffusion_model.double_blocks.0.img_attn_qkv",),
        ("lora_unet_single_transformer_blocks_0_proj_mlp",),
    ):
        save_file(factors(*modules), file)
        with pytest.raises(
            ConversionError,
            match=r"is a LoRA of a transformer of HunyuanVideo or FramePack .* is a transformer of"
            " Wan or Helios; give a LoRA of Wan or Helios",
        ):
            files.read(file, cfg)
    for module in ("lora_unet_blocks_0_cross_attn_k", "transformer.blocks.0.ffn.net.2"):
        save_file(factors(module, "proj_out", "text_encoder.0.q"), file)
        with pytest.raises(
            ConversionError,
            match=r"is a LoRA of a transformer of Wan or Helios .* give a LoRA of HunyuanVideo",
        ):
            files.read(file, hunyuan)


def test_names_that_are_near(network, tmp_path) -> None:
    """LTX-Video's and Stable Diffusion's blocks end as Wan's begin."""
    _, _, cfg, _, _ = network
    ltx = [f"transformer.transformer_blocks.{i}.attn1.to_q" for i in range(2)]
    unet = [f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_q" for i in range(2)]
    cosmos = [f"lora_unet_blocks_{i}_self_attn_q_proj" for i in range(2)]
    for modules in (ltx, unet, cosmos):
        save_file(factors(*modules), tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match="none of its 2 modules is one of this network"):
            files.read(tmp_path / "x.safetensors", cfg)


@pytest.mark.parametrize("entry", ["ffn.0.diff_b", "norm3.diff", "self_attn.norm_q.w_norm"])
def test_files_of_differences_are_refused(entry: str, network, tmp_path) -> None:
    """As those that distil Wan into few steps have them beside their factors."""
    _, _, cfg, _, _ = network
    state = factors("diffusion_model.blocks.0.self_attn.q")
    name = f"diffusion_model.blocks.0.{entry}"
    save_file(state | {name: np.zeros(36, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=f"a file of full differences .{name}.*not supported"):
        files.read(tmp_path / "x.safetensors", cfg)


def test_image_layers_of_a_lora_are_left_out(network, tmp_path) -> None:
    """Those of image-to-video, which text-to-video does not have."""
    _, _, cfg, _, _ = network
    block = "diffusion_model.blocks.0.cross_attn"
    save_file(factors(f"{block}.k", f"{block}.k_img"), tmp_path / "x.safetensors")
    found = files.read(tmp_path / "x.safetensors", cfg)
    assert found.unmatched == (f"{block}.k_img",)
    assert "LoRA of a transformer of Wan or Helios alone" in found.warning()


def test_amplified_history_has_names_too(tmp_path) -> None:
    cfg, _ = convert_module(randomize(MODULES["variant"](), 1), "transformer", tmp_path / "dit")
    made = {p: f for p, f in random_lora(cfg).items() if p.startswith("blocks/00")}
    for naming in NAMINGS:
        files.write(tmp_path / f"{naming}.safetensors", made, cfg, naming)
        assert files.read(tmp_path / f"{naming}.safetensors", cfg).lora.keys() == made.keys()
