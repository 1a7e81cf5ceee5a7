"""Encode prompts and images to the conditions of a video.

The text encoder encodes the prompt inside the bundle's template to a state for each prompt token.
A bundle may have two more encoders: CLIP encodes the bare prompt to one vector, and SigLIP encodes
the image to tokens. The VAE encodes the image to the start latent. Sampling and dataset preparation
both use this module.

Source: HunyuanVideo's text conditioning (arXiv 2412.03603, section 4.3) with FramePack's image
tokens; `encode_prompt` of diffusers' pipelines.

Shapes: B batch, L tokens of the text encoder, H W rows and columns, C latent channels.
"""

import dataclasses
import functools
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from framepack_jax import bundle
from framepack_jax.models import autoencoder, offload
from framepack_jax.models.encoders import clip, llama, siglip
from framepack_jax.models.network_spec import TextEncoderSpec, VaeSpec
from framepack_jax.models.params import Params
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS
from framepack_jax.models.tiling import Tiling
from framepack_jax.video.image_processor import ImageProcessor, load_image_processor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the"
    " objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
# Words that a warning quotes from each end of a prompt that is cut.
KEPT_WORDS = 8

WHOLE_FRAMES = Tiling()


class PromptStates(NamedTuple):
    """Encoded prompts.

    `text` (B, L, D) is zero where `valid` (B, L) is False; L is `Encoders.text_tokens`. The True
    entries of `valid` are a prefix. `pooled` (B, D_pooled) is CLIP's vector, None without CLIP.
    """

    text: jax.Array
    valid: jax.Array
    pooled: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Encoders:
    """Encoders of prompts and images, with their tokenizers.

    Networks are (config, parameters) and compute in the dtype of their parameters; `text_spec` is
    the kind of `text_encoder`. `template` has one `{}` for the prompt, of which `text_tokens`
    tokens are read. CLIP and SigLIP are None in a bundle whose transformer reads neither.
    """

    tokenizer: "PreTrainedTokenizerBase"
    text_encoder: tuple[Any, Params]
    tokenizer_2: "PreTrainedTokenizerBase | None" = None
    text_encoder_2: tuple[clip.ClipConfig, Params] | None = None
    image_processor: ImageProcessor | None = None
    image_encoder: tuple[siglip.SiglipConfig, Params] | None = None
    text_spec: TextEncoderSpec = llama.SPEC
    template: str = PROMPT_TEMPLATE
    text_tokens: int = MAX_PROMPT_TOKENS


def load_tokenizer(folder: epath.PathLike) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in `folder`. Raises ValueError if there is none."""
    folder = epath.Path(folder)
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"no tokenizer in {folder}: tokenizer_config.json is missing")
    # The folder may be in a bucket, and transformers reads local files only.
    with tempfile.TemporaryDirectory() as local:
        for file in folder.iterdir():
            if not file.is_dir():
                file.copy(epath.Path(local) / file.name)
        tokenizer = _tokenizer_class(Path(local)).from_pretrained(local, local_files_only=True)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"the tokenizer in {folder} has no pad token, which is needed to pad prompts"
        )
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """Return the class of transformers that reads a tokenizer.

    AutoTokenizer imports torch where it is installed, which takes seconds: a tokenizer that is all
    in tokenizer.json is read without it.
    """
    import transformers

    config = json.loads((folder / "tokenizer_config.json").read_text())
    if config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def prompt_start(tokenizer: "PreTrainedTokenizerBase", template: str) -> int:
    """Return the number of tokens before the prompt, which all prompts share; 0 if the template
    begins with the prompt."""
    if template.startswith("{}"):
        # Two prompts may begin with the same token.
        return 0
    first, second = tokenizer([_fill(template, prompt) for prompt in ("a", "1")]).input_ids
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def count_tokens(encoders: Encoders, prompt: str) -> int:
    """Return the number of tokens of a prompt, including the end of the template.

    Tokens after `encoders.text_tokens` are cut when the prompt is encoded.
    """
    text = _fill(encoders.template, encoders.text_spec.clean(prompt))
    ids = encoders.tokenizer(text, verbose=False).input_ids
    return len(ids) - prompt_start(encoders.tokenizer, encoders.template)


def tokenize_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    prompts: Sequence[str],
    text_tokens: int = MAX_PROMPT_TOKENS,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (ids, valid, start) for the text encoder: int32 and bool (B, start + `text_tokens`).

    Ids are padded on the right; the tokens of the prompts begin at `start`. A prompt that does not
    fit is cut, with a warning that quotes the last words read.
    """
    start = prompt_start(tokenizer, template)
    texts = [_fill(template, prompt) for prompt in prompts]
    for i, whole in enumerate(tokenizer(texts, verbose=False).input_ids):
        kept = start + text_tokens
        if len(whole) > kept:
            words = str(tokenizer.decode(whole[start:kept], skip_special_tokens=True)).split()
            warnings.warn(
                f"prompt {' '.join(prompts[i].split()[:KEPT_WORDS])!r} ... is too long:"
                f" {len(whole) - start} tokens with the template's end, of"
                f" which {text_tokens} are read. The last words read are:"
                f' "... {" ".join(words[-KEPT_WORDS:])}". Shorten the prompt, or move what matters'
                " to its beginning",
                stacklevel=4,
            )
    ids, mask = _pad_and_cut(tokenizer, texts, start + text_tokens)
    return ids, mask.astype(bool), start


