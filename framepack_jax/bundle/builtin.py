"""Bundles that come with the package."""

from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
# Manifests of the released sizes, without weights.
SIZE_ONLY = ("framepack_i2v", "framepack_f1", "helios_14b", "wan_14b", "wan_1.3b")
NAMES = ("tiny", "tiny_inverted", "random", *SIZE_ONLY)
BUILTIN_BUNDLES = {name: ASSETS / name for name in NAMES}


def resolve(name_or_path: str) -> str | Path:
    """Return the folder of a built-in bundle, or the path itself."""
    return BUILTIN_BUNDLES.get(name_or_path, name_or_path)
