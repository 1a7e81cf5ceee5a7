"""Identify the code that runs: versions of packages, the commit, a hash of the sources."""

import contextlib
import functools
import hashlib
import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def version(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def code_version(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the installed ones of some packages, and the commit if this package is
    a clone."""
    # A clone works without being installed.
    versions = {name: version(name) for name in packages if version(name) != "not installed"}
    root = PACKAGE.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            versions["commit"] = found.stdout.strip()
    return versions


@functools.cache
def code_hash() -> str:
    """Return a hash of the Python files of this package."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
