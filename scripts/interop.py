"""Exchange LoRA files and networks with other programs, by their own code:

    python scripts/interop.py CHECKOUTS [PROGRAM ...]

CHECKOUTS is a folder with clones of the programs in PROGRAMS, as far as they are there; diffusers
and PEFT are installed packages. Each program runs in a process of its own and needs what it imports
(torchvision, torchsde, gguf and so on). Prints a table: what was given to whose loader, how many
modules arrived, and the largest difference of what they add to their outputs on random inputs,
relative to the largest that they should add.

The network of the LoRAs has one double and one single block of the released width, which some
loaders have as a constant. Ranks are 4, of the output projection of the single block 8; alpha is 1.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from framepack_jax.conversion import lora, lora_names
from framepack_jax.models.hunyuan import transformer as transformer_model
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions

WIDTH, MLP, RANK, ALPHA = 3072, 12288, 4, 1.0
CFG = dataclasses.replace(TransformerConfig(), double_layers=1, single_layers=1)
# {module in diffusers' names: (outputs, inputs)}; q, k and v share their first factor.
MODULES = {
    **{f"transformer_blocks.0.attn.{n}": (WIDTH, WIDTH) for n in ("to_q", "to_k", "to_v")},
    "transformer_blocks.0.attn.to_out.0": (WIDTH, WIDTH),
    **{f"transformer_blocks.0.attn.add_{n}_proj": (WIDTH, WIDTH) for n in "qkv"},
    "transformer_blocks.0.attn.to_add_out": (WIDTH, WIDTH),
    **{f"transformer_blocks.0.{n}.net.0.proj": (MLP, WIDTH) for n in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{n}.net.2": (WIDTH, MLP) for n in ("ff", "ff_context")},
    **{f"single_transformer_blocks.0.attn.{n}": (WIDTH, WIDTH) for n in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp": (MLP, WIDTH),
    "single_transformer_blocks.0.proj_out": (WIDTH, WIDTH + MLP),
}
SHARED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
QKV = [f"{DOUBLE}.attn.to_{n}" for n in "qkv"]
ADDED = [f"{DOUBLE}.attn.add_{n}_proj" for n in "qkv"]
LINEAR1 = [f"{SINGLE}.attn.to_{n}" for n in "qkv"] + [f"{SINGLE}.proj_mlp"]
# Modules of other names, with dots as underscores: what their outputs are made of.
FUSED = {
    "double_blocks_0_img_attn_qkv": QKV,
    "double_blocks_0_txt_attn_qkv": ADDED,
    "double_blocks_0_img_attn_proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks_0_txt_attn_proj": [f"{DOUBLE}.attn.to_add_out"],
    **{
        f"double_blocks_0_{side}_mlp_{name}": [f"{DOUBLE}.{net}.net.{part}"]
        for side, net in (("img", "ff"), ("txt", "ff_context"))
        for name, part in (("fc1", "0.proj"), ("0", "0.proj"), ("fc2", "2"), ("2", "2"))
    },
    "single_blocks_0_linear1": LINEAR1,
    "single_blocks_0_linear2": [f"{SINGLE}.proj_out"],
    "transformer_blocks_0_attn_qkv": QKV,
    "transformer_blocks_0_attn_added_qkv": ADDED,
    "single_transformer_blocks_0_qkv_mlp": LINEAR1,
} | {name.replace(".", "_"): [name] for name in MODULES}

Factors = tuple[torch.Tensor, torch.Tensor]
# {module with underscores for dots: (inputs, n) -> what the LoRA adds to its outputs, (outputs, n)}
Changes = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclasses.dataclass
class Row:
    """A line of the table: whose loader read what, what arrived, and how far off it is."""

    program: str
    read: str
    arrived: str
    difference: str

    def __str__(self) -> str:
        return f"| {self.program} | {self.read} | {self.arrived} | {self.difference} |"


# The LoRA that is exchanged


def factors() -> dict[str, Factors]:
    """{module: (up, down)}, such that the change is alpha / rank times their product."""
    random = torch.Generator().manual_seed(0)
    made, shared = {}, {}
    for name, (outputs, inputs) in MODULES.items():
        rank = 2 * RANK if name.endswith("proj_out") else RANK
        down = torch.randn(rank, inputs, generator=random) / inputs**0.5
        up = torch.randn(outputs, rank, generator=random)
        block, last = name.rsplit(".", 1)
        if last in SHARED:
            down = shared.setdefault((block, last.startswith("add")), down)
        if name.endswith("proj_out"):
            # The two kernels here, of attention and of the MLP.
            down[:RANK, WIDTH:] = down[RANK:, :WIDTH] = 0
        made[name] = up, down
    return made


def kohya(made: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """As musubi-tuner writes a LoRA of FramePack."""
    tensors = {}
    for name, (up, down) in made.items():
        module = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down.clone()}
        tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
    return tensors


def change(up: torch.Tensor, down: torch.Tensor, alpha: float = ALPHA):
    """Return what factors add to the outputs of a module."""
    return lambda x: up.float() @ (down.float() @ x) * (alpha / len(down))


def expected() -> Changes:
    return {name.replace(".", "_"): change(*pair) for name, pair in factors().items()}


def compare(found: Changes, want: Changes) -> tuple[str, str]:
    """(modules that arrived of those that should, largest relative difference on random inputs)."""
    wanted, worst = dict.fromkeys(want, False), 0.0
    for name, added in found.items():
        parts = FUSED.get(name, [])
        if not parts or any(part.replace(".", "_") not in want for part in parts):
            return f"{name} is not expected", "-"
        _, inputs = MODULES[parts[0]]
        x = torch.randn(inputs, 8, generator=torch.Generator().manual_seed(1))
        parts = [part.replace(".", "_") for part in parts]
        right = torch.cat([want[part](x) for part in parts])
        worst = max(worst, float((added(x) - right).abs().max() / right.abs().max()))
        wanted |= dict.fromkeys(parts, True)
    there = sum(wanted.values())
    return f"{there} of {len(wanted)} modules", f"{worst:.1e}" if there else "-"


def attempt(program: str, read: str, load: Callable[[], Changes], want: Changes | None = None):
    """A row; what a loader raises stands in it."""
    try:
        with torch.no_grad():
            return Row(program, read, *compare(load(), want or expected()))
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        return Row(program, read, f"{type(error).__name__}: {said[0][:90]}", "-")


def ours(file: Path) -> Changes:
    """A file as this project reads it."""
    with tempfile.TemporaryDirectory() as folder:
        read = lora.read(file, CFG)
        lora.write(Path(folder) / "x.safetensors", read.lora, CFG)
        return of_tensors(load_file(Path(folder) / "x.safetensors"), "transformer.")


def of_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> Changes:
    """The changes of a state dict with lora_A and lora_B, or lora_down, lora_up and alpha."""
    found = {}
    for name, up in tensors.items():
        match = re.fullmatch(rf"{prefix}(.+)\.lora_(B|up)\.weight", name)
        if match is None:
            continue
        other = {"B": "A", "up": "down"}[match[2]]
        down = tensors[name.replace(f".lora_{match[2]}.", f".lora_{other}.")]
        alpha = float(tensors.get(f"{prefix}{match[1]}.alpha", len(down)))
        found[match[1].replace(".", "_")] = change(up, down, alpha)
    return found


def of_peft(model: torch.nn.Module, adapter: str) -> Changes:
    """The changes of the adapters in a module."""
    return {
        name.replace(".", "_"): change(
            part.lora_B[adapter].weight,
            part.lora_A[adapter].weight,
            part.scaling[adapter] * part.r[adapter],
        )
        for name, part in model.named_modules()
        if hasattr(part, "lora_A") and adapter in part.lora_A
    }


def exchange(program: str, files: Mapping[str, Path], load: Callable[[Path], Changes], names):
    """Rows of our files by a program's loader."""
    for name in names:
        yield attempt(program, f"our LoRA, `{name}` names", lambda n=name: load(files[n]))


