"""From a prompt and an image to what conditions a video.

Source: HunyuanVideo's text conditioning (arXiv 2412.03603, section 4.3) with FramePack's image
tokens: Llama reads the prompt inside a template and gives a state for every prompt token, CLIP
reads the bare prompt and gives one vector, SigLIP turns the image into tokens, and the VAE makes
the start latent. Sampling and dataset preparation both come through here.

Shapes: B batch, L Llama tokens, H W rows and columns, C latent channels.
"""

import dataclasses
import functools
import json
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from framepack_jax import bundle
from framepack_jax.models import offload
from framepack_jax.models.encoders import clip, llama, siglip
from framepack_jax.models.hunyuan import vae
from framepack_jax.models.hunyuan.config import VaeConfig
from framepack_jax.models.params import Params
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS
from framepack_jax.models.tiling import Tiling

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
ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder")
# Words shown of a prompt that is cut, of its beginning and of its end.
KEPT_WORDS = 8

WHOLE_FRAMES = Tiling()
# Result of `encode_prompt`.
PromptStates = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Preprocessing of images for the image encoder: resize to `size` (height, width) with the
    Pillow filter `resample`, then (pixels * `rescale` - `mean`) / `std`."""

    size: tuple[int, int]
    resample: int = Image.Resampling.BICUBIC
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> float32 (B, height, width, 3)."""
        height, width = self.size
        resized = [
            np.asarray(Image.fromarray(x).resize((width, height), self.resample)) for x in images
        ]
        mean, std = (np.asarray(x, np.float32)[None, None, None, :] for x in (self.mean, self.std))
        return ((np.stack(resized) * self.rescale).astype(np.float32) - mean) / std


@dataclasses.dataclass(frozen=True, eq=False)
class Encoders:
    """Everything that reads prompts and images; networks are (config, parameters) and compute in
    the dtype of their parameters. `template` has one `{}` for the prompt."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase
    image_processor: ImageProcessor
    text_encoder: tuple[llama.LlamaConfig, Params]
    text_encoder_2: tuple[clip.ClipConfig, Params]
    image_encoder: tuple[siglip.SiglipConfig, Params]
    template: str = PROMPT_TEMPLATE


def load_tokenizer(folder: epath.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`. Raises ValueError if there is none."""
    folder = epath.Path(folder)
    if not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"no tokenizer in {folder}: tokenizer_config.json is missing")
    # transformers reads local files only, the folder may be in a bucket.
    with tempfile.TemporaryDirectory() as local:
        for file in folder.iterdir():
            if not file.is_dir():
                file.copy(epath.Path(local) / file.name)
        tokenizer = AutoTokenizer.from_pretrained(local, local_files_only=True)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"the tokenizer in {folder} has no pad token, which prompts are filled with"
        )
    return tokenizer


def load_image_processor(folder: epath.PathLike) -> ImageProcessor:
    """Read `preprocessor_config.json`. Raises ValueError if it is missing, or asks for anything but
    a resize to a fixed size, a rescale and a normalisation."""
    file = epath.Path(folder) / "preprocessor_config.json"
    if not file.exists():
        raise ValueError(f"no image processor in {folder}: {file.name} is missing")
    fields = json.loads(file.read_text())
    steps = {name: fields.get(name, True) for name in ("do_resize", "do_rescale", "do_normalize")}
    size = fields["size"]
    if not all(steps.values()) or fields.get("do_center_crop") or set(size) != {"height", "width"}:
        raise ValueError(
            f"image processor {file}: {steps}, do_center_crop {fields.get('do_center_crop')}, size"
            f" {size}; expected all three steps, no crop, and a size of height and width (SigLIP's)"
        )
    return ImageProcessor(
        size=(size["height"], size["width"]),
        resample=fields.get("resample", ImageProcessor.resample),
        rescale=fields.get("rescale_factor", ImageProcessor.rescale),
        mean=tuple(fields.get("image_mean", ImageProcessor.mean)),
        std=tuple(fields.get("image_std", ImageProcessor.std)),
    )


