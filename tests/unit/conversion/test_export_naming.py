"""Which names exported files have."""

import pytest

from framepack_jax import bundle
from framepack_jax.conversion.export import default_naming

ORIGINAL, DIFFUSERS = "original", "diffusers"


@pytest.mark.parametrize(
    ("name", "transformer", "vae", "text_encoder"),
    [
        ("framepack_f1", DIFFUSERS, ORIGINAL, DIFFUSERS),
        ("helios_14b", DIFFUSERS, ORIGINAL, DIFFUSERS),
        ("wan_14b", ORIGINAL, ORIGINAL, DIFFUSERS),
    ],
)
def test_original_names_where_the_network_has_some(name, transformer, vae, text_encoder) -> None:
    """Packed context has names in diffusers only; text encoders have those of transformers."""
    manifest = bundle.read_manifest(bundle.resolve(name))
    found = [default_naming(manifest, role) for role in ("transformer", "vae", "text_encoder")]
    assert found == [transformer, vae, text_encoder]