def returned(program: str, what: str, file: Path, want: Changes | None = None) -> Row:
    """A row of a program's file by our reader."""
    return attempt("framepack-jax", f"LoRA of {program}, {what}", lambda: ours(file), want)


# Programs. Each takes {naming: our file}, a folder for its own, and gives rows


def diffusers(files: Mapping[str, Path], folder: Path) -> Iterator[Row]:
    from diffusers import HunyuanVideoFramepackPipeline as Pipeline
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    def by_pipeline(file: Path, header: bool = True) -> Changes:
        model = _diffusers_model()
        tensors, metadata = Pipeline.lora_state_dict(file, return_lora_metadata=True)
        Pipeline.load_lora_into_transformer(
            tensors, model, adapter_name="x", metadata=metadata if header else None
        )
        return of_peft(model, "x")

    def by_peft(file: Path) -> Changes:
        tensors, metadata = Pipeline.lora_state_dict(file, return_lora_metadata=True)
        config = LoraConfig(**{k.removeprefix("transformer."): v for k, v in metadata.items()})
        model = _diffusers_model()
        model.add_adapter(config, "x")
        own = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        set_peft_model_state_dict(model, own, "x")
        return of_peft(model, "x")

    yield from exchange("diffusers pipeline", files, by_pipeline, ("diffusers", "original"))
    bare = functools.partial(by_pipeline, header=False)
    yield from exchange("diffusers, no header", files, bare, ("diffusers",))
    yield from exchange("PEFT", files, by_peft, ("diffusers",))
    made = factors()
    model = _diffusers_model()
    rank_pattern = {f"^{name}": len(down) for name, (_, down) in made.items()}
    model.add_adapter(
        LoraConfig(r=RANK, target_modules=list(made), lora_alpha=ALPHA, rank_pattern=rank_pattern),
        "x",
    )
    own = {f"{n}.lora_A.weight": down.clone() for n, (_, down) in made.items()}
    own |= {f"{n}.lora_B.weight": up for n, (up, _) in made.items()}
    set_peft_model_state_dict(model, own, "x")
    config = model.peft_config["x"].to_dict() | {"target_modules": list(made)}
    keep = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    Pipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(model, adapter_name="x"),
        weight_name="diffusers.safetensors",
        transformer_lora_adapter_metadata={key: config[key] for key in keep},
    )
    yield returned("diffusers", "alpha in the header", folder / "diffusers.safetensors")


