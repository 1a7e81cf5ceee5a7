"""The encoders of a bundle, loaded: what `conditioning` reads prompts and images with."""

import functools
from typing import Any

from etils import epath
from jax.sharding import Mesh

from framepack_jax import bundle, conditioning
from framepack_jax.conditioning import Encoders

ROLES = ("text_encoder", "text_encoder_2", "image_encoder")


def load_encoders(
    path: epath.PathLike,
    manifest: bundle.Manifest,
    dtype: Any,
    mesh: Mesh | None = None,
    streamed: bool = False,
) -> Encoders:
    """Tokenizers, image processor, and the networks with parameters of `dtype`, divided over a
    mesh if there is one; `streamed`, the layers of large ones are read from the disk as they are
    needed. Raises BundleError, ValueError."""
    root = epath.Path(path)
    load = bundle.load_params
    if streamed:
        load = functools.partial(bundle.load_streamed, hosted=0)
    networks = {
        name: (
            bundle.role_config(manifest, name)[1],
            load(root, manifest, name, dtype=dtype, mesh=mesh),
        )
        for name in ROLES
    }
    return Encoders(
        tokenizer=conditioning.load_tokenizer(root / "tokenizer"),
        tokenizer_2=conditioning.load_tokenizer(root / "tokenizer_2"),
        image_processor=conditioning.load_image_processor(root / "image_processor"),
        template=manifest.prompt_template,
        **networks,
    )
