"""Conditions of a bundle whose transformer reads nothing but the text encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import bundle, packing
from framepack_jax.conditioning import load_encoders
from framepack_jax.generation.layout import fit_images, make_layout
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.generation.request import Request
from framepack_jax.models import registry
from framepack_jax.models.encoders import umt5
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.params import unstack_layers

RANDOM = bundle.BUILTIN_BUNDLES["random"]
IMAGE = np.zeros((64, 64, 3), np.uint8)
TOKENS = 12


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A bundle with UMT5 and no other encoder, of a transformer that asks for no other."""

    def of_text(_: object) -> tuple[str, ...]:
        return ("text_encoder",)

    spec = dataclasses.replace(TRANSFORMER, encoders=of_text, conditions=lambda *of: of)
    monkeypatch.setitem(registry.NETWORKS, spec.kind, spec)
    released = bundle.read_manifest(RANDOM)
    vocabulary = released.roles["text_encoder"].config["vocab_size"]
    cfg = umt5.Umt5Config(vocabulary, 16, 2, 2, 4, 12, 8, 20)
    leaves = unstack_layers(umt5.init(cfg, jax.random.key(0)), umt5.STACKS)
    bundle.write_params(tmp_path / "text_encoder", ((k, np.asarray(v)) for k, v in leaves.items()))
    roles = {
        name: dataclasses.replace(released.roles[name], path=str(RANDOM / name))
        for name in ("transformer", "vae")
    }
    roles["text_encoder"] = bundle.Role("umt5", dataclasses.asdict(cfg), "text_encoder")
    (tmp_path / "tokenizer").symlink_to(RANDOM / "tokenizer")
    manifest = dataclasses.replace(
        released, roles=roles, prompt_template="{}", text_tokens=TOKENS,
        schedule=packing.parse("f1k1_x_f16k4f2k2f1k1_g2"),
    )  # fmt: skip
    bundle.write_manifest(tmp_path, manifest)
    return tmp_path


def test_conditions_of_text_alone(root) -> None:
    pipe = FramePack.load(root, dtype="float32")
    request = Request("0s: she waves 0.3s: she bows", IMAGE, "blurred")
    layout = make_layout(pipe.geometry, request, sections=2, height=64, width=64)
    settings = Settings(cfg_scale=5.0)
    fitted = fit_images(pipe.geometry, request, layout)
    inputs = pipe.encode([fitted, fitted], layout, settings)
    for text, valid, pooled, image, guidance in (*inputs.conditions, inputs.negative):
        assert text.shape == (2, TOKENS, 16) and valid.shape == (2, TOKENS)
        assert pooled is None and image is None and guidance.shape == (2,)
        assert not np.any(text[~valid]) and np.all(np.any(text[valid], axis=-1))
    first, last = (each[0] for each in inputs.conditions)
    assert np.abs(first - last).max() > 0.1


def test_layers_on_the_disk_give_the_same_states(root) -> None:
    manifest = bundle.read_manifest(root)
    whole, streamed = (
        load_encoders(root, manifest, jnp.float32, streamed=each) for each in (False, True)
    )
    spec, tokens = whole.text_spec, [(np.arange(9)[None], np.ones((1, 9), bool))] * 2
    ours, theirs = (
        spec.hidden_states_of_each(*each.text_encoder, tokens) for each in (streamed, whole)
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_encoders_that_are_asked_for_and_missing_are_named(root, monkeypatch) -> None:
    monkeypatch.setitem(registry.NETWORKS, TRANSFORMER.kind, TRANSFORMER)
    with pytest.raises(bundle.BundleError, match="the bundle has no text_encoder_2"):
        FramePack.open(root)
    with pytest.raises(bundle.BundleError, match="the bundle has no text_encoder_2"):
        load_encoders(root, bundle.read_manifest(root), jnp.float32)


def test_an_image_encoder_encodes_no_text(root) -> None:
    manifest = bundle.read_manifest(root)
    role = bundle.read_manifest(RANDOM).roles["text_encoder_2"]
    wrong = dataclasses.replace(manifest, roles=manifest.roles | {"text_encoder": role})
    with pytest.raises(bundle.BundleError, match="'clip_text', which gives no token states"):
        load_encoders(root, wrong, jnp.float32)
