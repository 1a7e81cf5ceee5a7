"""Write networks of a bundle as PyTorch checkpoints, by the rows of the tables in reverse.

    folder      for `from_pretrained`: config.json, safetensors shards, index
    single      one safetensors file, with the names of diffusers, of the original release (which
                ComfyUI also reads), or of ComfyUI

Tensors are written one at a time, so that memory use stays constant. An unfinished file or folder
has a hidden name that ends in `.partial`, and is renamed when it is complete.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from framepack_jax import bundle
from framepack_jax.bundle import Manifest
from framepack_jax.conversion import (
    arrays,
    encoders,
    engine,
    export_configs,
    transformer,
    vae,
    wan_transformer,
    wan_vae,
)
from framepack_jax.conversion.engine import Advance, Step, Table
from framepack_jax.conversion.safetensors_files import (
    Tensor,
    partial_name,
    shards,
    write_safetensors,
)
from framepack_jax.conversion.transforms import (
    Conv,
    Conv2d,
    Copy,
    Linear,
    Patch,
    Pointwise,
    Shape,
    Swapped,
    Transform,
    Unbatched,
    Vector,
)
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization

SHARD = 5_000_000_000
# Naming -> tables, and the prefix of their names.
TABLES: dict[str, tuple[tuple[Table, str], ...]] = {
    "diffusers": (
        (transformer.DIFFUSERS, ""),
        (wan_transformer.DIFFUSERS, ""),
        (vae.TABLE, ""),
        (wan_vae.DIFFUSERS, ""),
        (encoders.UMT5, ""),
        (encoders.CLIP, "text_model."),
        (encoders.SIGLIP, "vision_model."),
    ),
    "original": (
        (transformer.TENCENT, ""),
        (wan_transformer.ORIGINAL, ""),
        (vae.TABLE, ""),
        (wan_vae.ORIGINAL, ""),
    ),
    "comfyui": (
        (transformer.COMFYUI, ""),
        (wan_transformer.ORIGINAL, ""),
        (wan_vae.ORIGINAL, ""),
    ),
}
# Names of weight files in a folder, as diffusers and transformers ("model") expect them.
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


class Export:
    """A network of a bundle to write for PyTorch.

    Args:
        root: Folder of the bundle.
        manifest: Its manifest.
        role: The network.
        naming: Names of the tensors, a key of `TABLES`.
        dtype: Type of the written tensors; None keeps the stored types.

    Raises ConversionError if the network has no names in that naming, is causal in its frames or is
    quantized, BundleError.
    """

    def __init__(
        self,
        root: epath.PathLike,
        manifest: Manifest,
        role: str,
        naming: str = "diffusers",
        dtype: str | None = None,
    ) -> None:
        self.root, self.manifest, self.role = root, manifest, role
        _, self.cfg = bundle.role_config(manifest, role)
        if getattr(self.cfg, "causal", False):
            raise ConversionError(
                f"bundle {root}: no frame of the {role}'s target reads a later one (causal), and"
                " other programs would let it; train without --causal to export"
            )
        stored = bundle.stored_dtypes(root, manifest, role)
        if kept := set(quantization.QUANTIZED).intersection(stored.values()):
            raise ConversionError(
                f"bundle {root}: {role} is quantized to {kept.pop()} and lacks its original"
                " numbers; export the bundle that it was converted from"
            )
        steps = _steps(manifest, role, naming)
        types = [dtype or str(jnp.result_type(*map(stored.get, step.targets))) for step in steps]
        # Wide types first: readers map tensors in place, at multiples of their item size.
        order = sorted(range(len(steps)), key=lambda i: -jnp.dtype(types[i]).itemsize)
        self._steps = [(steps[i], types[i]) for i in order]
        self.tensors = [
            Tensor(name, shape, dtype)
            for step, dtype in self._steps
            for name, shape in zip(step.sources, step.source_shapes(), strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield the values of `tensors`, in their order."""
        paths = [path for step, _ in self._steps for path in step.targets]
        leaves = bundle.read_leaves(self.root, self.manifest, self.role, paths)
        for step, dtype in self._steps:
            held = [next(leaves)[1] for _ in step.targets]
            tensors = invert(step.row.transform, held, step.source_shapes())
            for name, array in zip(step.sources, tensors, strict=True):
                yield arrays.contiguous(arrays.cast(name, array, dtype))

    def single(self, path: Path, advance: Advance = engine.silent) -> None:
        """Write one safetensors file; call `advance` with the bytes of each tensor.

        Raises ConversionError if `path` exists, or if the disk is too small.
        """
        if path.exists():
            raise ConversionError(f"{path} exists already; choose another file, or remove it")
        partial_name(path).unlink(missing_ok=True)
        engine.check_space(path, self.nbytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, self.tensors, self.arrays(), advance)

    def folder(self, path: Path, advance: Advance = engine.silent) -> None:
        """Write a folder for `from_pretrained`; call `advance` with the bytes of each tensor.

        Files have at most `SHARD` bytes, or one tensor. Raises ConversionError if `path` exists and
        is not empty, if the disk is too small, or if diffusers has no model of this config.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConversionError(f"{path} exists and is not empty; choose another folder")
        kind = self.manifest.roles[self.role].kind
        config = export_configs.CONFIGS[kind](self.cfg, self.manifest)
        partial = partial_name(path)
        shutil.rmtree(partial, ignore_errors=True)
        engine.check_space(path, self.nbytes)
        partial.mkdir(parents=True)
        arrays = self.arrays()
        parts, stem = shards(self.tensors, SHARD), STEMS.get(self.role, "model")
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(parts, 1):
            several = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
            file = f"{stem}{several}.safetensors"
            write_safetensors(
                partial / file, tensors, itertools.islice(arrays, len(tensors)), advance
            )
            weight_map |= {tensor.name: file for tensor in tensors}
        if len(parts) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            _write_json(partial / f"{stem}.safetensors.index.json", index)
        _write_json(partial / "config.json", config)
        partial.replace(path)


def default_naming(manifest: Manifest, role: str) -> str:
    """Return the default naming of a single file: "original", or "diffusers" for networks with
    packed context, whose embeddings have names in diffusers only."""
    _, cfg = bundle.role_config(manifest, role)
    if getattr(cfg, "context_kernels", ()):
        return "diffusers"
    try:
        _steps(manifest, role, "original")
    except ConversionError:
        return "diffusers"
    return "original"


@functools.singledispatch
def invert(
    transform: Transform, leaves: list[np.ndarray], sources: list[Shape]
) -> list[np.ndarray]:
    """Invert `transform`: return tensors of shapes `sources`, which may be views of `leaves`."""
    raise TypeError(f"{type(transform).__name__} has no inverse")


@invert.register
def _(transform: Copy, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    return leaves


@invert.register
def _(transform: Unbatched, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    return [leaves[0][None]]


@invert.register
def _(transform: Linear, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    parts = [
        leaf.reshape(-1) if transform.is_bias else leaf.reshape(len(leaf), -1).T for leaf in leaves
    ]
    fused = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=transform.split)
    return np.split(fused, len(sources))


@invert.register
def _(transform: Swapped, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    swapped = invert(transform.inner, leaves, sources)
    return [np.roll(tensor, -(len(tensor) // 2), axis=0) for tensor in swapped]


@invert.register
def _(transform: Conv, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    return [np.moveaxis(leaves[0], (-2, -1), (1, 0))]


@invert.register
def _(transform: Conv2d, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    return [np.moveaxis(leaves[0][0], (-2, -1), (1, 0))]


@invert.register
def _(transform: Pointwise, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    matrices = invert(transform.inner, leaves, sources)
    return [matrix.reshape(shape) for matrix, shape in zip(matrices, sources, strict=True)]


@invert.register
def _(transform: Vector, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    return [leaves[0].reshape(sources[0])]


@invert.register
def _(transform: Patch, leaves: list[np.ndarray], sources: list[Shape]) -> list[np.ndarray]:
    width = leaves[0].shape[-1]
    return invert(Conv(), [leaves[0].reshape(*transform.kernel, -1, width)], sources)


def _steps(manifest: Manifest, role: str, naming: str) -> list[Step]:
    """Return the steps of a network. Raises ConversionError if the naming has no names for it."""
    spec, cfg = bundle.role_config(manifest, role)
    if spec.kind == encoders.LLAMA.kind:
        raise ConversionError(
            f"{role}: a bundle keeps only the layers of Llama that FramePack uses, which"
            " make no whole model; use the checkpoint that it was converted from"
        )
    found = [pair for pair in TABLES[naming] if pair[0].kind == spec.kind]
    if not found:
        known = ", ".join(sorted(table.description for table, _ in TABLES[naming]))
        raise ConversionError(
            f"{role} of kind {spec.kind} has no {naming} names; networks with such names: {known}"
        )
    ((table, prefix),) = found
    try:
        return engine.steps_of(table, cfg, prefix)
    except LookupError as error:
        raise ConversionError(
            f"{role}: a {table.description} has no names for some of its tensors ({error}); export"
            " a FramePack model in diffusers' names"
        ) from error


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
