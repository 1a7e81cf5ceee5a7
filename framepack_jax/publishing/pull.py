"""Download a bundle, a LoRA or an exported network, verify it, and move it into place."""

import dataclasses
import fnmatch
import shutil
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import ModelInfo

from framepack_jax import bundle
from framepack_jax.conversion.engine import check_space
from framepack_jax.conversion.hub import Bar
from framepack_jax.conversion.safetensors_files import partial_name
from framepack_jax.publishing.artifact import (
    CONFIG,
    WEIGHTS,
    Artifact,
    PublishError,
    command,
    recognise,
)
from framepack_jax.publishing.hub_errors import explained
from framepack_jax.utils.messages import shorten


def pull(repo_id: str, output: Path | None = None, *, revision: str | None = None) -> str:
    """Download a repository of the hub, and verify the hashes that the hub and the files record.

    The folder appears when it is whole. An interrupted download is kept beside it and resumed.

    Args:
        repo_id: `owner/name` of the repository.
        output: The new folder; default: where `--bundle owner/name` is looked for.
        revision: A branch, tag or commit; default: main.

    Returns two lines: the folder, and a command that uses it. Raises PublishError, ConversionError
    or BundleError.
    """
    if not bundle.REPOSITORY.fullmatch(repo_id):
        raise PublishError(f"{repo_id}: expected the name of a repository, OWNER/NAME")
    target = output or bundle.pulled_folder(repo_id)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PublishError(
            f"{target} exists already; remove it to download {repo_id} again, or choose another"
            " --output"
        )
    with explained(repo_id, "downloaded"):
        api = HfApi()
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        _check_names(repo_id, sizes)
        check_space(target, sum(sizes.values()))
        partial = _download(api, repo_id, info, target)
    artifact = check(repo_id, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    partial.replace(target)
    found = dataclasses.replace(artifact, path=target)
    place = repo_id if output is None and artifact.kind == "bundle" else str(target)
    return f"{target}: {artifact.kind} of {repo_id}, commit {info.sha}\n{command(found, place)}"


def check(repo_id: str, folder: Path) -> Artifact:
    """Return what a downloaded folder holds. Raises PublishError if it holds nothing of use, refers
    to a place outside of itself, or has other parameters than it records."""
    if (folder / bundle.MANIFEST).exists():
        manifest = bundle.read_manifest(folder)
        for name, role in manifest.roles.items():
            there = Path(bundle.referenced(folder, role.path))
            if not there.resolve().is_relative_to(folder.resolve()):
                raise PublishError(
                    f"{repo_id}: its {name} is at {role.path}, outside of the bundle; ask its owner"
                    " to upload it with framepack push-to-hub"
                )
            if there.exists() and not bundle.is_as_recorded(folder, manifest, name):
                raise PublishError(
                    f"{repo_id}: the parameters of {name} are not those that {bundle.MANIFEST}"
                    " records; tell its owner"
                )
    return recognise(folder)


def _check_names(repo_id: str, names: dict[str, int]) -> None:
    """Raise PublishError for a repository whose list of files shows that it is of no use here."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise PublishError(f"{repo_id} lists {name!r}, a place outside of it; tell its owner")
    at_top = [name for name in names if "/" not in name]
    if bundle.MANIFEST not in at_top and not fnmatch.filter(at_top, WEIGHTS):
        raise PublishError(
            f"{repo_id} holds no bundle ({bundle.MANIFEST}), no LoRA and no exported network"
            f" ({WEIGHTS}, {CONFIG}); it has {shorten(sorted(names)) or 'no files'}; checkpoints of"
            " PyTorch are read by framepack convert"
        )


def _download(api: HfApi, repo_id: str, info: ModelInfo, target: Path) -> Path:
    """Download a commit beside `target`; return the folder. Raises PublishError if a file is not as
    the hub records it: the next download fetches it again."""
    partial = partial_name(target)
    partial.mkdir(parents=True, exist_ok=True)
    snapshot_download(repo_id, revision=info.sha, local_dir=partial, tqdm_class=Bar)
    found = api.verify_repo_checksums(repo_id, revision=info.sha, local_dir=partial)
    for name in found.extra_paths:  # of an earlier commit
        (partial / name).unlink()
    damaged = [mismatch["path"] for mismatch in found.mismatches]
    for name in damaged:
        (partial / name).unlink()
    if wrong := [*damaged, *found.missing_paths]:
        raise PublishError(
            f"{repo_id}: {shorten(wrong)} did not arrive as the hub records it; run the same"
            " command again, which downloads only that"
        )
    return partial
