"""Download checkpoints from the Hugging Face hub, through huggingface_hub and its cache.

Cached files are not downloaded again, a broken download resumes, and an interrupted run keeps its
complete files. The environment variables of huggingface_hub apply: HF_HOME (location of the cache),
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import tqdm

from framepack_jax import packing
from framepack_jax.bundle import REPOSITORY
from framepack_jax.conversion import tokenizers
from framepack_jax.conversion.file_formats import (
    GGUF,
    GGUF_SUFFIX,
    SAFETENSORS_SUFFIXES,
    TORCH_SUFFIXES,
    ConversionError,
)
from framepack_jax.utils.progress import Plain

HUNYUAN, REDUX = "hunyuanvideo-community/HunyuanVideo", "lllyasviel/flux_redux_bfl"
SHARED = {
    "vae": (HUNYUAN, "vae"),
    "text_encoder": (HUNYUAN, "text_encoder"),
    "text_encoder_2": (HUNYUAN, "text_encoder_2"),
    "image_encoder": (REDUX, "image_encoder"),
    "tokenizer": (HUNYUAN, "tokenizer"),
    "tokenizer_2": (HUNYUAN, "tokenizer_2"),
    "image_processor": (REDUX, "feature_extractor"),
}
UMT5_TOKENIZER = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "tokenizer")
# Repository and folder of each part of the released models (`demo_gradio.py` and
# `demo_gradio_f1.py` of the release). The models differ only in the transformer.
FRAMEPACK: dict[str, dict[str, tuple[str, str | None]]] = {
    "i2v": {"transformer": ("lllyasviel/FramePackI2V_HY", None), **SHARED},
    "f1": {"transformer": ("lllyasviel/FramePack_F1_I2V_HY_20250503", None), **SHARED},
}
HELIOS = {
    "base": "BestWishYsh/Helios-Base",
    "mid": "BestWishYsh/Helios-Mid",
    "distilled": "BestWishYsh/Helios-Distilled",
}
SCHEDULES = {"i2v": packing.RELEASED_INVERTED, "f1": packing.RELEASED_F1}

WEIGHT_SUFFIXES = (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES)
INDEX, TORCH_INDEX = ".safetensors.index.json", ".bin.index.json"
SMALL_FILES = {
    "config.json", "scheduler_config.json",
    *tokenizers.TOKENIZER_FILES, *tokenizers.MARKERS.values(),
}  # fmt: skip
MODEL_INDEX = "model_index.json"
# Folders of a diffusers pipeline that a bundle can hold.
PIPELINE_FOLDERS = {
    "transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder", "tokenizer",
    "tokenizer_2", "feature_extractor", "scheduler",
}  # fmt: skip
REFUSED = (401, 403)


def split(text: str) -> tuple[str, str | None] | None:
    """Split `owner/name` or `owner/name/folder` of the hub into the repository and the folder or
    file in it (None for the whole repository).

    Return None for a local path: it exists, its first folder exists, or it is not the name of a
    repository.
    """
    parts = text.rstrip("/").split("/")
    if len(parts) < 2 or Path(text).exists() or Path(parts[0]).exists():
        return None
    repository = "/".join(parts[:2])
    if not REPOSITORY.fullmatch(repository) or parts[1].endswith(WEIGHT_SUFFIXES):
        return None
    return repository, "/".join(parts[2:]) or None


def fetch(
    repo_id: str,
    subfolder: str | None = None,
    *,
    token: str | None = None,
    progress: bool = True,
    pipeline: bool | None = False,
) -> Path:
    """Download a network, tokenizer, image processor or diffusers pipeline; return its folder in
    the hub's cache.

    Only files that a conversion reads are downloaded: configs, tokenizer files, and weights in
    safetensors, or in PyTorch's format if there are no safetensors.

    Args:
        repo_id: `owner/name` of the repository.
        subfolder: Folder in the repository, or path of a single weight file, which is returned.
        token: Access token; default: that of HF_TOKEN or `hf auth login`.
        progress: Show a progress bar.
        pipeline: Download all folders of a pipeline; None: if there is a model_index.json.

    Raises ConversionError, which says what to do, if the repository is unknown or gated, if the hub
    cannot be reached and the cache has nothing, if files are missing, or if the disk is too small.
    """
    try:
        listed = _listed(repo_id, subfolder, pipeline, token)
    except _Unreachable as error:
        if cached := _cached(repo_id, subfolder):
            return cached
        raise _explained(repo_id, error.__cause__ or error) from error
    _check_space(repo_id, listed.missing)
    chosen = listed.chosen
    try:
        snapshot = snapshot_download(
            repo_id,
            token=token,
            allow_patterns=[_literal(name) for name in chosen],
            # An interrupted run then loses at most one file. The library may use several
            # connections for one file.
            max_workers=1,
            tqdm_class=Bar if progress else _NoBar,
        )
    except (hub_errors.HTTPError, hub_errors.EntryNotFoundError, OSError) as error:
        raise _explained(repo_id, error) from error
    return Path(snapshot, subfolder or "")


class _Unreachable(Exception):
    """The hub cannot be reached; the cause is attached."""


class _Listed(NamedTuple):
    """Sizes of the files that a conversion reads, and the number of bytes missing in the cache."""

    chosen: dict[str, int]
    missing: int


def _listed(
    repo_id: str, subfolder: str | None, pipeline: bool | None, token: str | None
) -> _Listed:
    """List the files that a conversion reads. Raises _Unreachable, ConversionError."""
    try:
        info = HfApi(token=token).model_info(repo_id, files_metadata=True)
    except hub_errors.HFValidationError as error:
        raise ConversionError(f"{repo_id!r} is no repository; expected owner/name") from error
    except (hub_errors.HTTPError, OSError) as error:
        raise _Unreachable from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if pipeline is None:
        pipeline = str(PurePosixPath(subfolder or "", MODEL_INDEX)) in sizes
    chosen = {name: sizes[name] for name in _chosen(sizes, subfolder, pipeline)}
    there = chosen or [name for name in sizes if name.startswith(subfolder or "")]
    if quantized := next((name for name in there if name.endswith(GGUF_SUFFIX)), None):
        raise ConversionError(f"{repo_id}/{quantized} {GGUF}")
    if not chosen:
        raise ConversionError(
            f"{repo_id} has no weights{f' in {subfolder}' if subfolder else ''}; it has"
            f" {', '.join(sorted(_folders(sizes)))}"
        )
    absent = (
        size
        for name, size in chosen.items()
        if not isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)
    )
    return _Listed(chosen, sum(absent))


def check_space(
    parts: Mapping[str, tuple[str, str | None]], output: Path | None, ratio: float = 1.0
) -> None:
    """Raise ConversionError before the first download if the disk is too small for all of them.

    The check does nothing if the hub cannot be reached: `fetch` then uses the cache, or raises.

    Args:
        parts: Repository and folder of each part of a bundle, by name.
        output: Folder of the bundle, which counts if it is on the disk of the cache.
        ratio: Bytes of the bundle divided by bytes of the downloaded weights.
    """
    missing = weights = 0
    try:
        for name, (repo_id, subfolder) in parts.items():
            listed = _listed(repo_id, subfolder, name == "pipeline", None)
            missing += listed.missing
            weights += sum(n for file, n in listed.chosen.items() if file.endswith(WEIGHT_SUFFIXES))
    except (_Unreachable, ConversionError):
        return
    cache, free = _cache_disk()
    bundle = int(weights * ratio)
    if output is not None:
        place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
        if place.stat().st_dev == cache.stat().st_dev and missing + bundle > free:
            raise ConversionError(
                f"{missing / 1e9:,.1f} GB to fetch into {constants.HF_HUB_CACHE} and a bundle of"
                f" {bundle / 1e9:,.1f} GB need {(missing + bundle) / 1e9:,.1f} GB, and"
                f" {free / 1e9:,.1f} GB are free there; free some, set HF_HOME to a folder on"
                " another disk, or write the bundle to one"
            )
    _check_space(f"the set of {len(parts)} parts", missing)


def _cache_disk() -> tuple[Path, int]:
    """Return a folder on the disk of the cache, and the number of free bytes there."""
    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return place, shutil.disk_usage(place).free


def _chosen(names: Iterable[str], subfolder: str | None, pipeline: bool) -> list[str]:
    """Return the names of the files that a conversion reads."""
    names = sorted(names)
    if subfolder in names:
        return [subfolder]
    folders = {subfolder.rstrip("/") if subfolder else "."}
    if pipeline:
        folders = {str(PurePosixPath(subfolder or "", name)) for name in PIPELINE_FOLDERS}
    chosen = []
    for folder in sorted(folders):
        held = [name for name in names if str(PurePosixPath(name).parent) == folder]
        weights = [n for n in held if n.endswith((*SAFETENSORS_SUFFIXES, INDEX))]
        weights = weights or [n for n in held if n.endswith((*TORCH_SUFFIXES, TORCH_INDEX))]
        chosen += weights + [n for n in held if PurePosixPath(n).name in SMALL_FILES]
    if pipeline:
        index = str(PurePosixPath(subfolder or "", MODEL_INDEX))
        chosen += [index] if index in names else []
    return chosen


def _folders(names: Iterable[str]) -> set[str]:
    return {str(PurePosixPath(name).parent) for name in names}


def _literal(name: str) -> str:
    """Return a pattern that matches this name only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _cached(repo_id: str, subfolder: str | None) -> Path | None:
    """Return the cached folder or file without asking the hub; it may be incomplete."""
    try:
        # Without patterns only the location of the snapshot is looked up.
        snapshot = snapshot_download(repo_id, local_files_only=True, allow_patterns=[])
    except (hub_errors.EntryNotFoundError, OSError):
        return None
    path = Path(snapshot, subfolder or "")
    return path if path.is_file() or (path.is_dir() and any(path.iterdir())) else None


