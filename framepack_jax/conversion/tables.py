"""Which table reads a checkpoint: told by its tensor names, never by file names."""

from framepack_jax.conversion import encoders, transformer, vae
from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.readers import Checkpoint, ConversionError

TABLES: dict[str, tuple[Table, ...]] = {
    # The landmark of one may stand in those before it too.
    "transformer": (
        transformer.DIFFUSERS,
        transformer.COMFYUI_WEIGHT,
        transformer.COMFYUI,
        transformer.TENCENT_FRAMEPACK,
        transformer.TENCENT,
    ),
    "vae": (vae.TABLE,),
    "text_encoder": (encoders.LLAMA,),
    "text_encoder_2": (encoders.CLIP,),
    "image_encoder": (encoders.SIGLIP,),
}


def recognise(checkpoint: Checkpoint, role: str) -> Source:
    """The checkpoint with the table of its naming. Raises ConversionError where it is no `role`."""
    for table in TABLES[role]:
        if (prefix := table.prefix_in(checkpoint)) is not None:
            return Source(checkpoint, table, prefix)
    others = [
        f"it looks like a {table.what}: give it as --{other.replace('_', '-')}"
        for other, tables in TABLES.items()
        for table in tables
        if table.prefix_in(checkpoint) is not None
    ]
    landmarks = {table.what: table.landmark for table in TABLES[role]}
    expected = " or ".join(f"{name} (of a {what})" for what, name in landmarks.items())
    begins = ", ".join(checkpoint.names()[:3])
    raise ConversionError(
        f"{checkpoint.path} is no {role.replace('_', ' ')}: expected a tensor {expected};"
        f" {others[0] if others else f'it begins with {begins}'}"
    )
