"""Options of `framepack convert`: the sources of a bundle's networks."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from framepack_jax.utils.paths import IN_STORES

Dtype = Literal[
    "float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "fp32", "bf16", "fp16", "fp8"
]  # fmt: skip
LONG_DTYPES = {
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn",
}  # fmt: skip
SHORT_DTYPES = {long: short for short, long in LONG_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Networks:
    """Sources of networks: a path, or a repository of the Hugging Face hub as owner/name or
    owner/name/folder, whose files stay in the hub's cache."""

    framepack: Literal["i2v", "f1"] | None = None
    """Download a released FramePack model with all networks and its schedule; with --encoders-from
    a bundle of the other model, only the transformer. Networks given below replace its own."""
    helios: Literal["base", "mid", "distilled"] | None = None
    """Download a released Helios model with all networks and its settings; with --encoders-from a
    bundle of another Helios model, only the transformer. Networks given below replace its own."""
    pipeline: Path | None = None
    """A diffusers pipeline folder (with model_index.json), or a single file with several networks,
    such as ComfyUI's checkpoints. Networks given below replace its own."""
    transformer: Path | None = None
    """Transformer of FramePack, HunyuanVideo, Wan 2.1 or Helios: a file (.safetensors, .pt) or a
    folder with one, whole or sharded; in diffusers', the original (Tencent's, Wan's) or ComfyUI's
    naming; also fp8 weights."""
    vae: Path | None = None
    """HunyuanVideo or Wan 2.1 VAE, file or folder; in diffusers', the original or ComfyUI's
    naming."""
    text_encoder: Path | None = None
    """Llama, alone or inside LLaVA, or UMT5, file or folder; UMT5 in the naming of transformers,
    ComfyUI or Wan's release."""
    text_encoder_2: Path | None = None
    """CLIP-L text model, file or folder."""
    image_encoder: Path | None = None
    """SigLIP vision model, file or folder."""
    encoders_from: Annotated[str | None, IN_STORES] = None
    """A bundle that provides all networks that are not given. The new bundle refers to them and
    does not copy them."""
    prefix: str | None = None
    """Prefix of the tensors to read if a file holds several sets of weights of one network, such as
    plain and averaged weights (EMA). All other prefixes are found and removed without this flag."""


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """Sources of tokenizer and image-processor files."""

    tokenizer: Path | None = None
    """Folder of the text encoder's tokenizer; default: the folder of the text encoder, `tokenizer`
    next to it, `google/umt5-xxl` in it, or the tokenizer inside of ComfyUI's UMT5."""
    tokenizer_2: Path | None = None
    """Folder of CLIP's tokenizer; default: the folder of text encoder 2, or `tokenizer_2` next to
    it."""
    image_processor: Path | None = None
    """Folder with preprocessor_config.json; default: the folder of the image encoder, or
    `feature_extractor` next to it."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Settings that a checkpoint does not state."""

    schedule: str | None = None
    """Packing schedule that the transformer was trained with (FramePack-F1:
    f1k1_x_f16k4f2k2f1k1_g9); default: the schedule of the released model, or of the bundle that
    provides the transformer; else f1k1_x_g9_f1k1f2k2f16k4_td, for Helios that of FramePack-F1, and
    g21 (without context) for Wan."""
    from_base: bool = False
    """Start a packed model from a base transformer of HunyuanVideo or Wan: copy its patch embedding
    to the context embeddings of --schedule and, for HunyuanVideo, add a new image projection."""
    image_dim: int | None = None
    """Width of HunyuanVideo's image tokens, with --from-base; default: width of the image encoder,
    or 1152."""
    rope_axes: str | None = None
    """RoPE widths of time, height and width, such as 16,56,56, if the checkpoint does not state
    them."""
    prompt_template: str | None = None
    """Text around the prompt for the text encoder, with {} as its place; default: HunyuanVideo's
    for Llama, none for UMT5."""
    text_tokens: int | None = None
    """Prompt tokens that the transformer reads; longer prompts are cut, shorter ones padded.
    Default: 256 with Llama, 512 with UMT5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleRequest(Networks, Tokenizers, ModelSettings):
    """All options of a bundle; `dtype` None keeps the stored types."""

    output: str
    dtype: str | None = None
    overwrite: bool = False


def long_dtype(dtype: str | None) -> str | None:
    """Return the full name of a type: "bf16" -> "bfloat16"."""
    return LONG_DTYPES.get(dtype, dtype) if dtype else None
