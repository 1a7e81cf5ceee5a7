"""Check that a bundle is whole."""

from collections.abc import Iterator

from framepack_jax import bundle
from framepack_jax.doctor.finding import Finding
from framepack_jax.utils.messages import bytes_text, first_line

LARGE = 1e9
"""Bytes of a bundle with which no small video is made."""
AGAIN = "convert it again, or copy it again from where it came from"


def whole(name: str) -> Iterator[Finding]:
    """Read every parameter of a bundle and compare the hashes with those of its manifest."""
    subject = f"bundle {name}"
    try:
        path = bundle.resolve(name)
        manifest = bundle.read_manifest(path)
    except (bundle.BundleError, OSError, ValueError) as error:
        yield Finding(subject, "problem", first_line(error), AGAIN)
        return
    whole, size = True, 0
    for role in manifest.roles:
        try:
            size += bundle.stored_bytes(path, manifest, role)
            same = bundle.is_as_recorded(path, manifest, role)
        except (bundle.BundleError, OSError, ValueError) as error:
            whole = False
            yield Finding(subject, "problem", f"{role}: {first_line(error)}", AGAIN)
            continue
        if not same:
            whole = False
            text = f"the parameters of {role} are not those that were written"
            yield Finding(subject, "problem", text, AGAIN)
    if whole:
        text = f"{', '.join(manifest.roles)}; {bytes_text(size)}"
        yield Finding(subject, "ok", text)


def is_large(name: str) -> bool:
    """Return whether a bundle is too large to load for a check, or cannot be read."""
    try:
        path = bundle.resolve(name)
        manifest = bundle.read_manifest(path)
        return sum(bundle.stored_bytes(path, manifest, role) for role in manifest.roles) > LARGE
    except (bundle.BundleError, OSError, ValueError):
        return True
