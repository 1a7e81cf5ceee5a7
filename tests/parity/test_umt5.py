"""UMT5 against live transformers at toy sizes, its full size, and the golden prompts."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.helios import pipeline_helios
from safetensors.numpy import load_file
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from framepack_jax import bundle, conditioning
from framepack_jax.cli import convert
from framepack_jax.models import registry
from framepack_jax.models.encoders import umt5
from framepack_jax.models.params import unstack_layers
from framepack_jax.models.quantization import cast_params
from framepack_jax.utils.text import clean_prompt
from tests.fixtures.reference_params import umt5_params
from tests.fixtures.torch_reference import randomize, relative_error

CFG = umt5.Umt5Config(
    vocab_size=50, width=24, layers=3, heads=4, head_dim=5, mlp_width=40, buckets=8, max_distance=20
)
states = jax.jit(umt5.hidden_states, static_argnums=0)


def hf_config(cfg: umt5.Umt5Config) -> transformers.UMT5Config:
    return transformers.UMT5Config(
        vocab_size=cfg.vocab_size, d_model=cfg.width, d_kv=cfg.head_dim, d_ff=cfg.mlp_width,
        num_layers=cfg.layers, num_heads=cfg.heads, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=cfg.buckets, layer_norm_epsilon=cfg.norm_eps,
        relative_attention_max_distance=cfg.max_distance,
    )  # fmt: skip


@functools.cache
def reference() -> transformers.UMT5EncoderModel:
    model = randomize(transformers.UMT5EncoderModel(hf_config(CFG)), 0)
    with torch.no_grad():  # of the size of the scores
        for block in model.encoder.block:
            block.layer[0].SelfAttention.relative_attention_bias.weight *= 3
    return model


def params() -> dict:
    return umt5_params({k: v.numpy() for k, v in reference().state_dict().items()}, CFG)


def inputs(lengths: tuple[int, ...], total: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, CFG.vocab_size, (len(lengths), total))
    return ids, np.arange(total)[None, :] < np.asarray(lengths)[:, None]


@pytest.mark.parametrize(("lengths", "total"), [((1,), 1), ((3, 7, 11), 11), ((60, 17), 64)])
def test_states_of_the_live_model(lengths, total) -> None:
    ids, valid = inputs(lengths, total)
    with torch.no_grad():
        theirs = reference()(torch.tensor(ids), torch.tensor(valid).long()).last_hidden_state
    ours = states(CFG, params(), ids, valid)
    assert relative_error(ours[valid], theirs[torch.tensor(valid)]) < 1e-5


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (12, 33), (64, 256)])
def test_every_distance_falls_into_the_bucket_of_the_live_model(buckets, max_distance) -> None:
    cfg = dataclasses.replace(CFG, buckets=buckets, max_distance=max_distance)
    live = UMT5Attention(hf_config(cfg), has_relative_attention_bias=True)
    offset = torch.arange(513)[None, :] - torch.arange(513)[:, None]
    theirs = live._relative_position_bucket(offset).numpy()
    np.testing.assert_array_equal(umt5.position_buckets(cfg, 513), theirs)


def test_bfloat16() -> None:
    ids, valid = inputs((5, 9), 9)
    exact = states(CFG, params(), ids, valid)
    rounded = states(
        CFG, cast_params(jax.tree.map(jnp.asarray, params()), jnp.bfloat16), ids, valid
    )
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    assert relative_error(rounded[valid], exact[valid]) < 0.05


def test_parameters_of_the_full_size_are_those_of_transformers() -> None:
    """The table of embeddings counts once."""
    cfg = umt5.Umt5Config()
    with torch.device("meta"):
        live = transformers.UMT5EncoderModel(hf_config(cfg))
    theirs = sum(parameter.numel() for parameter in live.parameters())
    assert registry.parameter_count("umt5", cfg) == theirs == 5_680_910_336


def test_init_makes_the_paths_that_are_fed_in() -> None:
    fed, made = unstack_layers(params(), umt5.STACKS), registry.abstract_leaves("umt5", CFG)
    assert {k: v.shape for k, v in fed.items()} == {k: v.shape for k, v in made.items()}


@pytest.fixture(scope="module")
def folder(golden) -> Path:
    return golden / "helios"


@pytest.fixture(scope="module")
def arrays(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "reference.safetensors")


@pytest.fixture(scope="module")
def prompts(folder) -> list[str]:
    facts = json.loads((folder / "reference.json").read_text())
    return [facts["prompt"], facts["negative"]]


@pytest.fixture(scope="module")
def root(folder, arrays, tmp_path_factory) -> Path:
    """Text encoder and transformer of the golden pipeline, converted by the command."""
    root = tmp_path_factory.mktemp("helios") / "bundle"
    convert.main(
        ["--text-encoder", str(folder / "pipeline" / "text_encoder"), "--output", str(root),
         "--transformer", str(folder / "pipeline" / "transformer"),
         "--text-tokens", str(arrays["ids"].shape[1])]
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def encoders(root) -> conditioning.Encoders:
    return conditioning.load_encoders(root, bundle.read_manifest(root), jnp.float32)


@pytest.mark.golden
def test_the_transformer_reads_the_text_encoder_alone(root, encoders, arrays, prompts) -> None:
    manifest = bundle.read_manifest(root)
    assert bundle.sampling_roles(manifest) == ("transformer", "vae", "text_encoder")
    spec, _ = bundle.denoiser_config(manifest)
    images = conditioning.encode_image(encoders, np.zeros((2, 64, 64, 3), np.uint8))
    states = conditioning.encode_prompt(encoders, prompts)
    made = spec.conditions(*states, images, np.zeros(2))
    assert relative_error(made.text, arrays["prompt_embeds"]) < 2e-4
    assert len(jax.tree.leaves(made)) == 1


@pytest.mark.golden
def test_golden_ids(encoders, arrays, prompts) -> None:
    length = arrays["ids"].shape[1]
    ids, valid, start = conditioning.tokenize_prompt(
        encoders.tokenizer, encoders.template, prompts, encoders.text_tokens
    )
    assert (start, encoders.text_tokens) == (0, length)
    np.testing.assert_array_equal(ids, arrays["ids"])
    np.testing.assert_array_equal(valid, arrays["mask"].astype(bool))


@pytest.mark.golden
def test_golden_states(encoders, arrays, prompts) -> None:
    text, valid, pooled = conditioning.encode_prompt(encoders, prompts)
    assert relative_error(text, arrays["prompt_embeds"]) < 2e-4
    np.testing.assert_array_equal(valid, arrays["mask"].astype(bool))
    assert not np.any(text[~valid]) and pooled is None


@pytest.mark.golden
def test_ids_are_those_of_transformers(encoders, folder, prompts) -> None:
    """Other prompts than the golden ones: empty, cut, cleaned, with special tokens and unknown
    letters."""
    live = transformers.AutoTokenizer.from_pretrained(folder / "pipeline" / "tokenizer")
    texts = ["", "a", "1", "日本語", "</s> red", " ".join(prompts * 20), prompts[0].upper()]
    theirs = live(
        texts, padding="max_length", max_length=encoders.text_tokens, truncation=True,
        add_special_tokens=True, return_tensors="np",
    )  # fmt: skip
    with pytest.warns(UserWarning, match=f"of which {encoders.text_tokens} are read"):
        ids, valid, _ = conditioning.tokenize_prompt(
            encoders.tokenizer, encoders.template, texts, encoders.text_tokens
        )
    np.testing.assert_array_equal(ids, theirs.input_ids)
    np.testing.assert_array_equal(valid, theirs.attention_mask.astype(bool))


@pytest.mark.golden
def test_prompts_are_cleaned(encoders, prompts) -> None:
    dirty = "  " + prompts[0].replace(" ", " \n&amp;nbsp;\t") + "\u3000"
    both = [conditioning.encode_prompt(encoders, [text]) for text in (prompts[0], dirty)]
    np.testing.assert_array_equal(both[0].text, both[1].text)
    counts = [conditioning.count_tokens(encoders, text) for text in (prompts[0], dirty)]
    assert counts == [int(both[0].valid.sum())] * 2


@pytest.mark.golden
def test_prompts_are_blended_without_a_pooled_state(encoders, prompts) -> None:
    long, short = (conditioning.encode_prompt(encoders, [text]) for text in prompts)
    mean = conditioning.blend_prompts([(long, 0.25), (short, 0.75)])
    assert relative_error(mean.text, 0.25 * long.text + 0.75 * short.text) < 1e-6
    assert mean.pooled is None and (mean.valid == (long.valid | short.valid)).all()


@pytest.mark.parametrize(
    "text", ["", " a  b ", "&amp;lt;b&gt;\n", "schÃ¶n \u201cred\u201d", "\x1f x"]
)
def test_prompts_are_cleaned_as_the_pipelines_do(text: str) -> None:
    assert clean_prompt(text) == pipeline_helios.prompt_clean(text)