def prompt_start(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """Count the tokens before the first token of the prompt: those that two prompts share."""
    first, second = tokenizer([_fill(template, prompt) for prompt in ("a", "1")]).input_ids
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def count_tokens(encoders: Encoders, prompt: str) -> int:
    """Return the number of tokens that Llama would read of a prompt, the template's end among them;
    those after MAX_PROMPT_TOKENS are cut."""
    text = _fill(encoders.template, prompt)
    ids = encoders.tokenizer(text, verbose=False).input_ids
    return len(ids) - prompt_start(encoders.tokenizer, encoders.template)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Llama's (ids, valid, start): int32 and bool (B, L) with L = start + MAX_PROMPT_TOKENS, padded
    on the right; the prompts' own tokens begin at `start`.

    A prompt that does not fit is cut, with a warning that quotes the last words read.
    """
    start = prompt_start(tokenizer, template)
    texts = [_fill(template, prompt) for prompt in prompts]
    for i, whole in enumerate(tokenizer(texts, verbose=False).input_ids):
        kept = start + MAX_PROMPT_TOKENS
        if len(whole) > kept:
            words = str(tokenizer.decode(whole[start:kept], skip_special_tokens=True)).split()
            warnings.warn(
                f"prompt {' '.join(prompts[i].split()[:KEPT_WORDS])!r} ... is too long:"
                f" {len(whole) - start} tokens with the template's end, of"
                f" which {MAX_PROMPT_TOKENS} are read. The last words read are:"
                f' "... {" ".join(words[-KEPT_WORDS:])}". Shorten the prompt, or move what matters'
                " to its beginning",
                stacklevel=4,
            )
    ids, mask = _pad_and_cut(tokenizer, texts, start + MAX_PROMPT_TOKENS)
    return ids, mask.astype(bool), start


def tokenize_summary(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int
) -> np.ndarray:
    """CLIP's ids (B, length), int32, of the bare prompts.

    A longer prompt is cut without a word: CLIP gives one vector for the gist and reads no more
    than 77 tokens by design, while every token still reaches the video by way of Llama.
    """
    return _pad_and_cut(tokenizer, list(prompts), length)[0]


def encode_prompt(encoders: Encoders, prompts: Sequence[str]) -> PromptStates:
    """Encode prompts to (`text`, `valid`, `pooled`). A prompt may be empty.

    `text` (B, MAX_PROMPT_TOKENS, D) is zero if `valid` (B, MAX_PROMPT_TOKENS) is False; the True
    entries of `valid` are a prefix. `pooled` is (B, D_pooled).

    Warns if a prompt is truncated. Raises ValueError if the template has not exactly one `{}`, or
    if a tokenizer gives ids outside the vocabulary of its network.
    """
    return encode_each(encoders, [prompts])[0]


def encode_each(encoders: Encoders, batches: Sequence[Sequence[str]]) -> list[PromptStates]:
    """`encode_prompt` for several batches, each as if it were alone; a text encoder that is not on
    the device is read once for all. Warns and raises as that does."""
    cfg, params = encoders.text_encoder
    tokens = []
    for prompts in batches:
        ids, mask, start = tokenize_prompt(encoders.tokenizer, encoders.template, prompts)
        _check_ids("tokenizer", ids, cfg.vocab_size)
        tokens.append((ids, mask))
    if offload.is_offloaded(params):
        read = llama.hidden_states_of_each(cfg, params, tokens)
    else:
        read = [_text_states(cfg, params, *each) for each in tokens]
    given = []
    for prompts, (_, mask), states in zip(batches, tokens, read, strict=True):
        states, valid = states[:, start:], jnp.asarray(mask[:, start:])
        text = jnp.where(valid[:, :, None], states, jnp.zeros_like(states))
        given.append((text, valid, _summaries(encoders, prompts)))
    return given


def _summaries(encoders: Encoders, prompts: Sequence[str]) -> jax.Array:
    """Return CLIP's vectors (B, D_pooled) of prompts."""
    cfg, params = encoders.text_encoder_2
    ids = tokenize_summary(encoders.tokenizer_2, prompts, cfg.max_tokens)
    _check_ids("tokenizer_2", ids, cfg.vocab_size)
    return _pooled(cfg, params, ids)


def encode_image(encoders: Encoders, images: np.ndarray) -> jax.Array:
    """uint8 (B, H, W, 3), already cropped to the video's size -> tokens (B, tokens, D_img)."""
    cfg, params = encoders.image_encoder
    pixels = jnp.asarray(encoders.image_processor(images), _dtype(params))
    return _image_states(cfg, params, pixels)


def clip_latents(
    cfg: VaeConfig,
    params: Params,
    frames: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    key: jax.Array | None = None,
    tiling: Tiling = WHOLE_FRAMES,
) -> jax.Array:
    """uint8 (B, P, H, W, 3) -> (B, 1 + (P - 1) / 4, H/8, W/8, C) float32, the latents of a clip as
    the transformer sees them, (z - mean) / std with a mean and std per channel.

    z is the mode of the VAE's posterior, or a sample of it where a key is given.
    """
    video = jnp.asarray(frames / 127.5 - 1, _dtype(params))
    z, logvar = (x.astype(jnp.float32) for x in vae.encode(cfg, params, video, tiling))
    if key is not None:
        z += jnp.exp(0.5 * logvar) * jax.random.normal(key, z.shape)
    centre, scale = (jnp.asarray(x, jnp.float32)[None, None, None, None, :] for x in (mean, std))
    return (z - centre) / scale


def start_latent(
    cfg: VaeConfig,
    params: Params,
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    key: jax.Array | None = None,
) -> jax.Array:
    """uint8 (B, H, W, 3) -> (B, 1, H/8, W/8, C), `clip_latents` of a clip of one frame."""
    return clip_latents(cfg, params, images[:, None], mean, std, key)


def blend_prompts(prompts: Sequence[tuple[PromptStates, float]]) -> PromptStates:
    """Return the weighted mean of encoded prompts; a token is valid if it is in any of them."""
    if len(prompts) == 1:
        return prompts[0][0]

    def mean(part: int) -> jax.Array:
        weighted = [states[part].astype(jnp.float32) * share for states, share in prompts]
        return sum(weighted, start=jnp.zeros((), jnp.float32)).astype(prompts[0][0][part].dtype)

    valid = functools.reduce(jnp.logical_or, [states[1] for states, _ in prompts])
    return mean(0), valid, mean(2)


_text_states = jax.jit(llama.hidden_states, static_argnums=0)
_pooled = jax.jit(clip.pooled, static_argnums=0)
_image_states = jax.jit(siglip.hidden_states, static_argnums=0)


def _fill(template: str, prompt: str) -> str:
    parts = template.split("{}")
    if len(parts) != 2:
        raise ValueError(f"prompt template {template!r}: expected {{}} once, for the prompt")
    return parts[0] + prompt + parts[1]


def _pad_and_cut(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), int32 (B, length)."""
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
    """Tokenizers, image processor, and the networks with parameters of `dtype`, divided over a
    mesh if there is one; `streamed`, the layers of large ones are read from the disk as they are
    needed. Raises BundleError, ValueError."""
    root = epath.Path(path)
    load = bundle.load_params
    if streamed:
        load = functools.partial(bundle.load_offloaded, hosted=0)
    networks = {
        name: (
            bundle.role_config(manifest, name)[1],
            load(root, manifest, name, dtype=dtype, mesh=mesh),
        )
        for name in ENCODERS
    }
    return Encoders(
        tokenizer=load_tokenizer(root / "tokenizer"),
        tokenizer_2=load_tokenizer(root / "tokenizer_2"),
        image_processor=load_image_processor(root / "image_processor"),
        template=manifest.prompt_template,
        **networks,
    )
