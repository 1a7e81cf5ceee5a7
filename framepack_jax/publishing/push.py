"""Upload a bundle, a LoRA or an exported network with its model card."""

import dataclasses
import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors

from framepack_jax import bundle
from framepack_jax.publishing.artifact import Artifact, PublishError, recognise
from framepack_jax.publishing.card import card
from framepack_jax.publishing.facts import facts_of
from framepack_jax.publishing.hub_errors import explained

README = "README.md"
MESSAGE = "Upload by framepack push-to-hub"


def push(path: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload what a path holds to a repository of the hub, which is made if there is none.

    Networks that a bundle takes from another bundle are uploaded with it. Files of a network that
    are not part of it any more are removed from the repository. A README.md of the folder or of the
    repository stays; without one, a model card is written.

    Args:
        path: A bundle, a LoRA file or folder, or an exported network.
        repo_id: `owner/name` of the repository.
        private: Make a private repository.
        revision: The branch to upload to, which is made if there is none; default: main.

    Returns a line with the address. Raises PublishError, ConversionError or BundleError.
    """
    if not bundle.REPOSITORY.fullmatch(repo_id):
        raise PublishError(f"--repo {repo_id}: expected the name of a repository, OWNER/NAME")
    artifact = recognise(path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stage(artifact, folder)
        with explained(repo_id, "uploaded"):
            api = HfApi()
            _make_repository(api, repo_id, private, revision)
            if not (folder / README).exists() and not api.file_exists(
                repo_id, README, revision=revision
            ):
                (folder / README).write_text(card(artifact, facts_of(artifact), repo_id))
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=MESSAGE,
                delete_patterns=_replaced(artifact),
            )
    branch = f"/tree/{revision}" if revision else ""
    return f"{path}: {artifact.kind} at {constants.ENDPOINT}/{repo_id}{branch}"


def stage(artifact: Artifact, folder: Path) -> None:
    """Fill an empty folder with links to the files of an artifact, and in the place of a bundle's
    references to another bundle, with links to the files there."""
    if artifact.path.is_file():
        os.symlink(artifact.path.absolute(), folder / artifact.path.name)
        return
    _link(artifact.path, folder)
    if artifact.kind != "bundle":
        return
    manifest = bundle.read_manifest(artifact.path)
    roles = dict(manifest.roles)
    for name, role in manifest.roles.items():
        there = Path(bundle.referenced(artifact.path, role.path))
        if there.resolve() != (artifact.path / name).resolve():
            _link(there, folder / name)
            roles[name] = dataclasses.replace(role, path=name)
    if roles != manifest.roles:
        (folder / bundle.MANIFEST).unlink()
        bundle.write_manifest(folder, dataclasses.replace(manifest, roles=roles))


def _link(source: Path, target: Path) -> None:
    """Make the folders of `source` in `target`, with links to its files."""
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file.absolute(), place)


def _make_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    """Make the repository and its branch. Raises PublishError if a private one is asked for, and a
    public one is there."""
    try:
        found = api.model_info(repo_id)
    except hub_errors.RepositoryNotFoundError:
        found = None
    if found is None:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
    elif private and not found.private:
        raise PublishError(
            f"--private: {repo_id} is there already, and is public; make it private in its settings"
            f" ({constants.ENDPOINT}/{repo_id}/settings), or choose another --repo"
        )
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _replaced(artifact: Artifact) -> list[str]:
    """Return patterns of files that are removed unless they are uploaded again: the parameters of a
    network are in files whose names change."""
    if artifact.kind != "bundle":
        return []
    return [f"{name}/*" for name in bundle.read_manifest(artifact.path).roles]
