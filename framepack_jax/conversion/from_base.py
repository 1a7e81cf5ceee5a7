"""Start a packed network from the checkpoint of a base model, which embeds no context."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.transforms import Fresh, Inflate, Row, kernel
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.packed_video import PATCH
from framepack_jax.packing import kernel_shape


def packed_table(
    table: Table,
    packed: Mapping[str, Any],
    base: Mapping[str, Any],
    new: Mapping[str, Fresh] | None = None,
    what: str = "context embeddings",
) -> Table:
    """Return the table that makes a packed network of a base checkpoint in the naming of `table`.

    Context embeddings are the inflated patch embedding; all other weights are those of the
    checkpoint.

    Args:
        table: Naming of the checkpoint.
        packed: Config fields of the new network, `context_kernels` among them.
        base: The same fields of a base model.
        new: Leaves that no base model has.
        what: What a packed network has in words, for the error about one that is packed already.
    """
    fresh = dict(new or {})

    def config(source: Source) -> Any:
        # By the table of the base model: rows without tensors have no shapes to read.
        cfg = table.config(dataclasses.replace(source, table=table))
        if cfg != dataclasses.replace(cfg, **base):
            raise ConversionError(
                f"{source.checkpoint.path} has {what}: it is a packed model already; remove"
                " --from-base"
            )
        return dataclasses.replace(cfg, **packed)

    def rows(cfg: Any) -> list[Row]:
        known = table.rows(dataclasses.replace(cfg, **base))
        (patch,) = {row.sources[0] for row in known if row.targets == ("embed/patch/kernel",)}
        small = kernel_shape(PATCH)
        inflated = [
            row
            for k in cfg.context_kernels
            for row in kernel(
                f"embed/context_{k}",
                patch.removesuffix(".weight"),
                Inflate(small, kernel_shape(k)),
            )
        ]
        replaced = [row for row in known if row.targets[0] not in fresh]
        return [*replaced, *inflated, *(Row((path,), (), leaf) for path, leaf in fresh.items())]

    return dataclasses.replace(table, rows=rows, config=config)
