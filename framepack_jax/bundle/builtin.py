"""Bundles by name: those that come with the package, and those that were pulled from the hub."""

from pathlib import Path

from framepack_jax.bundle.pulled import REPOSITORY, pulled_folder

ASSETS = Path(__file__).parent.parent / "assets"
# Manifests of the released sizes, without weights.
SIZE_ONLY = ("framepack_i2v", "framepack_f1", "helios_14b", "wan_14b", "wan_1.3b")
NAMES = ("tiny", "tiny_inverted", "random", *SIZE_ONLY)
BUILTIN_BUNDLES = {name: ASSETS / name for name in NAMES}


def resolve(name_or_path: str) -> str | Path:
    """Return the folder of a built-in bundle, of a pulled one by `owner/name`, or the path itself,
    which counts if it exists."""
    if name_or_path in BUILTIN_BUNDLES:
        return BUILTIN_BUNDLES[name_or_path]
    if REPOSITORY.fullmatch(name_or_path) and not Path(name_or_path).exists():
        pulled = pulled_folder(name_or_path)
        return pulled if pulled.exists() else name_or_path
    return name_or_path
