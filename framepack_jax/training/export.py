"""Export a training run as a bundle, or its adapters as LoRA files.

Leaves are read from the checkpoint one at a time, so a host needs memory for a single leaf.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from framepack_jax import bundle, packing
from framepack_jax.conversion.lora import write
from framepack_jax.conversion.lora_names import family_of
from framepack_jax.data.fingerprint import digest
from framepack_jax.models import lora
from framepack_jax.models.params import unstack_layers
from framepack_jax.training import checkpoints, consistency, state
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.log_file import read_lines
from framepack_jax.utils import fields, storage
from framepack_jax.utils.paths import is_remote
from framepack_jax.utils.versions import code_version

# Folders of a bundle with files of the transformers library.
ASSETS = ("tokenizer", "tokenizer_2", "image_processor")
# {key format: file} of trained adapters: for diffusers and this project, and for other programs.
LORA_FILES = {"diffusers": "lora.safetensors", "original": "lora_original.safetensors"}
PACKAGES = ("framepack-jax", "jax", "flax", "optax")


def export(
    run: str,
    output: str | None,
    bundle_path: epath.PathLike,
    *,
    weights: str = "auto",
    dtype: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> str:
    """Export a run (RUN or RUN@STEP) as a bundle, or its adapters as LORA_FILES in a folder, or
    both: a bundle with the trained embeddings, and in its folder the adapters.

    Returns lines that say what was written. The bundle of a run from random weights lists the
    buckets of its dataset.

    Args:
        run: the run folder, or RUN@STEP.
        output: the target folder; default RUN/bundle.
        bundle_path: the bundle that the run was trained from.
        weights: the moving "average" of the parameters, the "last" parameters, or "auto": the
            average if the run has one.
        dtype: default bfloat16 for a bundle, float32 for adapters.
        copy: copy the networks that were not trained instead of linking to them.
        overwrite: replace an existing bundle or LoRA files.

    Raises RunError (also if the target exists, without `overwrite`), BundleError, OSError.
    """
    folder, step = checkpoints.parse_run(run)
    record = checkpoints.read_record(folder)
    cfg = read_config(record["config"])
    manifest = bundle.read_manifest(bundle_path)
    if manifest.roles["transformer"].source.get("sha256") != record["weights"]:
        raise RunError(
            f"{folder} was not trained from the transformer in {bundle_path}; give the bundle that"
            " the run was trained from"
        )
    run_at = _Run(folder, step, _part(folder, cfg, weights), cfg, record, manifest)
    target = epath.Path(output or os.path.join(folder, "bundle"))
    adapters = cfg.trainable == "lora"
    alone = adapters and not cfg.lora.context
    if alone and copy:
        raise RunError(f"{folder} has adapters only, which are one file; remove --copy")
    files = _lora_files(target, overwrite, alone) if adapters else {}
    lines = []
    if not alone:
        _check_target(target, overwrite)
        lines.append(_export_bundle(run_at, bundle_path, target, dtype or "bfloat16", copy))
    if adapters:
        lines.append(_export_lora(run_at, files, dtype or "float32"))
    return "\n".join(lines)


class _Run(NamedTuple):
    """A run at a step: the part of its checkpoint to export, its configuration and record, and the
    manifest of the bundle that it was trained from."""

    folder: str
    step: int
    part: str
    cfg: TrainConfig
    record: dict[str, Any]
    manifest: bundle.Manifest

    @property
    def model(self) -> state.Model:
        return state.model_of(self.cfg, self.manifest)


def _export_bundle(
    run: _Run, bundle_path: epath.PathLike, target: epath.Path, dtype: str, copy: bool
) -> str:
    """Write the network of a run, without adapters, in a bundle."""
    model = run.model
    trained, frozen = state.abstract_params(run.cfg, model)
    factors, own = state.partition_factors(trained)
    leaves = _leaves(run, own, dtype)
    if jax.tree.leaves(frozen):
        names = list(unstack_layers(frozen, model.spec.stacks))
        leaves = itertools.chain(
            bundle.read_leaves(bundle_path, run.manifest, "transformer", names), leaves
        )
    average = ", moving average" if run.part == "ema" else ""
    origin = f"{run.folder} at step {run.step}{average}"
    manifest = _manifest_of(run.manifest, run.cfg, run.record)
    network = model.spec.kind, dataclasses.asdict(model.cfg)
    source = {"name": origin, "training": provenance(run.folder, run.step)}
    if run.record.get("began") != "scratch":
        source["base"] = _base_of(run.manifest)
    if codebook := _codebook_of(bundle_path, run):
        target.mkdir(parents=True, exist_ok=True)
        codebook.copy(target / bundle.CODEBOOK, overwrite=True)
    written = write_bundle(
        manifest, bundle_path, target, "transformer", network, leaves, source, copy
    )
    more = f" --lora {target}" if factors else ""
    return f"{target}: {origin}, {written.bytes / 1e6:,.1f} MB; sample.py --bundle {target}{more}"


def _base_of(manifest: bundle.Manifest) -> str:
    """Return the name of the model that a bundle's transformer is derived from."""
    source = manifest.roles["transformer"].source
    return str(source.get("base") or source.get("name", "unknown"))


