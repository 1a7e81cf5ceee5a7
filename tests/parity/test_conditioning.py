"""Tokens, embeddings and start latents against the golden pipeline, and what a user meets."""

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import transformers
from PIL import Image
from safetensors.numpy import load_file

from framepack_jax import conditioning
from framepack_jax.models.encoders import clip, llama, siglip
from framepack_jax.models.hunyuan import vae
from framepack_jax.models.hunyuan.config import VaeConfig
from framepack_jax.models.hunyuan.spec import VAE
from framepack_jax.models.quantization import cast_params
from tests.fixtures.reference_params import clip_params, llama_params, siglip_params, vae_params
from tests.fixtures.torch_reference import relative_error

pytestmark = pytest.mark.golden
PARITY = 1e-4


@pytest.fixture(scope="module")
def folder(golden) -> Path:
    return golden / "diffusers_pipeline"


@pytest.fixture(scope="module")
def reference(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "reference.safetensors")


@pytest.fixture(scope="module")
def settings(folder) -> dict:
    return json.loads((folder / "reference.json").read_text())


@pytest.fixture(scope="module")
def image(folder) -> np.ndarray:
    return np.asarray(Image.open(folder / "image.png"))[None]


@pytest.fixture(scope="module")
def encoders(folder, settings) -> conditioning.Encoders:
    """The golden pipeline's encoders; configs and weights mapped by hand."""
    pipeline = folder / "pipeline"

    def read(role: str) -> tuple[dict, dict[str, np.ndarray]]:
        config = json.loads((pipeline / role / "config.json").read_text())
        return config, load_file(pipeline / role / "model.safetensors")

    fields, state = read("text_encoder")
    text = llama.LlamaConfig(
        vocab_size=fields["vocab_size"], width=fields["hidden_size"],
        layers=fields["num_hidden_layers"] - 2, heads=fields["num_attention_heads"],
        kv_heads=fields["num_key_value_heads"], head_dim=fields["head_dim"],
        mlp_width=fields["intermediate_size"], norm_eps=fields["rms_norm_eps"],
        rope_theta=fields["rope_parameters"]["rope_theta"],
    )  # fmt: skip
    fields_2, state_2 = read("text_encoder_2")
    text_2 = clip.ClipConfig(
        **_shared(fields_2), vocab_size=fields_2["vocab_size"], activation=fields_2["hidden_act"],
        max_tokens=fields_2["max_position_embeddings"], eos_token_id=fields_2["eos_token_id"],
    )  # fmt: skip
    fields_3, state_3 = read("image_encoder")
    vision = siglip.SiglipConfig(
        **_shared(fields_3), image_size=fields_3["image_size"], patch_size=fields_3["patch_size"]
    )
    return conditioning.Encoders(
        tokenizer=conditioning.load_tokenizer(pipeline / "tokenizer"),
        tokenizer_2=conditioning.load_tokenizer(pipeline / "tokenizer_2"),
        image_processor=conditioning.load_image_processor(pipeline / "feature_extractor"),
        text_encoder=(text, llama_params(state, text)),
        text_encoder_2=(text_2, clip_params(state_2, text_2)),
        image_encoder=(vision, siglip_params(state_3, vision)),
        template=settings["prompt_template"]["template"],
    )


def _shared(fields: dict) -> dict:
    return {
        "width": fields["hidden_size"], "layers": fields["num_hidden_layers"],
        "heads": fields["num_attention_heads"], "mlp_width": fields["intermediate_size"],
        "norm_eps": fields["layer_norm_eps"],
    }  # fmt: skip


def test_template(settings):
    assert settings["prompt_template"]["template"] == conditioning.PROMPT_TEMPLATE


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.filterwarnings("ignore:prompt .* is too long")
def test_ids(encoders, settings, reference, name):
    prompts = [settings["prompts"][name]]
    ids, valid, start = conditioning.tokenize_prompt(encoders.tokenizer, encoders.template, prompts)
    assert start == settings["prompt_template"]["crop_start"]
    np.testing.assert_array_equal(ids, reference[f"llama_ids_{name}"])
    np.testing.assert_array_equal(valid, reference[f"llama_mask_{name}"])
    np.testing.assert_array_equal(valid[:, start:], reference[f"prompt_mask_{name}"])
    length = reference[f"clip_ids_{name}"].shape[1]
    ids = conditioning.tokenize_summary(encoders.tokenizer_2, prompts, length)
    np.testing.assert_array_equal(ids, reference[f"clip_ids_{name}"])


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.filterwarnings("ignore:prompt .* is too long")
def test_text_embeddings(encoders, settings, reference, name):
    text, valid, pooled = conditioning.encode_prompt(encoders, [settings["prompts"][name]])
    assert text.shape[1] == valid.shape[1] == conditioning.MAX_PROMPT_TOKENS
    mask = np.asarray(valid)
    assert relative_error(text[mask], reference[f"prompt_embeds_{name}"][mask]) < PARITY
    assert not np.any(text[~mask])
    assert relative_error(pooled, reference[f"pooled_{name}"]) < PARITY