def tokenize_summary(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], length: int
) -> np.ndarray:
    """Return ids (B, length) int32 of the bare prompts for CLIP.

    A longer prompt is cut without a warning: CLIP gives one vector for the whole prompt and reads
    at most 77 tokens by design. The text encoder still reads all tokens.
    """
    return _pad_and_cut(tokenizer, list(prompts), length)[0]


def encode_prompt(encoders: Encoders, prompts: Sequence[str]) -> PromptStates:
    """Encode prompts, which may be empty.

    Warns if a prompt is cut. Raises ValueError if the template does not have exactly one `{}`, or
    if a tokenizer returns ids outside of the vocabulary of its network.
    """
    return encode_each(encoders, [prompts])[0]


def encode_each(encoders: Encoders, batches: Sequence[Sequence[str]]) -> list[PromptStates]:
    """Encode several batches of prompts, each as `encode_prompt` does.

    A text encoder that is not on the device is read once for all batches.
    """
    spec, (cfg, params) = encoders.text_spec, encoders.text_encoder
    tokens = []
    for prompts in batches:
        cleaned = [spec.clean(prompt) for prompt in prompts]
        ids, mask, start = tokenize_prompt(
            encoders.tokenizer, encoders.template, cleaned, encoders.text_tokens
        )
        _check_ids("tokenizer", ids, cfg.vocab_size)
        tokens.append((ids, mask))
    if offload.is_offloaded(params):
        read = spec.hidden_states_of_each(cfg, params, tokens)
    else:
        read = [_text_states(spec, cfg, params, *each) for each in tokens]
    given = []
    for prompts, (_, mask), states in zip(batches, tokens, read, strict=True):
        states, valid = states[:, start:], jnp.asarray(mask[:, start:])
        text = jnp.where(valid[:, :, None], states, jnp.zeros_like(states))
        given.append(PromptStates(text, valid, _summaries(encoders, prompts)))
    return given


def _summaries(encoders: Encoders, prompts: Sequence[str]) -> jax.Array | None:
    """Return CLIP's vectors (B, D_pooled) of prompts, None without CLIP."""
    if encoders.text_encoder_2 is None or encoders.tokenizer_2 is None:
        return None
    cfg, params = encoders.text_encoder_2
    ids = tokenize_summary(encoders.tokenizer_2, prompts, cfg.max_tokens)
    _check_ids("tokenizer_2", ids, cfg.vocab_size)
    return _pooled(cfg, params, ids)


def encode_image(encoders: Encoders, images: np.ndarray) -> jax.Array | None:
    """Encode images (B, H, W, 3) uint8, cropped to the video's size, to tokens (B, n, D_img);
    return None without an image encoder."""
    if encoders.image_encoder is None or encoders.image_processor is None:
        return None
    cfg, params = encoders.image_encoder
    pixels = jnp.asarray(encoders.image_processor(images), _dtype(params))
    return _image_states(cfg, params, pixels)


def no_image(encoders: Encoders) -> jax.Array | None:
    """Return the image tokens (1, n, D_img) of a video from text, zeros as in training with an
    empty start; None without an image encoder."""
    if encoders.image_encoder is None:
        return None
    cfg, params = encoders.image_encoder
    return jnp.zeros((1, cfg.grid**2, cfg.width), _dtype(params))


def clip_latents(
    spec: VaeSpec,
    cfg: Any,
    params: Params,
    frames: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    key: jax.Array | None = None,
    tiling: Tiling = WHOLE_FRAMES,
) -> jax.Array:
    """Encode clips (B, P, H, W, 3) uint8 to normalised latents (B, 1 + (P - 1) / 4, H/8, W/8, C).

    Latents are (z - mean) / std, float32, with a mean and std per channel, as the transformer reads
    them. z is the mode of the VAE's posterior; with a `key`, a sample of it.
    """
    video = jnp.asarray(from_uint8(frames, _dtype(params)))
    z, logvar = (x.astype(jnp.float32) for x in spec.encode(cfg, params, video, tiling))
    if key is not None:
        z = autoencoder.sample_posterior(z, logvar, jax.random.normal(key, z.shape))
    return autoencoder.normalise(z, mean, std)


