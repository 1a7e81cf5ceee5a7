"""The trained bundle of the package: where its weights come from, and what they are worth."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from framepack_jax import FramePack, bundle, conditioning
from framepack_jax.bundle.builtin import ASSETS
from framepack_jax.evaluation import metrics
from framepack_jax.generation.pipeline import Settings
from framepack_jax.models.encoders import llama
from framepack_jax.toy import baselines, scenes
from framepack_jax.toy.baselines import Prompt
from scripts import make_toy_bundle

SIZE = (128, 128)


@pytest.fixture(scope="module")
def pipe() -> FramePack:
    return FramePack.load(bundle.BUILTIN_BUNDLES["tiny"])


def test_weights_are_small_and_say_how_they_came_about() -> None:
    bytes_there = sum(f.stat().st_size for f in Path(ASSETS).rglob("*") if f.is_file())
    assert bytes_there <= 24e6
    manifests = {
        name: bundle.read_manifest(bundle.BUILTIN_BUNDLES[name])
        for name in ("tiny", "tiny_inverted")
    }
    for name, role in (("tiny", "vae"), ("tiny", "transformer"), ("tiny_inverted", "transformer")):
        story = manifests[name].roles[role].source["training"]
        assert story["step"] == story["config"]["steps"]
        assert story["config"]["seed"] >= 0 and story["code"]["framepack-jax"]
        assert all(np.isfinite(v) for v in story["metrics"].values() if v is not None)
        # No folder of the machine that it was trained on.
        assert '"/' not in json.dumps(story)


def test_both_orders_share_all_but_the_transformer(pipe) -> None:
    other = FramePack.load(bundle.BUILTIN_BUNDLES["tiny_inverted"])
    assert (pipe.schedule.order, other.schedule.order) == ("forward", "inverted")
    assert pipe.buckets == other.buckets == (SIZE,)
    shared = bundle.read_manifest(bundle.BUILTIN_BUNDLES["tiny_inverted"]).roles
    assert {role.path for role in shared.values()} == {
        "transformer", "../tiny/vae", "../tiny/text_encoder", "../tiny/text_encoder_2",
        "../tiny/image_encoder",
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, pipe.vae.params, other.vae.params)


def test_the_vae_gives_back_held_out_clips(pipe) -> None:
    """30 dB on average over scenes with forms in colours that it has not seen together."""
    found = []
    for case in scenes.drift_cases(1, 8, 17, SIZE, "vae"):
        truth = case.truth()
        found.append(metrics.psnr(baselines.reconstructed(pipe, truth), truth))
    assert np.mean(found) >= 30, found


def test_a_video_begins_with_its_image(pipe) -> None:
    """28 dB at least: it is what the VAE makes of the image."""
    (case,) = scenes.drift_cases(2, 1, 37, SIZE, "first")
    ask = Prompt(case.image, case.scene.caption, 0)
    (frames,) = baselines.sampled(pipe, [ask], 1, Settings(steps=4))
    assert frames.shape == (37, *SIZE, 3)
    assert metrics.psnr(frames[0], case.image) >= 28


def test_the_states_of_a_word_tell_whose_it_is(pipe) -> None:
    """Also where all else is alike: who moves left is read from what stands before "left"."""
    who = "red circle", "blue ring"
    captions = [f"the small {each} moves left; the camera stands still." for each in who]
    states, valid, _ = conditioning.encode_prompt(pipe.encoders, captions)
    words = pipe.encoders.tokenizer.tokenize(captions[0])
    assert valid.sum(1).tolist() == [len(words) + 1] * 2
    left = words.index("Ġleft")
    ours, theirs = (np.asarray(states[i], np.float32) for i in range(2))
    assert np.array_equal(ours[0], theirs[0])
    assert np.linalg.norm(ours[left] - theirs[left]) > 0.3 * np.linalg.norm(ours[left])


def test_heads_look_back_by_1_to_6_words() -> None:
    """After one layer a state changes with the words up to 6 before it, and with no other."""
    cfg = dataclasses.replace(make_toy_bundle.get_world_config().text_encoder, layers=1)
    params = make_toy_bundle.look_back(cfg, llama.init(cfg, jax.random.key(0)))
    ids = np.random.default_rng(0).permutation(cfg.vocab_size)[:40]
    changed = [np.where(np.arange(40) == 30 - back, 399 - ids, ids) for back in range(1, 10)]
    states = llama.hidden_states(cfg, params, np.stack([ids, *changed]), np.ones((10, 40), bool))
    same, others = np.asarray(states[0, 30]), np.asarray(states[1:, 30])
    moved = np.linalg.norm(others - same, axis=1) / np.linalg.norm(same)
    assert moved[:6].min() > 0.1 and moved[6:].max() < 1e-3, moved