def test_batch_equals_single_prompts(encoders, settings):
    prompts = [settings["prompts"]["a"], settings["negative_prompt"], ""]
    both = conditioning.encode_prompt(encoders, prompts)
    for i, prompt in enumerate(prompts):
        for ours, alone in zip(both, conditioning.encode_prompt(encoders, [prompt]), strict=True):
            assert relative_error(ours[i : i + 1], alone) < 1e-6
    # The empty prompt still has the template's closing token.
    assert both[1][2].tolist() == [True] + [False] * (conditioning.MAX_PROMPT_TOKENS - 1)


def test_cut_prompt_warns_and_says_where(encoders, settings):
    cut = "one two three " + "word " * 400
    with pytest.warns(UserWarning, match="prompt 'one two three .* is too long") as caught:
        conditioning.encode_prompt(encoders, [settings["prompts"]["a"], cut])
    assert [w.filename for w in caught] == [__file__]
    start, message = settings["prompt_template"]["crop_start"], str(caught[0].message)
    whole = encoders.tokenizer(encoders.template.format(cut)).input_ids
    assert f"{len(whole) - start} tokens" in message and "256 are read" in message
    quoted = message.split('"... ')[1].split('"')[0]
    assert len(quoted.split()) == 8 and "word word" in quoted


def test_longest_prompt_that_fits_is_not_cut(encoders, settings):
    """The last prompt without a warning fills the rows to the last; CLIP's cut is silent."""
    tokenizer, template = encoders.tokenizer, encoders.template
    room = settings["prompt_template"]["crop_start"] + conditioning.MAX_PROMPT_TOKENS
    prompts = ["!" + " !" * n for n in range(300)]
    lengths = [len(ids) for ids in tokenizer([template.format(p) for p in prompts]).input_ids]
    longest = max(n for n, length in enumerate(lengths) if length <= room)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditioning.encode_prompt(encoders, [prompts[longest]])
    with pytest.warns(UserWarning, match="too long"):
        conditioning.encode_prompt(encoders, [prompts[longest + 1]])


def test_images(encoders, reference, image, folder):
    pixels = encoders.image_processor(image)
    assert relative_error(pixels.transpose(0, 3, 1, 2), reference["siglip_pixels"]) < 1e-6
    states = conditioning.encode_image(encoders, image)
    assert relative_error(states, reference["siglip_last_hidden_state"]) < PARITY


def test_image_processor_defaults(tmp_path):
    """A file that gives the size alone means what it means to transformers."""
    size = {"height": 30, "width": 20}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    image = np.random.default_rng(0).integers(0, 256, (1, 50, 60, 3), np.uint8)
    live = transformers.SiglipImageProcessorPil(size=size)
    theirs = live(image[0], return_tensors="np").pixel_values
    ours = conditioning.load_image_processor(tmp_path)(image)
    assert relative_error(ours.transpose(0, 3, 1, 2), theirs) < 1e-6


@pytest.mark.parametrize("size", [(40, 90), (480, 832), (42, 42)])
def test_image_processor_equals_the_live_one(encoders, folder, size):
    live = transformers.SiglipImageProcessorPil.from_pretrained(
        folder / "pipeline" / "feature_extractor"
    )
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    theirs = np.stack(live(list(images), return_tensors="np").pixel_values)
    ours = encoders.image_processor(images)
    assert ours.dtype == np.float32
    assert relative_error(ours.transpose(0, 3, 1, 2), theirs) < 1e-6


def test_conditions_in_bfloat16(encoders, image):
    names = ("text_encoder", "text_encoder_2", "image_encoder")
    half = {
        name: (cfg, cast_params(jax.tree.map(jnp.asarray, params), jnp.bfloat16))
        for name in names
        for cfg, params in [getattr(encoders, name)]
    }
    half = dataclasses.replace(encoders, **half)
    states = *conditioning.encode_prompt(half, ["a boat"]), conditioning.encode_image(half, image)
    dtypes = [state.dtype for state in states]
    assert dtypes == [jnp.bfloat16, jnp.bool_, jnp.bfloat16, jnp.bfloat16]


