"""Tokenizer and image-processor files of the transformers library: found and copied as they are.

A bundle has a `tokenizer.json`, which needs no other package. It is made of a SentencePiece model
where there is none: of the `spiece.model` of a folder, or of the one inside of ComfyUI's files.
"""

import json
import tempfile
from pathlib import Path
from typing import TypeVar

from etils import epath

from framepack_jax.conversion.engine import Source
from framepack_jax.conversion.file_formats import ConversionError, check_contents
from framepack_jax.utils import extras
from framepack_jax.utils.messages import first_line

AnyPath = TypeVar("AnyPath", Path, epath.Path)
# Role of the network -> folder of its files in a bundle.
FOLDERS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "image_encoder": "image_processor",
}
# The file without which there is none.
MARKERS = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "image_processor": "preprocessor_config.json",
}
# Files of which one holds the vocabulary; the last is not copied.
SENTENCEPIECE = "spiece.model"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", SENTENCEPIECE)
# Tensor of ComfyUI's UMT5 with the bytes of a SentencePiece model, and the tokenizer that reads it.
EMBEDDED = "spiece_model"
T5 = {
    "tokenizer_class": "T5Tokenizer", "extra_ids": 0,
    "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
}  # fmt: skip
# Folder of the tokenizer beside the text encoder of Wan's release.
RELEASED = "google/umt5-xxl"
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def find(role: str, model: Path | None, given: Path | None) -> Path:
    """The folder with the files that the network at `model` needs: the one given, the network's
    own, or the one next to it in a diffusers pipeline. Raises ConversionError, and MissingExtra if
    a package to read them is missing."""
    name = FOLDERS[role]
    candidates = [given] if given else _candidates(name, model) if model else []
    for folder in candidates:
        if (folder / MARKERS[name]).exists():
            for file in _files_in(folder, name):
                check_contents(file)
            if _needs_conversion(folder):
                _require_sentencepiece(str(folder / SENTENCEPIECE))
            return folder
    raise ConversionError(
        f"no {MARKERS[name]} in {' or '.join(map(str, candidates))}; give the folder of the"
        f" {name.replace('_', ' ')} as --{name.replace('_', '-')}"
    )


def _candidates(name: str, model: Path) -> list[Path]:
    own = model if model.is_dir() else model.parent
    if name == "image_processor":
        return [own, own.parent / "feature_extractor"]
    return [own, own.parent / name, *([own / RELEASED] if name == "tokenizer" else [])]


def extract(source: Source, folder: Path) -> Path | None:
    """Write the tokenizer inside of a text encoder's file to `folder` and return that; return None
    if there is none. Raises MissingExtra."""
    name = source.prefix + EMBEDDED
    if name not in source.checkpoint:
        return None
    _require_sentencepiece(f"{source.checkpoint.path}, tensor {name}")
    (folder / SENTENCEPIECE).write_bytes(source.checkpoint.read(name).tobytes())
    (folder / MARKERS["tokenizer"]).write_text(json.dumps(T5))
    return folder


def copy(name: str, source: epath.PathLike, bundle: epath.Path) -> None:
    """Copy the files of `name` ("tokenizer", ...) into the bundle, or make them of a SentencePiece
    model. Raises ConversionError."""
    source, target = epath.Path(source), bundle / name
    target.mkdir(parents=True, exist_ok=True)
    if _needs_conversion(source):
        _convert(source, target)
        return
    for file in _files_in(source, name):
        file.copy(target / file.name, overwrite=True)


def _files_in(folder: AnyPath, name: str) -> list[AnyPath]:
    """Return the files of `name` that a folder has."""
    files = (MARKERS[name],) if name == "image_processor" else TOKENIZER_FILES
    return [folder / file for file in files if (folder / file).exists()]


def _needs_conversion(folder: AnyPath) -> bool:
    """Return True if a folder has no vocabulary but a SentencePiece model."""
    return [file for file in VOCABULARIES if (folder / file).exists()] == [SENTENCEPIECE]


def _convert(source: epath.Path, target: epath.Path) -> None:
    """Make the tokenizer of a local folder with a SentencePiece model."""
    from transformers import AutoTokenizer  # takes seconds, with torch installed

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # of many types, by what is damaged
        raise ConversionError(
            f"{source / SENTENCEPIECE} is no SentencePiece model ({first_line(error)}); give the"
            " folder of a tokenizer with tokenizer.json as --tokenizer"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in _files_in(Path(folder), target.name):
            epath.Path(file).copy(target / file.name, overwrite=True)


def _require_sentencepiece(what: str) -> None:
    packages = {"sentencepiece": "SentencePiece", "google.protobuf": "protobuf"}
    extras.require("sentencepiece", packages, f"the SentencePiece model {what}")