def _diffusers_model() -> torch.nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel as Model

    with _no_values():
        return Model(num_layers=1, num_single_layers=1, num_refiner_layers=1)


@contextlib.contextmanager
def _no_values() -> Iterator[None]:
    """Weights as memory comes: large layers take no time, and no pages."""
    layers = (torch.nn.Linear, torch.nn.Conv3d)
    kept = [layer.reset_parameters for layer in layers]
    for layer in layers:
        layer.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for layer, reset in zip(layers, kept, strict=True):
            layer.reset_parameters = reset


def musubi_tuner(files: Mapping[str, Path], folder: Path) -> Iterator[Row]:
    sys.path.insert(0, str(checkout("musubi-tuner") / "src"))
    from musubi_tuner import convert_lora, fpack_generate_video
    from musubi_tuner.frame_pack.hunyuan_video_packed import HunyuanVideoTransformer3DModelPacked
    from musubi_tuner.networks import lora_framepack
    from musubi_tuner.utils.lora_utils import load_safetensors_with_lora_and_fp8

    def merged(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        base = folder / "base.safetensors"
        save_file({f"{name}.weight": torch.zeros(MODULES[name])}, base)
        state = load_safetensors_with_lora_and_fp8(
            str(base), [tensors], [1.0], False, torch.device("cpu")
        )
        return state[f"{name}.weight"]

    def load(file: Path) -> Changes:
        tensors = fpack_generate_video.convert_lora_for_framepack(load_file(file))
        return {n.replace(".", "_"): lambda x, n=n: merged(tensors, n) @ x for n in MODULES}

    yield from exchange("musubi-tuner", files, load, ("diffusers", "original", *KOHYA))
    with torch.device("meta"):
        unet = HunyuanVideoTransformer3DModelPacked(num_layers=1, num_single_layers=1)
    network = lora_framepack.create_arch_network(1.0, RANK, ALPHA, None, None, unet)
    network.apply_to(None, unet, apply_text_encoder=False, apply_unet=True)
    for part in network.unet_loras:
        torch.nn.init.normal_(part.lora_up.weight)
    network.save_weights(str(folder / "musubi.safetensors"), torch.float32, {})
    want = {
        part.lora_name.removeprefix("lora_unet_"): change(
            part.lora_up.weight, part.lora_down.weight
        )
        for part in network.unet_loras
    }
    yield returned("musubi-tuner", "trained", folder / "musubi.safetensors", want)
    convert_lora.convert(
        str(folder / "musubi.safetensors"), str(folder / "other.safetensors"), "other", None
    )
    yield returned("musubi-tuner", "by its converter", folder / "other.safetensors", want)

    def network_of(path: Path) -> torch.nn.Module:
        # Its function for files has the released sizes as constants.
        config = json.loads((path / "config.json").read_text())
        sizes = {name: value for name, value in config.items() if not name.startswith("_")}
        model = HunyuanVideoTransformer3DModelPacked(**sizes, attn_mode="torch")
        model.load_state_dict(load_file(path / "diffusion_pytorch_model.safetensors"))
        return model.eval()

    yield _our_network("musubi-tuner", folder, network_of)


def comfyui(files: Mapping[str, Path], folder: Path) -> Iterator[Row]:
    sys.path.insert(0, str(checkout("ComfyUI")))
    import comfy.options

    sys.argv = [sys.argv[0], "--cpu"]
    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import comfy.supported_models

    sizes = {
        "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768,
        "context_in_dim": 4096, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 24, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True,
        "guidance_embed": True, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False,
    }  # fmt: skip
    config = comfy.supported_models.HunyuanVideo(sizes)
    model = comfy.model_base.HunyuanVideo(config, device="meta")
    shapes = {name: x.shape for name, x in model.state_dict().items()}

    def patched(name: str, patch: Any) -> torch.Tensor:
        zeros = torch.zeros(shapes[name])
        return comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], zeros, name)

    def load(file: Path) -> Changes:
        tensors = comfy.lora_convert.convert_lora(load_file(file))
        keys = comfy.lora.model_lora_keys_unet(model, {})
        patches = comfy.lora.load_lora(tensors, keys)
        names = {n: n.removeprefix("diffusion_model.").removesuffix(".weight") for n in patches}
        return {
            flat.replace(".", "_"): lambda x, n=n: patched(n, patches[n]) @ x
            for n, flat in names.items()
        }

    yield from exchange("ComfyUI", files, load, ("original", "comfyui", "kohya-tencent"))
    yield _network_of_comfyui(folder)
    yield _vae_of_comfyui(folder)


