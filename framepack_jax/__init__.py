"""FramePack in JAX: long videos from an image and a prompt, on GPUs and TPUs.

from framepack_jax import FramePack
pipe = FramePack.load("weights/framepack_i2v_hy")
video = pipe(image, prompt, seconds=5, seed=0)
"""

from typing import Any

__all__ = ["FramePack"]


def __getattr__(name: str) -> Any:
    """Load the pipeline on first use: `import framepack_jax.packing` alone stays light."""
    if name == "FramePack":
        from framepack_jax.generation.pipeline import FramePack

        return FramePack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
