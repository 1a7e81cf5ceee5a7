"""Make a bundle of checkpoints: check all inputs, then write it network by network."""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest
from framepack_jax.conversion import (
    assembly,
    output_folder,
    pipeline_index,
    sources,
    tokenizers,
)
from framepack_jax.conversion.engine import ConversionJob
from framepack_jax.conversion.memory import keep_freed_memory
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.utils.paths import is_remote
from framepack_jax.utils.progress import byte_bar


def make_bundle(request: BundleRequest) -> Manifest:
    """Write the bundle of a request; return its manifest.

    Raises ConversionError, BundleError or ScheduleError before anything is written if the input
    does not fit.
    """
    _check_flags(request)
    output = epath.Path(request.output)
    shared = bundle.read_manifest(request.encoders_from) if request.encoders_from else None
    output_folder.check_replaceable(output, overwrite=request.overwrite)
    request, origins = sources.fetch(request)
    paths = sources.network_paths(request)
    read = list(paths.values())
    if shared and request.encoders_from:
        kept = [role for role in shared.roles if role not in paths]
        bundle.check_present(request.encoders_from, kept)
        output_folder.check_reference(request.output, request.encoders_from)
        if not is_remote(request.encoders_from):
            roles = shared.roles.values()
            read += [Path(bundle.referenced(request.encoders_from, role.path)) for role in roles]
    output_folder.check_outside(request.output, read)
    networks = assembly.find_networks(request, paths, shared)
    pipeline = sources.pipeline_of(request, paths)
    told = pipeline_index.settings_of(pipeline).schedule
    schedule = sources.schedule_of(request, origins.get("transformer"), networks, shared, told)
    jobs = assembly.fit_networks(request, networks, schedule, shared)
    transformer = jobs["transformer"].cfg if "transformer" in jobs else None
    # A pipeline tells how its base model is sampled, not the packed model that starts from it.
    settings = pipeline_index.settings_of(None if request.from_base else pipeline, transformer)
    if settings.schedule and not request.schedule:
        schedule = packing.parse(settings.schedule)
    with tempfile.TemporaryDirectory() as scratch:
        folders = sources.tokenizer_folders(request, paths, jobs, Path(scratch))
        manifest = assembly.assemble_manifest(request, schedule, jobs, shared, origins, settings)
        output_folder.check_space(request.output, [j.nbytes(request.dtype) for j in jobs.values()])
        return _write(request, output, manifest, jobs, folders)


def _check_flags(request: BundleRequest) -> None:
    """Raise ConversionError for flags that contradict each other."""
    whole = {name: getattr(request, name) for name in ("framepack", "helios", "pipeline")}
    given = [f"--{name} {value}" for name, value in whole.items() if value]
    if len(given) > 1:
        raise ConversionError(
            f"{' and '.join(given)} each bring all networks; give one of them, and single networks"
            " by their own flags"
        )
    if request.image_dim is not None and not request.from_base:
        raise ConversionError(
            f"--image-dim {request.image_dim} is of the image projection that --from-base makes; a"
            " checkpoint has its own: remove the flag"
        )


def _write(
    request: BundleRequest,
    output: epath.Path,
    manifest: Manifest,
    jobs: dict[str, ConversionJob],
    folders: dict[str, Path],
) -> Manifest:
    """Write networks, tokenizers and, last, the manifest; return the manifest."""
    keep_freed_memory()
    output_folder.clear(output)
    roles = dict(manifest.roles)
    for name, job in jobs.items():
        written = bundle.write_params(output / name, _leaves(name, job, request.dtype))
        source = {**roles[name].source, **written._asdict()}
        roles[name] = dataclasses.replace(roles[name], source=source)
    for name, folder in (_shared_folders(request) | folders).items():
        tokenizers.copy(name, folder, output)
    bundle.write_manifest(output, dataclasses.replace(manifest, roles=roles))
    (output / bundle.UNFINISHED).unlink()
    return bundle.read_manifest(output)


def _shared_folders(request: BundleRequest) -> dict[str, epath.PathLike]:
    """Return {name: folder} of the tokenizer and image-processor files of --encoders-from."""
    if not request.encoders_from:
        return {}
    shared = {name: epath.Path(request.encoders_from) / name for name in tokenizers.MARKERS}
    return {name: folder for name, folder in shared.items() if folder.exists()}


def _leaves(name: str, job: ConversionJob, dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the leaves of a network, with a progress bar of their bytes."""
    with byte_bar(name, job.nbytes(dtype)) as bar:
        for path, array in job.leaves(dtype):
            yield path, array
            bar.update(array.nbytes)