def _part(folder: epath.Path, cfg: TrainConfig, weights: str) -> str:
    """Return the part of a checkpoint that holds these `weights`. Raises RunError."""
    if weights == "average" and not cfg.ema:
        raise RunError(f"{folder} has no moving average (--ema 0); remove --weights average")
    return "ema" if cfg.ema and weights != "last" else "params"


def _check_target(target: epath.Path, overwrite: bool) -> None:
    """Raise RunError if a bundle must not be written to `target`."""
    is_bundle = (target / bundle.MANIFEST).exists()
    if is_bundle and not overwrite:
        raise RunError(f"{target} already is a bundle; choose another --output, or --overwrite")
    if target.exists() and not is_bundle and any(target.iterdir()):
        raise RunError(f"{target} is neither a bundle nor empty; choose another --output")


def _codebook_of(bundle_path: epath.PathLike, run: _Run) -> epath.Path | None:
    """Return the file of the codebook of a run. Raises RunError if it is another one by now."""
    cfg = run.cfg
    schedule = packing.parse(cfg.schedule) if cfg.schedule else run.manifest.schedule
    entries = bundle.entries_for(schedule, bundle_path, run.manifest, cfg.codebook)
    if entries is None:
        return None
    file = epath.Path(cfg.codebook or epath.Path(bundle_path) / bundle.CODEBOOK)
    if bundle.digest(entries) != run.record["codebook"]:
        raise RunError(f"{file} is not the codebook that {run.folder} was trained with")
    return file


def _manifest_of(
    manifest: bundle.Manifest, cfg: TrainConfig, record: dict[str, Any]
) -> bundle.Manifest:
    """Return the manifest with the schedule of a run, with the buckets that it trained from random
    weights, with the start of videos from text if it trained these, with the noise of the history
    if it trained one factor, and with the steps of a student."""
    if cfg.schedule:
        manifest = dataclasses.replace(manifest, schedule=packing.parse(cfg.schedule))
    if record.get("began") == "scratch":
        sizes = (name.split("x") for name in record["fingerprint"]["clips"])
        buckets = tuple(sorted((int(height), int(width)) for height, width in sizes))
        manifest = dataclasses.replace(manifest, buckets=buckets)
    sampling = manifest.sampling
    if cfg.data.empty_start:
        sampling = dataclasses.replace(sampling, empty_start=True)
    noisy = cfg.history.noisy
    if noisy and noisy != "random" and manifest.schedule.codebook is None:
        sampling = dataclasses.replace(sampling, history_noise=noisy)
    sampling = consistency.student_sampling(cfg, sampling)
    return dataclasses.replace(manifest, sampling=sampling)


def provenance(run: str, step: int) -> dict[str, Any]:
    """Return the provenance of a run's weights for their bundle: configuration, data, versions of
    the code, and the last value of each metric that was logged up to `step`."""
    record = checkpoints.read_record(run)
    names = record.pop("videos", None)
    if names is not None:
        record["videos"] = len(names)
    figures: dict[str, float] = {}
    for found in map(json.loads, read_lines(run)):
        if found.pop("step") <= step:
            figures |= found
    return {"step": step, **record, "code": code_version(PACKAGES), "metrics": figures}


def write_bundle(
    manifest: bundle.Manifest,
    bundle_path: epath.PathLike,
    target: epath.Path,
    role: str,
    network: tuple[str, dict[str, Any]],
    leaves: Iterator[tuple[str, np.ndarray]],
    source: dict[str, Any],
    copy: bool,
) -> bundle.Written:
    """Write a bundle that replaces one network of the bundle at `bundle_path`.

    `role` gets the weights `leaves` of `network` (kind, config) with the origin `source`. The other
    networks are linked to, or copied with `copy`; a bundle in an object store has copies of those
    on a disk. `manifest` is written last, so that an unfinished
    bundle has none.
    """
    (target / bundle.MANIFEST).unlink(missing_ok=True)
    written = bundle.write_params(target / role, leaves)
    source = source | {"naming": "trained", "format": "orbax"}
    roles = {}
    for name, other in manifest.roles.items():
        path = bundle.referenced(bundle_path, other.path)
        if name == role:
            roles[name] = bundle.Role(*network, name, source | written._asdict())
        elif copy or (is_remote(target) and not is_remote(path)):
            _copy(path, target / name)
            roles[name] = dataclasses.replace(other, path=name)
        else:
            roles[name] = dataclasses.replace(other, path=bundle.reference(path, target))
    # Tokenizers and the image processor are small, so they are always copied.
    for part in epath.Path(bundle_path).iterdir():
        if part.name in ASSETS and part.is_dir():
            _copy(part, target / part.name)
    bundle.write_manifest(target, dataclasses.replace(manifest, roles=roles))
    return written


