"""FramePack in JAX: long videos from an image and a prompt, on GPUs and TPUs.

from framepack_jax import FramePack, load_image
pipe = FramePack.load("weights/framepack_i2v_hy")
video = pipe(load_image("photo.jpg"), "The girl dances gracefully", seconds=5, seed=0)

The names below are the public API; everything else may change. They are imported on first use, so
that `import framepack_jax` is quick.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framepack_jax.conversion.lora import read as load_lora
    from framepack_jax.generation.pipeline import FramePack, Settings
    from framepack_jax.generation.request import Request, SourceVideo, read_source
    from framepack_jax.video import load_image, read_frames

    __version__: str

__all__ = [
    "FramePack",
    "Request",
    "Settings",
    "SourceVideo",
    "__version__",
    "load_image",
    "load_lora",
    "read_frames",
    "read_source",
]
# The module and the name of each export.
EXPORTS = {
    "FramePack": ("generation.pipeline", "FramePack"),
    "Request": ("generation.request", "Request"),
    "Settings": ("generation.pipeline", "Settings"),
    "SourceVideo": ("generation.request", "SourceVideo"),
    "load_image": ("video", "load_image"),
    "load_lora": ("conversion.lora", "read"),
    "read_frames": ("video", "read_frames"),
    "read_source": ("generation.request", "read_source"),
}


def __getattr__(name: str) -> Any:
    """Import an export on first use."""
    if name == "__version__":
        return _version()
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = EXPORTS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    try:
        return importlib.metadata.version("framepack-jax")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