def _check_space(what: str, needed: int) -> None:
    _, free = _cache_disk()
    if free < needed:
        raise ConversionError(
            f"{what} needs {needed / 1e9:,.1f} GB more in {constants.HF_HUB_CACHE}, where"
            f" {free / 1e9:,.1f} GB are free; free some, or set HF_HOME to a folder on another disk"
        )


def _explained(repo_id: str, error: BaseException) -> ConversionError:
    """Translate an error of the hub's client into a message that says what to do."""
    # The client wraps errors of the server in an error of its cache.
    while isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{repo_id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.GatedRepoError):
        return ConversionError(
            f"{repo_id} is gated: accept its licence at {page}, then set HF_TOKEN to a token of"
            " that account"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status in REFUSED:
        return ConversionError(
            f"there is no folder {repo_id} here, and no repository that you may read at {page};"
            " check the name, or set HF_TOKEN if it is private or gated"
        )
    if isinstance(error, hub_errors.RemoteEntryNotFoundError) and status:
        name = str(error.response.request.url).partition("/resolve/")[2].partition("/")[2]
        return ConversionError(
            f"{repo_id} lists {name}, but the hub does not have it; try again later, or tell its"
            " owner"
        )
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return ConversionError(
            f"{repo_id} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set;"
            " unset it, or run once with a network connection"
        )
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return ConversionError(
        f"{repo_id} could not be fetched from {constants.ENDPOINT} ({first_line}); run again, and"
        " what has been fetched is kept"
    )


class Bar(Plain, tqdm):
    """The hub's progress bar, written as lines of a log."""


class _NoBar(tqdm):
    """The hub's progress bar, disabled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
