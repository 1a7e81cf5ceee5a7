"""Find the source of every part of a bundle: networks, tokenizers, packing schedule."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest
from framepack_jax.conversion import (
    encoders,
    hub,
    pipeline_index,
    tables,
    tokenizers,
    weight_files,
)
from framepack_jax.conversion.engine import ConversionJob, Source
from framepack_jax.conversion.pipeline_index import MODEL_INDEX
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization


def fetch(request: BundleRequest) -> tuple[BundleRequest, dict[str, str]]:
    """Download the parts that lie on the hub.

    Return the request with local paths, and {part: its name on the hub}. Raises ConversionError.
    """
    names = ("pipeline", *bundle.ROLES, *tokenizers.MARKERS)
    given: dict[str, tuple[str, str | None] | None] = {
        name: hub.split(str(path)) for name in names if (path := getattr(request, name))
    }
    if request.framepack:
        released = hub.FRAMEPACK[request.framepack]
        fetched = ["transformer"] if request.encoders_from else list(released)
        given = {**{name: released[name] for name in fetched}, **given}
    if request.helios:
        repository = hub.HELIOS[request.helios]
        part = "transformer" if request.encoders_from else "pipeline"
        given = {part: (repository, "transformer" if request.encoders_from else None), **given}
    remote = {name: there for name, there in given.items() if there}
    if "pipeline" in remote:
        _check_pipeline(*remote["pipeline"])
    if len(remote) > 1:
        output = None if "://" in request.output else Path(request.output)
        hub.check_space(remote, output, 0.5 if request.dtype in quantization.QUANTIZED else 1.0)
    paths: dict[str, Any] = {
        name: hub.fetch(*there, pipeline=name == "pipeline") for name, there in remote.items()
    }
    if request.helios and request.encoders_from:
        # They lie beside the transformer, and say how it is sampled.
        for part in (MODEL_INDEX, "scheduler"):
            hub.fetch(hub.HELIOS[request.helios], part, progress=False)
    origins = {name: "/".join(filter(None, there)) for name, there in remote.items()}
    return dataclasses.replace(request, **paths), origins


def _check_pipeline(repo_id: str, subfolder: str | None) -> None:
    """Raise ConversionError for a pipeline on the hub that is not supported, by its index alone."""
    try:
        file = hub.fetch(repo_id, "/".join(filter(None, (subfolder, MODEL_INDEX))), progress=False)
    except ConversionError:
        return  # The download of all files says what is wrong.
    if file.is_file():
        pipeline_index.refuse_experts(Path(repo_id), weight_files.read_json(file))


def pipeline_of(request: BundleRequest, paths: Mapping[str, Path]) -> Path | None:
    """Return the pipeline folder whose settings the transformer has: --pipeline, or the folder
    around a transformer that is given alone."""
    if request.pipeline or "transformer" not in paths:
        return request.pipeline
    around = paths["transformer"].absolute().parent
    return around if (around / MODEL_INDEX).exists() else None


def network_paths(request: BundleRequest) -> dict[str, Path]:
    """Return {role: checkpoint}: a role's own flag, else the pipeline. Raises ConversionError."""
    paths = pipeline_paths(request.pipeline) if request.pipeline else {}
    paths |= {role: path for role in bundle.ROLES if (path := getattr(request, role))}
    if not paths:
        raise ConversionError(
            "nothing to convert: give --framepack, --pipeline, --transformer, --vae,"
            " --text-encoder, --text-encoder-2 or --image-encoder"
        )
    return {role: paths[role] for role in bundle.ROLES if role in paths}


def pipeline_paths(pipeline: Path) -> dict[str, Path]:
    """Return {role: checkpoint} of a pipeline: its folders, or the one file of all networks."""
    if not pipeline.is_dir():
        if held := tables.networks(weight_files.open_checkpoint(pipeline)):
            return dict.fromkeys(held, pipeline)
        raise ConversionError(
            f"{pipeline} holds no network with known tensor names; describe it with: framepack"
            f" inspect {pipeline}"
        )
    if not (pipeline / MODEL_INDEX).exists():
        raise ConversionError(
            f"{pipeline} is no diffusers pipeline (it has no {MODEL_INDEX}); give"
            " single networks with --transformer, --vae and so on"
        )
    index = weight_files.read_json(pipeline / MODEL_INDEX)
    return {role: pipeline / role for role in bundle.ROLES if any(index.get(role) or ())}


def tokenizer_folders(
    request: BundleRequest,
    paths: dict[str, Path],
    jobs: Mapping[str, ConversionJob],
    scratch: Path,
) -> dict[str, Path]:
    """Return {name: folder} of the tokenizers and the image processor of the converted networks.

    A tokenizer that is inside of a checkpoint is written to the empty folder `scratch`. Raises one
    ConversionError for all that are missing.
    """
    folders, problems = {}, []
    for role, name in tokenizers.FOLDERS.items():
        given = getattr(request, name)
        if role not in jobs and not given:
            continue
        try:
            folders[name] = tokenizers.find(role, paths.get(role), given)
        except ConversionError as error:
            source = jobs[role].source if role in jobs else None
            if source and not given and (folder := tokenizers.extract(source, scratch)):
                folders[name] = folder
                continue
            umt5 = source is not None and source.table.kind == encoders.UMT5.kind
            released = hub.UMT5_TOKENIZER if umt5 else hub.SHARED[name]
            where = "/".join(filter(None, released))
            problems.append(f"{error}; that of the released models is {where}")
    if problems:
        raise ConversionError("\n".join(problems))
    return folders


def schedule_of(
    request: BundleRequest,
    origin: str | None,
    networks: Mapping[str, Source],
    shared: Manifest | None,
    told: str | None,
) -> packing.Schedule:
    """Return the packing schedule of the transformer.

    A transformer that stays in the `shared` bundle keeps its schedule. Else --schedule counts, then
    with --from-base that of the family's released packed model, then what the pipeline `told`, then
    the schedule of the released model, by --framepack or by its name `origin` on the hub.
    """
    source = networks.get("transformer")
    stays = shared and "transformer" in shared.roles and source is None
    if shared and stays and request.schedule in (None, str(shared.schedule)):
        return shared.schedule
    if source and request.from_base:
        released = tables.PACKED_SCHEDULES[source.table.kind]
    else:
        released = told or _released(request.framepack, origin) or packing.RELEASED_INVERTED
    return packing.parse(request.schedule or released)


def is_schedule_assumed(request: BundleRequest, manifest: Manifest) -> bool:
    """Return True if neither the request nor the source tells the schedule of the transformer."""
    role = manifest.roles.get("transformer")
    if role is None or role.path != "transformer" or request.schedule or request.from_base:
        return False
    cfg = bundle.role_config(manifest, "transformer")[1]
    told = pipeline_index.settings_of(request.pipeline, cfg).schedule
    return told is None and _released(request.framepack, role.source["name"]) is None


def _released(framepack: str | None, origin: str | None) -> str | None:
    """Return the schedule of a released transformer, None for others."""
    named = {parts["transformer"][0]: model for model, parts in hub.FRAMEPACK.items()}
    model = framepack or named.get(origin or "")
    return hub.SCHEDULES[model] if model else None
