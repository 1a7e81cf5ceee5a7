"""Choose the table of a checkpoint by its tensor names, never by file names."""

from collections.abc import Callable, Collection

from framepack_jax import packing
from framepack_jax.conversion import encoders, transformer, vae, wan_transformer, wan_vae
from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.weight_files import Checkpoint, ConversionError

TABLES: dict[str, tuple[Table, ...]] = {
    # The detect_key of one may stand in those before it too.
    "transformer": (
        transformer.DIFFUSERS,
        transformer.COMFYUI_WEIGHT,
        transformer.COMFYUI,
        transformer.TENCENT_FRAMEPACK,
        transformer.TENCENT,
        wan_transformer.DIFFUSERS,
        wan_transformer.ORIGINAL,
    ),
    "vae": (vae.TABLE, vae.COMFYUI, wan_vae.DIFFUSERS, wan_vae.ORIGINAL),
    "text_encoder": (encoders.UMT5, encoders.UMT5_WAN, encoders.LLAMA),
    "text_encoder_2": (encoders.CLIP,),
    "image_encoder": (encoders.SIGLIP,),
}

# Kind of transformer -> a function that makes a packed network of a base model.
FROM_BASE: dict[str, Callable[[Table, tuple[str, ...], int | None], Table]] = {
    transformer.KIND: transformer.from_base,
    wan_transformer.KIND: wan_transformer.from_base,
}
# Kind of transformer -> schedule of the released packed model.
PACKED_SCHEDULES = {
    transformer.KIND: packing.RELEASED_INVERTED,
    wan_transformer.KIND: packing.RELEASED_F1,
}


def recognise(checkpoint: Checkpoint, role: str, prefix: str | None = None) -> Source:
    """Return the network of a checkpoint that has a role, with the table of its naming.

    `prefix` chooses one of several, such as plain and averaged weights. Raises ConversionError if
    there is none, or several and no choice.
    """
    found = networks(checkpoint)
    sources = found.get(role, [])
    if len(sources) == 1:
        return sources[0]
    for source in sources:
        if source.prefix == prefix:
            return source
    if sources:
        flags = " or ".join(f"--prefix {source.prefix or repr('')}" for source in sources)
        raise ConversionError(
            f"{checkpoint.path} holds several sets of weights of the {role.replace('_', ' ')}, for"
            f" instance plain and averaged ones (EMA); choose one with {flags}"
        )
    others = [
        f"it looks like a {source.table.description}: give it as --{other.replace('_', '-')}"
        for other, sources in found.items()
        for source in sources
    ]
    detect_keys = {table.description: table.detect_key for table in TABLES[role]}
    expected = " or ".join(f"{name} (of a {what})" for what, name in detect_keys.items())
    begins = ", ".join(checkpoint.names()[:3])
    raise ConversionError(
        f"{checkpoint.path} is no {role.replace('_', ' ')}: expected a tensor {expected}, behind"
        f" any prefix; {others[0] if others else f'it begins with {begins}'}"
    )


def check_prefix(prefix: str | None, sources: Collection[Source]) -> None:
    """Raise ConversionError if none of these networks has the prefix that was asked for."""
    if prefix is None or any(source.prefix == prefix for source in sources):
        return
    held = ", ".join(sorted({repr(source.prefix) for source in sources}))
    raise ConversionError(
        f"--prefix {prefix or repr('')}: no network has its tensors there; they are behind {held}"
    )


def networks(checkpoint: Checkpoint) -> dict[str, list[Source]]:
    """Return the networks that a checkpoint holds, by role, each with the table of its naming."""
    found: dict[str, list[tuple[Table, str]]] = {}
    for role, candidates in TABLES.items():
        for table in candidates:
            if prefixes := table.prefixes_in(checkpoint):
                found[role] = [(table, prefix) for prefix in prefixes]
                break
    places = tuple(prefix for pairs in found.values() for _, prefix in pairs)
    # A config.json is of one network, or of an encoder with what transformers wraps around it.
    has_config = len(found) == 1 or not found.keys() & {"transformer", "vae"}
    return {
        role: [
            Source(checkpoint, table, prefix, others=places, has_config=has_config)
            for table, prefix in pairs
        ]
        for role, pairs in found.items()
    }
