"""Find the module of the network that a name in a LoRA file stands for."""

import collections
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from framepack_jax.conversion.engine import Step
from framepack_jax.conversion.lora_fusion import kernel_steps, module_names
from framepack_jax.conversion.lora_names import Family, flat, known_part
from framepack_jax.conversion.weight_files import ConversionError


class Place(NamedTuple):
    """A module of the network: its naming, its dotted name, and its row of the table."""

    naming: str
    name: str
    step: Step


def places_of(family: Family, cfg: Any) -> dict[str, Place]:
    """Return all modules by their names, with underscores instead of dots."""
    places: dict[str, Place] = {}
    for naming, table in family.tables.items():
        for step in kernel_steps(table, cfg):
            for name in module_names(step):
                places.setdefault(flat(name), Place(naming, name, step))
    return places


def match_places(
    path: Path, modules: Collection[str], family: Family, places: Mapping[str, Place]
) -> dict[str, Place | None]:
    """Return the place of each module: its name without known prefixes or, if no module matches,
    without one prefix that is common to the file."""
    known = {module: known_part(module, places.__contains__) for module in modules}
    placed = {module: places[name] if name else None for module, name in known.items()}
    if any(placed.values()):
        return placed
    prefix = _common_prefix(path, modules, family, places)
    return {module: places.get(flat(module.removeprefix(prefix))) for module in modules}


def _common_prefix(
    path: Path, modules: Collection[str], family: Family, places: Mapping[str, Place]
) -> str:
    """Return the prefix with the largest number of matching modules, "" if none matches.

    More than half of the modules with the prefix must match, since a text encoder or another
    network may have a few names with the same endings. Raises ConversionError if two prefixes match
    equally often, such as those of plain and averaged weights.
    """
    before = (_before_place(module, places) for module in modules)
    placed = collections.Counter(prefix for prefix in before if prefix)
    found = [
        (count, prefix)
        for prefix, count in placed.most_common()
        if 2 * count > sum(module.startswith(prefix) for module in modules)
    ]
    if len(found) > 1 and found[0][0] == found[1][0]:
        raise ConversionError(
            f"{path}: {found[0][0]} modules of this network are behind {found[0][1]!r} and as many"
            f" behind {found[1][1]!r}; expected a single adapter of a transformer of"
            f" {family.models}, behind one prefix"
        )
    return found[0][1] if found else ""


def _before_place(module: str, places: Mapping[str, Place]) -> str | None:
    """Return the part of a module's name before its longest suffix that has a place; None if no
    suffix has a place."""
    # As in `PREFIX`, transformer_blocks are not cut.
    ends = (match.end() for match in re.finditer(r"\.|(?<!transformer)_", module))
    return next((module[:end] for end in ends if flat(module[end:]) in places), None)
