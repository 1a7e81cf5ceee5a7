"""Tokenizers that are made of a SentencePiece model, alone or inside of a text encoder's file."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from framepack_jax import bundle
from framepack_jax.conditioning import load_tokenizer
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.utils.extras import MissingExtra
from tests.fixtures.checkpoints import UMT5, write
from tests.fixtures.torch_reference import randomize

CONFIG = transformers.UMT5Config(**UMT5)
TEXTS = ["a red sofa", "", "cats & dogs, 日本語", "ｆｕｌｌ  width", "unknown Ω"]


@pytest.fixture(scope="module")
def model() -> bytes:
    """A SentencePiece model with ids as UMT5's."""
    made = io.BytesIO()
    lines = ["the girl dances on a red sofa", "cats & dogs, full width", "日本語 のテキスト"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=45, model_type="unigram",
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    reader = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [[*reader.encode(text), 1] for text in TEXTS]


def comfyui(folder: Path, **more: torch.Tensor) -> Path:
    state = randomize(transformers.UMT5EncoderModel(CONFIG), 0).state_dict()
    del state["encoder.embed_tokens.weight"]
    CONFIG.save_pretrained(folder)
    return write(state | more, folder / "umt5.safetensors")


def converted(tmp_path: Path, file: Path, **given) -> Path:
    make_bundle(BundleRequest(output=str(tmp_path / "bundle"), text_encoder=file, **given))
    assert list(bundle.read_manifest(tmp_path / "bundle").roles) == ["text_encoder"]
    return tmp_path / "bundle" / "tokenizer"


def check(folder: Path, expected: list[list[int]], monkeypatch) -> None:
    """The bundle needs no SentencePiece."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert sorted(f.name for f in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(folder)(TEXTS).input_ids == expected


def test_the_model_inside_of_comfyuis_file(model, expected, tmp_path, monkeypatch) -> None:
    tensor = torch.tensor(np.frombuffer(model, np.uint8))
    file = comfyui(tmp_path / "source", spiece_model=tensor)
    check(converted(tmp_path, file), expected, monkeypatch)


def test_a_folder_with_a_model_alone(model, expected, tmp_path, monkeypatch) -> None:
    """As Wan's release has it, beside the file."""
    folder = tmp_path / "source" / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model)
    fields = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    check(converted(tmp_path, comfyui(tmp_path / "source")), expected, monkeypatch)


@pytest.mark.golden
def test_tokenizer_json_is_copied_as_it_is(golden, model, tmp_path) -> None:
    shutil.copytree(golden / "helios/pipeline/tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(model)
    folder = converted(tmp_path, comfyui(tmp_path / "source"), tokenizer=tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    file = comfyui(tmp_path / "source", spiece_model=torch.zeros(9, dtype=torch.uint8))
    said = r"spiece_model needs SentencePiece \(.*framepack-jax\[sentencepiece\]"
    with pytest.raises(MissingExtra, match=said):
        converted(tmp_path, file)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_tokenizer_is_named(tmp_path) -> None:
    with pytest.raises(ConversionError, match=r"as --tokenizer; .*Wan2\.1-T2V-1\.3B-Diffusers"):
        converted(tmp_path, comfyui(tmp_path / "source"))


def test_a_damaged_model_is_named(tmp_path) -> None:
    file = comfyui(tmp_path / "source", spiece_model=torch.full((9,), 255, dtype=torch.uint8))
    with pytest.raises(ConversionError, match=r"spiece\.model is no SentencePiece model"):
        converted(tmp_path, file)
