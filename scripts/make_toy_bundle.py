"""Write toy bundles: every network of the released kinds, small widths, random weights.

Command:  python scripts/make_toy_bundle.py framepack_jax/assets/random
          python scripts/make_toy_bundle.py outputs/world/encoders --world
          python scripts/make_toy_bundle.py outputs/history/untrained --wan
Hardware: a CPU, seconds.
Result:   the bundle behind `--bundle random`, about 1 MB, whose videos are noise and show that
          every part runs; and the bundle that models of the toy world are trained from. Its
          encoders are not trained: the state of a word says which word it is and which came before.
          The third has a base Wan transformer, which reads no context, beside the VAE and the text
          encoder of the bundle `tiny`. It is sampled as Helios is, from chunks of nine latents.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest, Role, write_manifest, write_params
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.conversion.pipeline_index import settings_of
from framepack_jax.models import registry
from framepack_jax.models.encoders import clip, llama, siglip
from framepack_jax.models.hunyuan.config import TransformerConfig, VaeConfig
from framepack_jax.models.params import unstack_layers
from framepack_jax.models.patch_vae import PatchVaeConfig
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.toy import world
from framepack_jax.training.export import write_bundle

VAE_KINDS = {VaeConfig: "hunyuan_vae", PatchVaeConfig: "patch_vae"}
CORPUS = (
    "a red circle moves left over a green board, then orbits the blue square",
    "the woman in the orange suit smiles and turns her head slowly to the right",
    "the camera pans across a textured background while two triangles bounce",
    "the girl dances gracefully, with clear movements, full of charm",
)


@dataclasses.dataclass(frozen=True)
class TinyBundle:
    """Configs of all networks, and how the untrained weights are drawn and stored."""

    transformer: TransformerConfig
    vae: VaeConfig | PatchVaeConfig
    text_encoder: llama.LlamaConfig
    text_encoder_2: clip.ClipConfig
    image_encoder: siglip.SiglipConfig
    schedule: str = packing.RELEASED_INVERTED
    scaling_factor: float = 0.476986
    corpus: tuple[str, ...] = CORPUS
    seed: int = 0
    dtype: str = "bfloat16"
    looking_back: bool = False
    """Make the heads of the text encoder look back by 0, 1, 2, ... words, see `look_back`."""


def get_config() -> TinyBundle:
    """Return widths of tens; the released networks have thousands."""
    return TinyBundle(
        transformer=TransformerConfig(
            heads=2, head_dim=16, double_layers=2, single_layers=2, text_dim=32, pooled_dim=24,
            image_dim=24, rope_axes=(4, 6, 6),
        ),
        vae=VaeConfig(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4),
        text_encoder=llama.LlamaConfig(
            vocab_size=400, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48
        ),
        text_encoder_2=clip.ClipConfig(
            vocab_size=400, width=24, layers=3, heads=4, mlp_width=40, eos_token_id=1
        ),
        image_encoder=siglip.SiglipConfig(
            width=24, layers=2, heads=4, mlp_width=40, image_size=42, patch_size=14
        ),
    )  # fmt: skip


def get_world_config() -> TinyBundle:
    """Return encoders that read the captions of the toy world, word by word."""
    captions = tuple(world.scene(0, number).caption for number in range(500))
    return TinyBundle(
        transformer=TransformerConfig(
            heads=2, head_dim=64, double_layers=2, single_layers=4, refiner_layers=1, text_dim=96,
            pooled_dim=48, image_dim=32, rope_axes=(16, 24, 24),
        ),
        vae=VaeConfig(channels=(8, 16, 32, 64), layers_per_block=1, norm_groups=4),
        text_encoder=llama.LlamaConfig(
            vocab_size=400, width=96, layers=2, heads=6, kv_heads=6, head_dim=16, mlp_width=192,
            rope_theta=4.0,
        ),
        text_encoder_2=clip.ClipConfig(
            vocab_size=400, width=48, layers=3, heads=4, mlp_width=96, eos_token_id=1
        ),
        image_encoder=siglip.SiglipConfig(
            width=32, layers=2, heads=4, mlp_width=64, image_size=42, patch_size=14
        ),
        corpus=captions,
        looking_back=True,
    )  # fmt: skip


# A base Wan transformer for the latents and the text states of the bundle `tiny`.
WAN = WanConfig(
    heads=4, head_dim=32, layers=4, mlp_dim=512, text_dim=96, time_dim=64, rope_axes=(12, 10, 10)
)
SECTION = "g9"
SIZE = (64, 64)
# As many as `configs/tiny_framepack.py` pads captions to.
TEXT_TOKENS = 48


def write_wan(cfg: WanConfig, output: Path, seed: int = 0) -> None:
    """Write a bundle of a random base Wan transformer and the networks of `tiny` that it reads."""
    tiny = bundle.resolve("tiny")
    manifest = bundle.read_manifest(tiny)
    packed = dataclasses.replace(cfg, context_kernels=("k1", "k2", "k4"))
    manifest = dataclasses.replace(
        manifest,
        roles={name: manifest.roles[name] for name in ("transformer", "vae", "text_encoder")},
        schedule=packing.parse(SECTION),
        buckets=(SIZE,),
        text_tokens=TEXT_TOKENS,
        sampling=settings_of(None, packed).sampling,
    )
    spec = registry.NETWORKS["wan_packed_dit"]
    params = jax.jit(spec.init, static_argnums=0)(cfg, jax.random.key(seed))
    leaves = unstack_layers(params, spec.stacks)
    arrays = ((name, np.asarray(leaf)) for name, leaf in leaves.items())
    network = spec.kind, dataclasses.asdict(cfg)
    source = {"name": "scripts/make_toy_bundle.py, untrained"}
    write_bundle(manifest, tiny, output, "transformer", network, arrays, source, copy=True)


def write(config: TinyBundle, output: Path) -> None:
    """Write the bundle with freshly drawn weights."""
    networks = {
        "transformer": ("hunyuan_packed_dit", config.transformer),
        "vae": (VAE_KINDS[type(config.vae)], config.vae),
        "text_encoder": ("llama", config.text_encoder),
        "text_encoder_2": ("clip_text", config.text_encoder_2),
        "image_encoder": ("siglip_vision", config.image_encoder),
    }
    roles = {}
    for number, (role, (kind, cfg)) in enumerate(networks.items()):
        spec = registry.NETWORKS[kind]
        key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), number)
        params = jax.jit(spec.init, static_argnums=0)(cfg, key)
        if config.looking_back and role == "text_encoder":
            params = look_back(cfg, params)
        leaves = unstack_layers(cast_params(params, jnp.dtype(config.dtype)), spec.stacks)
        arrays = ((name, np.asarray(leaf)) for name, leaf in leaves.items())
        source = {"name": "scripts/make_toy_bundle.py, untrained"}
        source |= write_params(output / role, arrays)._asdict()
        roles[role] = Role(kind, dataclasses.asdict(cfg), role, source)
    words = config.text_encoder.vocab_size, config.corpus
    llama_tokenizer(*words).save_pretrained(output / "tokenizer")
    words = config.text_encoder_2.vocab_size, config.corpus
    clip_tokenizer(*words).save_pretrained(output / "tokenizer_2")
    write_image_processor(config.image_encoder, output / "image_processor")
    channels = config.vae.latent_channels
    manifest = Manifest(
        roles=roles,
        latent_mean=(0.0,) * channels,
        latent_std=(1 / config.scaling_factor,) * channels,
        prompt_template=PROMPT_TEMPLATE,
        schedule=packing.parse(config.schedule),
    )
    write_manifest(output, manifest)
    for message in output.glob("*/commit_success.txt"):
        message.unlink()  # it names the folder of this machine, and nothing reads it


def look_back(cfg: llama.LlamaConfig, params: Any) -> Any:
    """Return the text encoder with heads 1, 2, ... that read from the words 1, 2, ... before.

    Heads with random queries and keys read from everywhere alike, template and all: "left" then has
    nearly the same state whoever moves left. Here word embeddings have variance 1 and a first
    number that is the same for all words. Queries and keys are made of that alone, the queries
    turned back by as much as RoPE turns them in so many words. Values and feed-forwards stay
    random, and leave the first number as it is.
    """
    same, sharpness, loudness = 6.0, 1.1, 1.2
    half = cfg.head_dim // 2
    angles = np.outer(1 + np.arange(cfg.heads), cfg.rope_theta ** -(np.arange(half) / half))
    layers, table = params["layers"], params["embed"]["embedding"]
    table /= jnp.sqrt(jnp.mean(table**2, axis=1, keepdims=True))
    table = table.at[:, 0].set(same)
    query = sharpness * np.concatenate([np.cos(angles), -np.sin(angles)], axis=1)
    key = sharpness * np.concatenate([np.ones(half), np.zeros(half)])
    kernels = {name: part["kernel"] for name, part in layers.items() if "kernel" in part}
    kernels["q"] = jnp.zeros_like(kernels["q"]).at[:, 0].set(query)
    kernels["k"] = jnp.zeros_like(kernels["k"]).at[:, 0].set(key)
    kernels["v"] = kernels["v"].at[:, 0].set(0)
    kernels["out"] = loudness * kernels["out"].at[..., 0].set(0)
    kernels["down"] = kernels["down"].at[..., 0].set(0)
    layers = layers | {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return params | {"embed": {"embedding": table}, "layers": layers}


def llama_tokenizer(vocabulary: int, corpus: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the special tokens of Llama 3."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    names += ["<|eot_id|>", "<pad>"]
    tokenizer = _byte_level_bpe(vocabulary, names, [*corpus, PROMPT_TEMPLATE])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names[0], eos_token=names[1], pad_token="<pad>",
        model_max_length=4096, padding_side="right",
    )  # fmt: skip


def clip_tokenizer(vocabulary: int, corpus: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the special tokens of CLIP; it pads with the end token."""
    names = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = _byte_level_bpe(vocabulary, names, corpus)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(name, i) for i, name in enumerate(names)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names[0], eos_token=names[1], pad_token=names[1],
        model_max_length=77, padding_side="right",
    )  # fmt: skip


def _byte_level_bpe(vocabulary: int, special: list[str], corpus: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def write_image_processor(cfg: siglip.SiglipConfig, folder: Path) -> None:
    """Write the settings that images for SigLIP are prepared with."""
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": cfg.image_size, "width": cfg.image_size},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    if "--wan" in sys.argv:
        write_wan(WAN, Path(sys.argv[1]))
    else:
        write(get_world_config() if "--world" in sys.argv else get_config(), Path(sys.argv[1]))
