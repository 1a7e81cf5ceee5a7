"""Flags -> settings -> one call; files, progress bars and messages."""

import os
from pathlib import Path

# transformers reads tokenizers and configs here, and its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def keep_compiled() -> None:
    """Keep compiled programs in the user's cache folder from run to run.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    import jax

    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "framepack-jax" / "compiled"))
