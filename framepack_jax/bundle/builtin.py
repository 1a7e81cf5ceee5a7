"""Bundles that come with the package."""

from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
# `framepack_i2v` and `framepack_f1` have manifests of the released sizes and no weights.
NAMES = ("tiny", "tiny_inverted", "random", "framepack_i2v", "framepack_f1")
BUILTIN_BUNDLES = {name: ASSETS / name for name in NAMES}


def resolve(name_or_path: str) -> str | Path:
    """Return the folder of a built-in bundle, or the path itself."""
    return BUILTIN_BUNDLES.get(name_or_path, name_or_path)
