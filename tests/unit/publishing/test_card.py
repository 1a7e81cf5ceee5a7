"""Model cards: what files record, and licences by the name of the base."""

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from framepack_jax import bundle
from framepack_jax.bundle import Manifest
from framepack_jax.conversion import hub
from framepack_jax.publishing.artifact import recognise
from framepack_jax.publishing.card import card
from framepack_jax.publishing.facts import facts_of
from framepack_jax.publishing.licences import licence_of

HUNYUAN = "tencent-hunyuan-community"


def card_of(manifest: Manifest, root: Path, monkeypatch) -> ModelCard:
    """The card of a bundle with another manifest."""
    monkeypatch.setattr(bundle, "read_manifest", lambda path: manifest)
    found = recognise(root)
    return ModelCard(card(found, facts_of(found), "people/model"))


def with_source(manifest: Manifest, **source: object) -> Manifest:
    role = dataclasses.replace(manifest.roles["transformer"], source=source)
    return dataclasses.replace(manifest, roles=manifest.roles | {"transformer": role})


@pytest.fixture(scope="module")
def tiny() -> tuple[Manifest, Path]:
    root = bundle.BUILTIN_BUNDLES["tiny"]
    return bundle.read_manifest(root), root


def test_a_bundle_that_was_trained_from_nothing(tiny, monkeypatch) -> None:
    found = card_of(*tiny, monkeypatch)
    for row in (
        "| base model | none: trained from random weights |", "| licence of the base | unknown |",
        "| packing schedule | `f1k1_x_f16k4f2k2f1k1_g9` |", "| sampling order | forward |",
        "| training steps | 3,000 |", "| dataset | fingerprint `", "`, 668 clips |",
        "| transformer | hunyuan_packed_dit | outputs/world/f1_more at step 3000, moving average |",
    ):  # fmt: skip
        assert row in found.text
    assert found.data.license == "unknown" and found.data.base_model is None
    assert "framepack pull people/model" in found.text


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        *((parts["transformer"][0], HUNYUAN) for parts in hub.FRAMEPACK.values()),
        (f"{hub.HUNYUAN}/transformer", HUNYUAN),
        *((f"{repo}/transformer", "apache-2.0") for repo in hub.HELIOS.values()),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer", "apache-2.0"),
        ("people/other", "unknown"), ("/home/me/Wan-AI/model", "unknown"),
    ],
)  # fmt: skip
def test_licences_by_the_name_of_the_base(name, licence, tiny, monkeypatch) -> None:
    """Of a converted bundle, and of one that was trained from it."""
    manifest, root = tiny
    trained = {
        "name": "runs/mine at step 5",
        "base": name,
        "training": {"step": 5, "began": "bundle"},
    }
    for source in ({"name": name}, trained):
        found = card_of(with_source(manifest, **source), root, monkeypatch)
        known = licence != "unknown"
        assert licence == (found.data.license_name or found.data.license)
        assert found.data.base_model == ("/".join(name.split("/")[:2]) if known else None)
        assert ("Set `license`" not in found.text) == known
        assert "/home/me" not in str(found)
    assert "| training steps | 5 |" in found.text


def test_a_bundle_whose_base_is_not_recorded_claims_none(tiny, monkeypatch) -> None:
    """As bundles that were trained before the base was recorded."""
    manifest, root = tiny
    source = {"name": "lllyasviel/FramePackI2V_HY run at step 5", "training": {"step": 5}}
    found = card_of(with_source(manifest, **source), root, monkeypatch)
    assert found.data.license == "unknown" and "| base model | unknown |" in found.text


def test_encoders_of_others_have_no_licence_of_the_repository() -> None:
    assert licence_of(f"{hub.HUNYUAN}/vae", "vae") is not None
    assert licence_of(f"{hub.HUNYUAN}/text_encoder", "text_encoder") is None
