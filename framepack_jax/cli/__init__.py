"""Flags -> settings -> one call; files, progress bars and messages."""

import contextlib
import os
import sys
from pathlib import Path

# transformers reads tokenizers and configs here, and its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder from run to run, and say so where it cannot
    be written.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    import jax

    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        folder = root / "framepack-jax" / "compiled"
        if _can_write(folder):
            jax.config.update("jax_compilation_cache_dir", str(folder))
        else:
            print(
                f"compiled programs are not kept for the next run: {folder} cannot be written;"
                " JAX_COMPILATION_CACHE_DIR names another folder",
                file=sys.stderr,
            )


def _can_write(folder: Path) -> bool:
    """Make a folder; False where it cannot be, or there is no home folder to stand for ~."""
    with contextlib.suppress(OSError):
        if folder.is_absolute():
            folder.mkdir(parents=True, exist_ok=True)
            return os.access(folder, os.W_OK)
    return False
