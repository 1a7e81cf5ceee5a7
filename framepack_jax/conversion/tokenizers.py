"""Tokenizer and image-processor files of the transformers library: found and copied as they are."""

from pathlib import Path
from typing import TypeVar

from etils import epath

from framepack_jax.conversion.file_formats import ConversionError, check_contents

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
    own, or the one next to it in a diffusers pipeline. Raises ConversionError."""
    name = FOLDERS[role]
    candidates = [given] if given else _candidates(name, model) if model else []
    for folder in candidates:
        if (folder / MARKERS[name]).exists():
            for file in _files_in(folder, name):
                check_contents(file)
            return folder
    raise ConversionError(
        f"no {MARKERS[name]} in {' or '.join(map(str, candidates))}; give the folder of the"
        f" {name.replace('_', ' ')} as --{name.replace('_', '-')}"
    )


def _candidates(name: str, model: Path) -> list[Path]:
    own = model if model.is_dir() else model.parent
    return [own, own.parent / ("feature_extractor" if name == "image_processor" else name)]


def copy(name: str, source: epath.PathLike, bundle: epath.Path) -> None:
    """Copy the files of `name` ("tokenizer", ...) into the bundle."""
    source, target = epath.Path(source), bundle / name
    target.mkdir(parents=True, exist_ok=True)
    for file in _files_in(source, name):
        file.copy(target / file.name, overwrite=True)


def _files_in(folder: AnyPath, name: str) -> list[AnyPath]:
    """Return the files of `name` that a folder has."""
    files = (MARKERS[name],) if name == "image_processor" else TOKENIZER_FILES
    return [folder / file for file in files if (folder / file).exists()]