def from_uint8(frames: np.ndarray, dtype: Any) -> np.ndarray:
    """Map clips (B, P, H, W, 3) uint8 to [-1, 1], as frames / 127.5 - 1, whose float64 arrays would
    take 16 bytes for each byte of a clip."""
    values = (np.arange(256) / 127.5 - 1).astype(dtype)
    video = np.empty(frames.shape, dtype)
    # NumPy copies the indices to 8 bytes each.
    for place in np.ndindex(frames.shape[:2]):
        video[place] = values[frames[place]]
    return video


def start_latent(
    spec: VaeSpec,
    cfg: Any,
    params: Params,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    key: jax.Array | None = None,
) -> jax.Array:
    """Encode images (B, H, W, 3) uint8, as clips of one frame, to latents (B, 1, H/8, W/8, C)."""
    return clip_latents(spec, cfg, params, images[:, None], mean, std, key)


def blend_prompts(prompts: Sequence[tuple[PromptStates, float]]) -> PromptStates:
    """Return the weighted mean of encoded prompts; a token is valid if it is in any of them."""
    if len(prompts) == 1:
        return prompts[0][0]

    each, shares = zip(*prompts, strict=True)

    def mean(parts: Sequence[jax.Array]) -> jax.Array:
        weighted = [x.astype(jnp.float32) * share for x, share in zip(parts, shares, strict=True)]
        return sum(weighted, start=jnp.zeros((), jnp.float32)).astype(parts[0].dtype)

    pooled = [states.pooled for states in each if states.pooled is not None]
    return PromptStates(
        mean([states.text for states in each]),
        functools.reduce(jnp.logical_or, [states.valid for states in each]),
        mean(pooled) if pooled else None,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _text_states(
    spec: TextEncoderSpec, cfg: Any, params: Params, ids: jax.Array, valid: jax.Array
) -> jax.Array:
    return spec.hidden_states(cfg, params, ids, valid)


_pooled = jax.jit(clip.pooled, static_argnums=0)
_image_states = jax.jit(siglip.hidden_states, static_argnums=0)


def _fill(template: str, prompt: str) -> str:
    parts = template.split("{}")
    if len(parts) != 2:
        raise ValueError(f"prompt template {template!r}: expected {{}} once, for the prompt")
    return parts[0] + prompt + parts[1]


def _pad_and_cut(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask), int32 (B, length)."""
    encoded = tokenizer(
        texts, max_length=length, padding="max_length", truncation=True, padding_side="right"
    )
    return np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.attention_mask, np.int32)


def _check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    if ids.max() >= vocab_size:
        raise ValueError(
            f"{name} makes id {ids.max()}, but its text encoder knows {vocab_size} ids; take both"
            " from the same checkpoint"
        )


def _dtype(params: Params) -> Any:
    return jax.tree.leaves(params)[0].dtype


def load_encoders(
    path: epath.PathLike,
    manifest: bundle.Manifest,
    dtype: Any,
    mesh: Mesh | None = None,
    streamed: bool = False,
) -> Encoders:
    """Load the encoders that the transformer of a bundle reads, with their tokenizers.

    Parameters have the `dtype` and are sharded over the mesh, if there is one. If `streamed`, the
    layers of large networks are read from the disk when they run. Raises BundleError, ValueError.
    """
    root = epath.Path(path)
    load = bundle.load_params
    if streamed:
        load = functools.partial(bundle.load_offloaded, hosted=0)
    spec, _ = bundle.text_encoder_config(manifest)
    networks = {
        name: (
            bundle.role_config(manifest, name)[1],
            load(root, manifest, name, dtype=dtype, mesh=mesh),
        )
        for name in bundle.encoder_roles(manifest)
    }
    summary, vision = "text_encoder_2" in networks, "image_encoder" in networks
    return Encoders(
        tokenizer=load_tokenizer(root / "tokenizer"),
        tokenizer_2=load_tokenizer(root / "tokenizer_2") if summary else None,
        image_processor=load_image_processor(root / "image_processor") if vision else None,
        text_spec=spec,
        template=manifest.prompt_template,
        text_tokens=manifest.text_tokens,
        **networks,
    )
