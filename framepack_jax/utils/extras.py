"""Check for packages that only an extra of framepack-jax installs."""

import importlib

EVAL = {"cv2": "OpenCV", "matplotlib": "Matplotlib"}
SERVE = {"fastapi": "FastAPI", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
WEB = {"gradio": "Gradio"}


class MissingExtra(ValueError):
    """A package of an extra is not installed."""


def require(extra: str, packages: dict[str, str], what: str) -> None:
    """Raise MissingExtra if a package cannot be imported.

    Args:
        extra: the extra of framepack-jax that installs the packages.
        packages: names of modules and of the packages that hold them.
        what: what needs the packages, the subject of the message.
    """
    missing = []
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{package} ({error})")
    if missing:
        raise MissingExtra(
            f'{what} needs {" and ".join(missing)}: pip install "framepack-jax[{extra}]"'
        )
