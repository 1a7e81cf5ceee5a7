"""Python, the packages that this one needs, and plug-ins of JAX that go together."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from framepack_jax.doctor.finding import Finding
from framepack_jax.utils.versions import version

NAME = "framepack-jax"
OLDEST_PYTHON = (3, 11)
MISSING = "not installed"
# Plug-ins that must have the version of jaxlib, and the extra that installs each.
PLUGINS = {
    "jax-cuda13-plugin": "cuda13", "jax-cuda13-pjrt": "cuda13",
    "jax-cuda12-plugin": "cuda12", "jax-cuda12-pjrt": "cuda12",
}  # fmt: skip
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def python() -> Iterator[Finding]:
    """Look at the interpreter."""
    there = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("Python", "problem", there, f"install Python {oldest} or newer")
    else:
        yield Finding("Python", "ok", there)


def packages() -> Iterator[Finding]:
    """Compare the installed packages with what this one requires."""
    wrong = list(unmet(NAME))
    yield from (Finding("packages", "problem", text, remedy()) for text in wrong)
    if not wrong:
        shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
        yield Finding("packages", "ok", f"{NAME} {version(NAME)}, {shown}")
    yield from plugins()


def plugins() -> Iterator[Finding]:
    """Compare the versions of JAX, jaxlib and the plug-ins for GPU and TPU."""
    library = version("jaxlib")
    for text in unmet("jax", "jaxlib"):
        yield Finding("jaxlib", "problem", text, f'pip install --upgrade "{NAME}"')
    for name, extra in PLUGINS.items():
        if (there := version(name)) in (MISSING, library):
            continue
        text = f"version {there} does not go with jaxlib {library}"
        yield Finding(name, "problem", text, f'pip install --upgrade "{NAME}[{extra}]"')
    both = [name for name in ("jax-cuda12-plugin", "jax-cuda13-plugin") if version(name) != MISSING]
    if len(both) > 1:
        text = "the plug-ins for CUDA 12 and 13 are both installed, and JAX takes one of them"
        yield Finding("CUDA", "warning", text, f"pip uninstall {both[0]} {both[0][:-6]}pjrt")
    if version("libtpu") != MISSING:
        for text in unmet("jax", "libtpu", "tpu"):
            yield Finding("libtpu", "problem", text, f'pip install --upgrade "{NAME}[tpu]"')


def unmet(package: str, only: str = "", extra: str = "") -> Iterator[str]:
    """Yield a text for each requirement of an installed package that is not met.

    Args:
        only: The one requirement to look at; default: all.
        extra: The extra whose requirements are looked at; default: none.
    """
    try:
        required = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        # A clone works without being installed.
        return
    for text in required:
        requirement = Requirement(text)
        marker = requirement.marker
        wanted = marker is None or marker.evaluate({"extra": extra})
        if not wanted or (only and requirement.name != only):
            continue
        there = version(requirement.name)
        if there == MISSING:
            yield f"{requirement.name} is not installed; {package} needs {requirement}"
        elif not requirement.specifier.contains(there, prereleases=True):
            yield f"{requirement.name} {there} is installed; {package} needs {requirement}"


def remedy() -> str:
    """Return the command that installs what is required."""
    return f'pip install --upgrade "{NAME}"'