def _copy(source: epath.Path, target: epath.Path) -> None:
    if target.exists():
        target.rmtree()
    if not is_remote(source):
        storage.copy_tree(Path(source), target)
        return
    target.mkdir(parents=True)
    for part in source.iterdir():
        if part.is_dir():
            _copy(part, target / part.name)
        else:
            part.copy(target / part.name)


def read_config(values: dict[str, Any]) -> TrainConfig:
    """Return the configuration in the record of a run. Fields of other versions are ignored."""
    return fields.load(TrainConfig, values, ignore_unknown=True)


def _leaves(run: _Run, trained: Any, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) of trained parameters layer by layer, cast to `dtype`."""
    for path, leaf in flatten_dict(trained).items():
        wanted = unflatten_dict({path: leaf})
        found = checkpoints.restore_params(run.folder, run.step, wanted, run.part)
        array = np.asarray(flatten_dict(found)[path])
        layers = unstack_layers(unflatten_dict({path: array}), run.model.spec.stacks)
        for name, layer in layers.items():
            yield name, np.asarray(layer).astype(jnp.dtype(dtype))


def _lora_files(target: epath.Path, overwrite: bool, alone: bool) -> dict[str, epath.Path]:
    """Return {key format: file} for adapters: `target` if it is a .safetensors file, else
    LORA_FILES in the folder `target`. Raises RunError if one exists, without `overwrite`, or if a
    file is given for adapters that are not `alone`."""
    files = {naming: target / name for naming, name in LORA_FILES.items()}
    if target.suffix == ".safetensors":
        if not alone:
            raise RunError(
                f"{target}: the run trained embeddings too (--lora.context), which make a bundle;"
                " give a folder"
            )
        files = {"diffusers": target}
    for file in files.values():
        if file.exists() and not overwrite:
            raise RunError(f"{file} already exists; choose another --output, or --overwrite")
    return files


def _lora_header(run: _Run) -> dict[str, str]:
    """Return the provenance of adapters for the header of their files.

    Keys are those of kohya-ss/sd-scripts and musubi-tuner (ss_) and of Stability AI's model
    metadata specification (modelspec). The trained rank and alpha have keys of our own, as `write`
    adds those of the stored tensors, which may differ.
    """
    base = str(run.manifest.roles["transformer"].source.get("name", "unknown"))
    schedule = run.cfg.schedule or run.manifest.schedule
    release = family_of(run.model.cfg).release(run.model.cfg)
    rank, alpha = run.cfg.lora.rank, f"{run.cfg.lora.alpha:g}"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{release.architecture}/lora",
        "modelspec.implementation": f"https://github.com/{release.repository}",
        "modelspec.title": os.path.basename(os.path.normpath(run.folder)),
        "modelspec.description": f"LoRA trained with rank {rank} and alpha {alpha} for {run.step}"
        f" steps from {base}, for packing schedule {schedule}",
        "ss_base_model_version": release.version,
        "ss_sd_model_name": base,
        "ss_steps": str(run.step),
        "framepack.rank": str(rank),
        "framepack.alpha": alpha,
        "framepack.schedule": str(schedule),
        "framepack.base": _base_of(run.manifest),
        "framepack.dataset": digest(run.record["fingerprint"]),
    } | _student_header(run.cfg)


def _student_header(cfg: TrainConfig) -> dict[str, str]:
    """Return how adapters that were distilled to few steps are sampled."""
    if not cfg.distill.steps:
        return {}
    return {"framepack.sampling_steps": str(cfg.distill.steps), "framepack.sampler": "euler"}


def _export_lora(run: _Run, files: dict[str, epath.Path], dtype: str) -> str:
    """Write the adapters of a run."""
    model = run.model
    factors, _ = state.partition_factors(state.abstract_params(run.cfg, model)[0])
    factors = checkpoints.restore_params(run.folder, run.step, factors, run.part)
    factors = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), factors)
    adapters: lora.LoRA = state.to_lora(run.cfg, factors)
    about = _lora_header(run)
    for naming, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, adapters, model.cfg, naming, about)
    file = files["diffusers"]
    steps = run.cfg.distill.steps
    how = f" --steps {steps} --sampler euler" if steps and not run.cfg.lora.context else ""
    rank = run.cfg.lora.rank
    said = f"{file}: {len(adapters)} adapters of rank {rank}; sample.py --lora {file}{how}"
    if other := files.get("original"):
        said += f"\n{other}: the same for ComfyUI, musubi-tuner, OneTrainer and other programs"
    return said