def _network_of_comfyui(folder: Path) -> Row:
    """A base model goes out under the original names; ComfyUI renames and loads it."""
    import comfy.ldm.hunyuan_video.model as theirs
    import comfy.ops
    import comfy.supported_models
    from diffusers import HunyuanVideoTransformer3DModel

    from framepack_jax.cli import convert, export

    what = "our export of a base HunyuanVideo transformer, `original` names"
    torch.manual_seed(0)
    HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=2, text_embed_dim=32, pooled_projection_dim=24, rope_axes_dim=(4, 6, 6),
    ).save_pretrained(folder / "base")  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        convert.main(["--transformer", str(folder / "base"), "--output", str(folder / "bundle")])
        for name in ("original", "comfyui"):
            file = str(folder / f"{name}.safetensors")
            export.main([file, "--bundle", str(folder / "bundle"), "--key-format", name])
    model = theirs.HunyuanVideo(
        in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=32, hidden_size=32,
        mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=256,
        qkv_bias=True, guidance_embed=True, patch_size=[1, 2, 2], byt5=False, meanflow=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    rename = comfy.supported_models.HunyuanVideo.process_unet_state_dict
    tensors = rename(SimpleNamespace(), load_file(folder / "original.safetensors"))
    direct = load_file(folder / "comfyui.safetensors")
    result = model.load_state_dict(tensors, strict=False)
    lost = len(result.missing_keys) + len(result.unexpected_keys)
    difference = max(float((direct[name] - x).abs().max()) for name, x in tensors.items())
    arrived = f"{len(tensors) - lost} of {len(tensors)} tensors"
    return Row("ComfyUI", what, arrived, f"{difference:.1e}")


def _vae_of_comfyui(folder: Path) -> Row:
    """A VAE of ComfyUI's, under the names that its repackaged files have, by our reader."""
    import comfy.ldm.models.autoencoder
    import jax

    from framepack_jax.conversion import engine, tables, weight_files
    from framepack_jax.models.hunyuan import vae
    from framepack_jax.models.hunyuan.spec import VAE
    from framepack_jax.models.params import stack_layers

    what = "VAE of ComfyUI, its names"
    sizes = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0, "conv3d": True, "time_compress": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=sizes, embed_dim=4).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    # Only the released sizes are known without a config.
    config = {
        "_class_name": "AutoencoderKLHunyuanVideo", "in_channels": 3, "out_channels": 3,
        "latent_channels": 4, "block_out_channels": [32, 64, 128, 128], "layers_per_block": 2,
        "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * 4, "norm_num_groups": 32, "act_fn": "silu",
        "scaling_factor": 0.476986, "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4, "mid_block_add_attention": True,
    }  # fmt: skip
    file = folder / "vae" / "vae.safetensors"
    file.parent.mkdir()
    file.with_name("config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in theirs.state_dict().items()}, file)
    try:
        plan = engine.make_job(tables.recognise(weight_files.open_checkpoint(file), "vae"))
    except weight_files.ConversionError as error:
        return Row("framepack-jax", what, f"{type(error).__name__}: not read", "-")
    params = stack_layers(dict(plan.leaves()), VAE.stacks, np.stack)
    # One frame: ComfyUI lets a frame attend to later ones, Tencent's VAE does not.
    latents = np.random.default_rng(0).standard_normal((1, 1, 4, 6, 4), np.float32)
    mine = np.asarray(jax.jit(lambda p, z: vae.decode(plan.cfg, p, z))(params, latents))
    with torch.no_grad():
        frames = theirs.decode(torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()))
    right = frames.numpy().transpose(0, 2, 3, 4, 1)
    difference = np.abs(mine - right).max() / np.abs(right).max()
    return Row("framepack-jax", f"{what}, a frame decoded", "all tensors", f"{difference:.1e}")


