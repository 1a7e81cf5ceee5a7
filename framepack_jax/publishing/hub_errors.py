"""One line that says what to do for an error of the hub's client."""

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from framepack_jax.bundle import BundleError
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.publishing.artifact import PublishError
from framepack_jax.utils.messages import first_line

# Also those of its threads (RuntimeError) and of answers that it cannot read (ValueError).
ERRORS = (hub_errors.HTTPError, OSError, RuntimeError, ValueError)


@contextlib.contextmanager
def explained(repo_id: str, action: str) -> Iterator[None]:
    """Raise PublishError for errors of the hub's client. `action` is "uploaded" or "downloaded"."""
    try:
        yield
    except (PublishError, ConversionError, BundleError):
        raise
    except ERRORS as error:
        raise PublishError(_explain(repo_id, action, error)) from error


def _explain(repo_id: str, action: str, error: BaseException) -> str:
    # The client wraps errors of the server, of its cache and of its threads.
    while error.__cause__ and isinstance(error, (hub_errors.LocalEntryNotFoundError, RuntimeError)):
        error = error.__cause__
    hub, need = constants.ENDPOINT, "write to" if action == "uploaded" else "read"
    token = f"set HF_TOKEN to a token of {hub}/settings/tokens that may {need} it"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{repo_id} has no such revision on {hub}; check --revision"
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{repo_id} is gated: accept its licence at {hub}/{repo_id}, then {token}"
    if isinstance(error, hub_errors.RepositoryNotFoundError) and action == "downloaded":
        return (
            f"there is no repository {repo_id} on {hub} that you may read; check the name, or if it"
            f" is private, {token}"
        )
    if isinstance(error, hub_errors.LocalTokenNotFoundError) or status in (401, 403):
        return f"{hub} refuses the token for {repo_id} (error {status or 'no token'}); {token}"
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return f"{repo_id} cannot be {action} while HF_HUB_OFFLINE is set; unset it"
    return (
        f"{repo_id} could not be {action} ({first_line(error)}); run the same command again: files"
        f" that were {action} are kept"
    )
