"""Describe a bundle, diffusers pipeline, checkpoint or LoRA file.

Keys decide, never file names; no weights are read.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax import bundle
from framepack_jax.conversion import engine, lora, lora_names, tables
from framepack_jax.conversion.engine import Source
from framepack_jax.conversion.request import SHORT_DTYPES
from framepack_jax.conversion.weight_files import (
    Checkpoint,
    ConversionError,
    open_checkpoint,
    read_json,
)
from framepack_jax.models import registry

MODEL_INDEX = "model_index.json"


def describe(path: Path) -> str:
    """Return lines of a name and a value: format, model, dtypes and parameter counts; rank, alpha
    and naming of a LoRA; schedule and networks of a bundle.

    Raises ConversionError or BundleError if `path` cannot be read.
    """
    path = Path(path)
    if (path / bundle.UNFINISHED).exists():
        return _lines(path, _unfinished(path))
    if (path / bundle.MANIFEST).exists():
        return _lines(path, _bundle(path))
    if (path / MODEL_INDEX).exists():
        return _lines(path, _pipeline(path))
    checkpoint = open_checkpoint(path)
    if lora.is_lora(checkpoint):
        return _lines(path, _lora(checkpoint))
    return _lines(path, _network(checkpoint))


def _lines(path: Path, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(path), *(f"  {name:{width}}  {value}" for name, value in rows)])


def _bundle(path: Path) -> list[tuple[str, str]]:
    manifest = bundle.read_manifest(path)
    rows = [
        ("format", "bundle"),
        ("schedule", f"{manifest.schedule}, order {manifest.schedule.order}"),
    ]
    for name, role in manifest.roles.items():
        _, cfg = bundle.role_config(manifest, name)
        count = _millions(registry.parameter_count(role.kind, cfg))
        stored = _stored_dtypes((path / role.path).resolve())
        where = "" if role.path == name else f", stays in {role.path}"
        origin = role.source.get("naming", "")
        rows.append((name, f"{role.kind}, {count}, {stored}{where}{origin and f'; a {origin}'}"))
    return rows


def _unfinished(path: Path) -> list[tuple[str, str]]:
    whole = [role for role in bundle.ROLES if (path / role).exists()]
    return [
        ("format", "bundle, unfinished: its conversion was stopped; run the same command again"),
        ("written", ", ".join(whole) or "no network"),
    ]


def _stored_dtypes(path: Path) -> str:
    """Return the stored dtypes of a role, most parameters first."""
    if not path.exists():
        return "parameters missing"
    leaves = jax.tree.leaves(ocp.metadata(path).metadata)
    sizes: Counter[str] = Counter()
    for leaf in leaves:
        sizes[str(leaf.dtype)] += math.prod(leaf.shape)
    return " and ".join(_short(name) for name, _ in sizes.most_common())


def _pipeline(path: Path) -> list[tuple[str, str]]:
    held = read_json(path / MODEL_INDEX)
    rows = [("format", f"diffusers pipeline {held.get('_class_name', '')}".rstrip())]
    for role in bundle.ROLES:
        if not any(held.get(role) or ()):
            continue
        try:
            checkpoint = open_checkpoint(path / role)
            what = tables.recognise(checkpoint, role).table.description
            rows.append((role, f"{what}, {_parameters(checkpoint)}"))
        except ConversionError as error:
            rows.append((role, f"cannot be read: {error}"))
    return rows


def _network(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    rows = [("format", checkpoint.format), ("parameters", _parameters(checkpoint))]
    found = tables.networks(checkpoint)
    if not found:
        begins = ", ".join(checkpoint.names()[:3])
        return [*rows[:1], ("model", f"unknown; its tensors begin with {begins}"), *rows[1:]]
    described = [
        [("model", source.table.description), *_fit(role, source, choice=len(sources) > 1)]
        for role, sources in found.items()
        for source in sources
    ]
    if len(described) == 1:
        ((model, *fit),) = described
        return [rows[0], model, rows[1], *fit]
    rows += [row for network in described for row in network]
    if len(found) > 1:
        rows.append(("together", f"convert with --pipeline {checkpoint.path}"))
    return rows


def _fit(role: str, source: Source, *, choice: bool) -> list[tuple[str, str]]:
    """Return the prefix of a network in its checkpoint, its sizes, and whether it can be converted;
    with `choice` there are others for its role."""
    rows = [("prefix", source.prefix)] if source.prefix else []
    flags = f"--{role.replace('_', '-')} {source.checkpoint.path}"
    if choice:
        flags += f" --prefix {source.prefix or repr('')}"
    try:
        rows += _sizes(engine.make_job(source).cfg)
        rows.append(("fits", f"all; convert with {flags}"))
    except ConversionError as error:
        rows.append(("fits", f"not as it is: {error}"))
    return rows


def _sizes(cfg: Any) -> list[tuple[str, str]]:
    """Return the sizes that distinguish networks of one kind."""
    fields = {
        name: value
        for name in ("layers", "double_layers", "single_layers", "width", "heads", "channels")
        if (value := getattr(cfg, name, None)) is not None
    }
    rows = [("sizes", ", ".join(f"{name} {value}" for name, value in fields.items()))]
    if (kernels := getattr(cfg, "context_kernels", None)) is not None:
        said = f"packed, embeds {', '.join(kernels)}" if kernels else "none: a base model"
        rows.append(("context", said))
    return rows


def _lora(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    ranks: Counter[int] = Counter()
    alphas = set()
    styles = set()
    for name in checkpoint.names():
        match, shape = lora.TENSOR.fullmatch(name), checkpoint.shape(name)
        if match and match["alpha"] and math.prod(shape) == 1:
            alphas.add(float(checkpoint.read(name).reshape(())))
        elif match and lora.SIDES.get(match["side"], match["side"]) == "down" and shape:
            ranks[shape[0]] += 1
            styles.add("kohya's" if match["side"] == "down" else "PEFT's")
    spelt = " and ".join(sorted(styles)) or "unknown"
    rows = [
        ("format", f"{checkpoint.format}; LoRA in {spelt} keys"),
        ("model", _naming(checkpoint)),
        ("parameters", _parameters(checkpoint)),
        ("rank", ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(ranks.items()))),
    ]
    if alphas:
        rows.append(("alpha", ", ".join(f"{alpha:g}" for alpha in sorted(alphas))))
    return rows


def _naming(checkpoint: Checkpoint) -> str:
    matches = map(lora.TENSOR.fullmatch, checkpoint.names())
    found = lora_names.recognise({match["module"] for match in matches if match})
    if found is None:
        return f"unknown; its tensors begin with {checkpoint.names()[0]}"
    family, naming = found
    return f"transformer of {family.models}, modules in {naming} naming"


def _parameters(checkpoint: Checkpoint) -> str:
    counts = checkpoint.parameters()
    parts = [f"{_millions(count)} {_short(name)}" for name, count in counts.items() if count]
    if len(parts) == 1:
        return parts[0]
    return f"{_millions(sum(counts.values()))}: {', '.join(parts)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _short(dtype: str) -> str:
    return SHORT_DTYPES.get(dtype, dtype)