def framepackwrapper(files: Mapping[str, Path], folder: Path) -> Iterator[Row]:
    """The wrapper for ComfyUI, whose loader reads a whole model."""
    import importlib.util

    sys.path.insert(0, str(checkout("ComfyUI")))
    import comfy.options

    sys.argv = [sys.argv[0], "--cpu"]
    comfy.options.enable_args_parsing()
    import folder_paths

    root = checkout("FramePackWrapper")
    spec = importlib.util.spec_from_file_location(
        "wrapper", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    sys.modules["wrapper"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["wrapper"])
    import wrapper.nodes as nodes
    import wrapper.utils

    config = json.loads((root / "transformer_config.json").read_text())
    config |= {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    (folder / "transformer_config.json").write_text(json.dumps(config))
    nodes.script_directory = str(folder)
    nodes.DynamicSwapInstaller.install_model = lambda *args, **kwargs: None
    with torch.device("meta"):
        model = nodes.HunyuanVideoTransformer3DModel(**config, attention_mode="sdpa")
    zeros = {n: torch.zeros(x.shape, dtype=torch.bfloat16) for n, x in model.named_parameters()}
    save_file(zeros, folder / "base.safetensors")
    folder_paths.add_model_folder_path("diffusion_models", str(folder))

    def load(file: Path) -> Changes:
        given = [{"path": str(file), "strength": 1.0, "name": file.stem, "fuse_lora": False}]
        (pipe,) = nodes.LoadFramePackModel().loadmodel(
            "base.safetensors", "bf16", "disabled", lora=given, load_device="offload_device"
        )
        return of_peft(pipe["transformer"], file.stem)

    yield from exchange(
        "FramePackWrapper, bfloat16", files, load, ("diffusers", "original", "kohya")
    )
    save_file(
        {
            name: x.contiguous()
            for name, x in wrapper.utils.convert_to_diffusers(
                "lora_unet_", kohya(factors())
            ).items()
        },
        folder / "converted.safetensors",
    )
    yield returned("FramePackWrapper", "by its converter", folder / "converted.safetensors")


def onetrainer(files: Mapping[str, Path], folder: Path) -> Iterator[Row]:
    sys.path.insert(0, str(checkout("OneTrainer")))
    os.chdir(checkout("OneTrainer"))
    from diffusers import HunyuanVideoTransformer3DModel
    from modules.model.HunyuanVideoModel import HunyuanVideoModel
    from modules.modelLoader.hunyuanVideo.HunyuanVideoLoRALoader import HunyuanVideoLoRALoader
    from modules.modelSaver.hunyuanVideo.HunyuanVideoLoRASaver import HunyuanVideoLoRASaver
    from modules.util.enum.ModelFormat import ModelFormat
    from modules.util.enum.ModelType import ModelType
    from modules.util.ModelNames import ModelNames

    def empty() -> HunyuanVideoModel:
        model = HunyuanVideoModel(ModelType.HUNYUAN_VIDEO)
        with torch.device("meta"):
            model.transformer = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1)
        return model

    def load(file: Path) -> Changes:
        model = empty()
        HunyuanVideoLoRALoader().load(model, ModelNames(lora=str(file)))
        return of_tensors(model.lora_state_dict, "transformer.")

    yield from exchange("OneTrainer", files, load, NAMES)
    split = {name.replace("lora_unet_", "transformer."): x for name, x in kohya(factors()).items()}
    split = {}
    for name, (up, down) in factors().items():
        split[f"transformer.{name}.lora_up.weight"] = up
        split[f"transformer.{name}.lora_down.weight"] = down.clone()
        split[f"transformer.{name}.alpha"] = torch.tensor(ALPHA)
    fused = _fused(split)
    for form, tensors in (
        (ModelFormat.DIFFUSERS_LORA, split), (ModelFormat.LEGACY_LORA, split),
        (ModelFormat.KOHYA_LORA, fused), (ModelFormat.ORIGINAL_LORA, fused),
        (ModelFormat.COMFY_LORA, fused),
    ):  # fmt: skip
        model = empty()
        model.lora_state_dict = dict(tensors)
        file = folder / f"{form}.safetensors"
        HunyuanVideoLoRASaver().save(model, form, str(file), torch.float32)
        yield returned("OneTrainer", str(form).removesuffix("_LORA"), file)


def _fused(split: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OneTrainer's adapters on fused layers, of the same change."""
    made = dict(split)
    for name in ("attn_qkv", "attn_added_qkv", "qkv_mlp"):
        (flat,) = [n for n in FUSED if n.endswith(f"transformer_blocks_0_{name}")]
        parts = [
            {
                kind: made.pop(f"transformer.{part}.{kind}")
                for kind in ("lora_up.weight", "lora_down.weight", "alpha")
            }
            for part in FUSED[flat]
        ]
        block = SINGLE if flat.startswith("single") else DOUBLE
        module = f"transformer.{block}.{name.replace('attn_', 'attn.')}"
        ups, downs = ([p[f"lora_{side}.weight"] for p in parts] for side in ("up", "down"))
        up, down = torch.cat(ups), downs[0]
        if name == "qkv_mlp":
            up, down = torch.block_diag(torch.cat(ups[:-1]), ups[-1]), torch.cat(downs[2:])
        made[f"{module}.lora_up.weight"], made[f"{module}.lora_down.weight"] = up, down
        made[f"{module}.alpha"] = torch.tensor(ALPHA * len(down) / RANK)
    return made


def framepack(files: Mapping[str, Path], folder: Path) -> Iterator[Row]:
    """The authors' code, which reads networks and no LoRAs."""
    sys.path.insert(0, str(checkout("FramePack")))
    from diffusers_helper.models.hunyuan_video_packed import (
        HunyuanVideoTransformer3DModelPacked as Model,
    )

    yield _our_network("FramePack (authors)", folder, Model.from_pretrained)


def _our_network(program: str, folder: Path, load: Callable[[Path], torch.nn.Module]) -> Row:
    """The transformer of the bundle `random` in another program's code: its velocity."""
    from framepack_jax import bundle
    from framepack_jax.cli import export

    random = bundle.resolve("random")
    with contextlib.redirect_stdout(sys.stderr):
        export.main([str(folder / "network"), "--bundle", str(random), "--dtype", "float32"])
    (file,) = (folder / "network").glob("*.safetensors")
    tensors, model = load_file(file), load(folder / "network")
    same = [n for n, x in model.state_dict().items() if torch.equal(x, tensors.get(n, x[..., :0]))]
    manifest = bundle.read_manifest(random)
    params = bundle.load_params(random, manifest, "transformer", dtype="float32")
    _, cfg = bundle.role_config(manifest, "transformer")
    arrived = f"{len(same)} of {len(tensors)} tensors"
    return Row(program, "our transformer, a folder", arrived, _velocities(cfg, params, model))


def _velocities(cfg: TransformerConfig, params: Any, model: torch.nn.Module) -> str:
    """The largest relative difference of the two networks' velocity on the same input."""
    import jax

    from framepack_jax.packing import PackedContext

    random = np.random.default_rng(0)
    times = {"k4": range(6, 22), "k2": (4, 5), "k1": (0,), "target": (1, 2)}
    video = {k: random.standard_normal((1, len(t), 4, 6, 16), np.float32) for k, t in times.items()}
    text = random.standard_normal((1, 5, cfg.text_dim), np.float32)
    pooled = random.standard_normal((1, cfg.pooled_dim), np.float32)
    image = random.standard_normal((1, 3, cfg.image_dim), np.float32)
    kernels = ("k4", "k2", "k1")
    index = {k: np.array([list(t)], np.int32) for k, t in times.items()}
    context = PackedContext(
        tuple(video[k] for k in kernels), tuple(index[k] for k in kernels), index["target"], kernels
    )
    conditions = Conditions(
        text, np.arange(5)[None] < 4, pooled, image, np.array([6.0], np.float32)
    )
    velocity = jax.jit(transformer_model.velocity, static_argnames=("cfg",))
    ours = velocity(cfg, params, video["target"], np.array([0.7], np.float32), context, conditions)
    of = {k: torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy()) for k, x in video.items()}
    at = {k: torch.from_numpy(x).long() for k, x in index.items()}
    with torch.no_grad():
        (theirs,) = model(
            of["target"], torch.tensor([700.0]), torch.from_numpy(text),
            torch.tensor([[1, 1, 1, 1, 0]]), torch.from_numpy(pooled), torch.tensor([6000.0]),
            latent_indices=at["target"], clean_latents=of["k1"], clean_latent_indices=at["k1"],
            clean_latents_2x=of["k2"], clean_latent_2x_indices=at["k2"],
            clean_latents_4x=of["k4"], clean_latent_4x_indices=at["k4"],
            image_embeddings=torch.from_numpy(image), return_dict=False,
        )  # fmt: skip
    right = theirs.numpy().transpose(0, 2, 3, 4, 1)
    return f"{np.abs(np.asarray(ours) - right).max() / np.abs(right).max():.1e}"


NAMES = ("diffusers", "original", "kohya", "kohya-tencent", "comfyui")
KOHYA = ("kohya", "kohya-tencent")
# {program: (its function, the folders that it needs)}
PROGRAMS = {
    "diffusers": (diffusers, ()),
    "musubi-tuner": (musubi_tuner, ("musubi-tuner",)),
    "ComfyUI": (comfyui, ("ComfyUI",)),
    "FramePackWrapper": (framepackwrapper, ("FramePackWrapper", "ComfyUI")),
    "OneTrainer": (onetrainer, ("OneTrainer",)),
    "FramePack": (framepack, ("FramePack",)),
}


def checkout(name: str) -> Path:
    return Path(os.environ["INTEROP_CHECKOUTS"]) / name


def rows_of(program: str) -> None:
    """Run a program, in this process, and print its rows as they come."""
    logging.disable(logging.INFO)
    out = os.fdopen(os.dup(1), "w")
    # What programs print is not part of the table.
    os.dup2(2, 1)
    if not torch.cuda.is_available():
        # Some modules ask for it while they are imported.
        torch.cuda.current_device = lambda: 0
    function, _ = PROGRAMS[program]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(kohya(factors()), folder / "source.safetensors")
        read = lora.read(folder / "source.safetensors", CFG).lora
        files = {
            naming: folder / f"ours_{naming}.safetensors" for naming in lora_names.HUNYUAN.namings
        }
        for naming, file in files.items():
            lora.write(file, read, CFG, naming)
        for row in function(files, folder):
            print(row, file=out, flush=True)


def main(checkouts: str, *programs: str) -> None:
    os.environ["INTEROP_CHECKOUTS"] = str(Path(checkouts).resolve())
    print("| read by | what | arrived | largest difference |\n|---|---|---|---|", flush=True)
    for program in programs or PROGRAMS:
        _, needed = PROGRAMS[program]
        if absent := [name for name in needed if not checkout(name).is_dir()]:
            print(Row(program, "-", f"no checkout of {' and '.join(absent)}", "-"), flush=True)
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--rows-of", program], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(Row(program, "-", "did not run, see below", "-"), flush=True)
            print(done.stderr[-2000:], file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--rows-of":
        rows_of(sys.argv[2])
    else:
        main(*sys.argv[1:])