def test_refusals(encoders, tmp_path, folder):
    with pytest.raises(ValueError, match=r"expected \{\} once"):
        conditioning.encode_prompt(dataclasses.replace(encoders, template="no place"), ["a"])
    cfg, params = encoders.text_encoder
    small = dataclasses.replace(cfg, vocab_size=10)
    with pytest.raises(ValueError, match="its text encoder knows 10 ids"):
        conditioning.encode_prompt(
            dataclasses.replace(encoders, text_encoder=(small, params)), ["a"]
        )
    with pytest.raises(ValueError, match="no tokenizer in"):
        conditioning.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no image processor in"):
        conditioning.load_image_processor(tmp_path)
    fields = json.loads(
        (folder / "pipeline/feature_extractor/preprocessor_config.json").read_text()
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields | {"do_rescale": False}))
    with pytest.raises(ValueError, match="'do_rescale': False"):
        conditioning.load_image_processor(tmp_path)


def test_no_torch_is_needed(folder):
    """Tokenizers and image processor load and run where torch cannot be imported."""
    program = (
        "import sys; sys.modules.update(torch=None, torchvision=None)\n"
        "import numpy as np\n"
        "from framepack_jax import conditioning as c\n"
        f"root = {str(folder / 'pipeline')!r}\n"
        "tokenizer = c.load_tokenizer(root + '/tokenizer')\n"
        "print(c.tokenize_prompt(tokenizer, c.PROMPT_TEMPLATE, ['a'])[0].shape[1])\n"
        "print(c.tokenize_summary(c.load_tokenizer(root + '/tokenizer_2'), ['a'], 77).shape[1])\n"
        "c.load_image_processor(root + '/feature_extractor')(np.zeros((1, 9, 9, 3), np.uint8))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = conditioning.prompt_start(
        conditioning.load_tokenizer(folder / "pipeline/tokenizer"), conditioning.PROMPT_TEMPLATE
    )
    assert done.stdout.split() == [str(start + conditioning.MAX_PROMPT_TOKENS), "77"]


def test_start_latent(folder, reference, image):
    state = safetensors.torch.load_file(folder / "pipeline/vae/diffusion_pytorch_model.safetensors")
    fields = json.loads((folder / "pipeline/vae/config.json").read_text())
    cfg = VaeConfig(
        channels=tuple(fields["block_out_channels"]), layers_per_block=fields["layers_per_block"],
        norm_groups=fields["norm_num_groups"], latent_channels=fields["latent_channels"],
    )  # fmt: skip
    params = vae_params(state)
    mean, std = (
        np.zeros(cfg.latent_channels),
        np.full(cfg.latent_channels, 1 / fields["scaling_factor"]),
    )
    mode = conditioning.start_latent(VAE, cfg, params, image, mean, std)
    expected = reference["image_latents_mode"].transpose(0, 2, 3, 4, 1)
    assert relative_error(mode, expected) < PARITY

    # A mean and std of its own for each channel, and a sample of the posterior.
    mean, std = np.linspace(-1, 1, cfg.latent_channels), np.linspace(1, 2, cfg.latent_channels)
    raw, logvar = vae.encode(cfg, params, jnp.asarray(image[:, None] / 127.5 - 1, jnp.float32))
    key = jax.random.key(3)
    sample = conditioning.start_latent(VAE, cfg, params, image, mean, std, key)
    raw += jnp.exp(logvar / 2) * jax.random.normal(key, raw.shape)
    assert relative_error(sample, (np.asarray(raw) - mean) / std) < 1e-5


def test_blended_prompts_are_their_mean() -> None:
    def states(value: float, length: int):
        text = jnp.where(jnp.arange(4)[None, :, None] < length, value, 0.0) * jnp.ones((1, 4, 2))
        valid = jnp.arange(4)[None, :] < length
        return conditioning.PromptStates(text, valid, jnp.full((1, 3), value))

    a, b = states(1.0, 1), states(5.0, 3)
    assert conditioning.blend_prompts([(a, 1.0)]) is a
    text, valid, pooled = conditioning.blend_prompts([(a, 0.25), (b, 0.75)])
    np.testing.assert_allclose(text[0, :, 0], [4, 3.75, 3.75, 0])
    assert valid.tolist() == [[True, True, True, False]]
    np.testing.assert_allclose(pooled, np.full((1, 3), 4.0))
