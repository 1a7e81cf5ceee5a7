"""Compare a bundle with a checkpoint, bit for bit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath

from framepack_jax import bundle
from framepack_jax.bundle import Manifest
from framepack_jax.conversion import engine, hub, tables, weight_files
from framepack_jax.conversion.engine import Advance, ConversionJob
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization
from framepack_jax.utils.messages import shorten
from framepack_jax.utils.progress import byte_bar


@dataclasses.dataclass
class Comparison:
    """Result for one network: number of leaves, their bytes in the bundle, paths of those that
    differ, and types that the source was cast to."""

    role: str
    leaves: int = 0
    bytes: int = 0
    differing: list[str] = dataclasses.field(default_factory=list)
    casts: set[str] = dataclasses.field(default_factory=set)


def compare(source: Path, root: epath.PathLike, prefix: str | None = None) -> list[Comparison]:
    """Compare every network that a checkpoint or pipeline and a bundle both have.

    `prefix` is that of `tables.recognise`. Raises ConversionError, BundleError.
    """
    manifest = bundle.read_manifest(root)
    if remote := hub.split(str(source)):
        source = hub.fetch(*remote, pipeline=None)
    jobs = {
        role: make_job(path, manifest, role, prefix)
        for role, path in sources(source, manifest).items()
    }
    tables.check_prefix(prefix, [job.source for job in jobs.values()])
    results = []
    for role, job in jobs.items():
        with byte_bar(role, bundle.stored_bytes(root, manifest, role)) as bar:
            results.append(compare_network(job, root, manifest, role, bar.update))
    return results


def sources(path: Path, manifest: Manifest) -> dict[str, Path]:
    """Return {role: checkpoint} of the networks that a bundle and `path` both have; `path` is a
    diffusers pipeline, or a checkpoint of one or several networks. Raises ConversionError if there
    is no such network.
    """
    if (path / "model_index.json").exists():
        held = weight_files.read_json(path / "model_index.json")
        found = {role: path / role for role in manifest.roles if any(held.get(role) or ())}
    else:
        held = tables.networks(weight_files.open_checkpoint(path))
        found = {role: path for role in manifest.roles if role in held}
    if not found:
        raise ConversionError(
            f"{path} holds none of the bundle's networks: {', '.join(manifest.roles)}"
        )
    return found


def make_job(path: Path, manifest: Manifest, role: str, prefix: str | None = None) -> ConversionJob:
    """Return the conversion of a checkpoint to a role of the bundle.

    `prefix` is that of `tables.recognise`. Raises ConversionError, also if the checkpoint has
    another config than the network in the bundle.
    """
    spec, cfg = bundle.role_config(manifest, role)
    source = tables.recognise(weight_files.open_checkpoint(path), role, prefix)
    if source.table.kind != spec.kind:
        raise ConversionError(
            f"{path} is a {source.table.description} ({source.table.kind}), and the {role} of the"
            f" bundle is a {spec.kind}; compare it with the checkpoint that it was made of"
        )
    source = dataclasses.replace(source, like=cfg)
    if role == "transformer":
        source = dataclasses.replace(source, overrides={"rope_axes": cfg.rope_axes})
        found = source.table.config(source)
        if cfg.context_kernels and not found.context_kernels:
            from_base = tables.FROM_BASE[source.table.kind]
            image_dim = getattr(cfg, "image_dim", None)
            table = from_base(source.table, cfg.context_kernels, image_dim)
            source = dataclasses.replace(source, table=table)
    made = engine.make_job(source)
    if made.cfg != cfg:
        fields = ", ".join(
            f"{field.name} {getattr(made.cfg, field.name)} there, {getattr(cfg, field.name)} here"
            for field in dataclasses.fields(cfg)
            if getattr(made.cfg, field.name) != getattr(cfg, field.name)
        )
        raise ConversionError(f"{path} makes another {role} than the bundle has: {fields}")
    return made


def compare_network(
    made: ConversionJob,
    root: epath.PathLike,
    manifest: Manifest,
    role: str,
    advance: Advance = engine.silent,
) -> Comparison:
    """Compare every leaf, bit for bit; if the bundle has another type, after the same cast.

    Raises ConversionError or BundleError if one of the two cannot be read.
    """
    types = bundle.stored_dtypes(root, manifest, role)
    dtype = next((each for each in quantization.QUANTIZED if each in types.values()), None)
    result = Comparison(role, casts={dtype} if dtype else set())
    paths = list(made.paths(dtype))
    stored = bundle.read_leaves(root, manifest, role, paths)
    for (path, expected), (_, array) in zip(made.leaves(dtype), stored, strict=True):
        result.leaves += 1
        result.bytes += array.nbytes
        if str(expected.dtype) != types[path]:
            result.casts.add(types[path])
        if not _same_bits(_cast(expected, types[path]), array):
            result.differing.append(path)
        advance(array.nbytes)
    return result


def table(results: Sequence[Comparison]) -> str:
    """Return a line for each network (role, tensors, bytes, differing tensors, casts), then the
    names of the first tensors that differ."""
    lines = [f"{'role':15} {'tensors':>8} {'bytes':>16} {'differing':>10}"]
    for r in results:
        casts = f"  after a cast to {' and '.join(sorted(r.casts))}" if r.casts else ""
        lines.append(f"{r.role:15} {r.leaves:8,} {r.bytes:16,} {len(r.differing):10,}{casts}")
    for r in results:
        if r.differing:
            lines.append(f"{r.role} differs in {shorten(r.differing)}")
    return "\n".join(lines)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Cast; numbers beyond the range of the type become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(array, jnp.dtype(dtype))


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare shapes and bits: equal NaNs are the same, zeros of different sign are not."""
    unsigned = f"u{one.itemsize}"
    return one.shape == other.shape and np.array_equal(one.view(unsigned), other.view(unsigned))
