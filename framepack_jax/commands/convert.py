"""`framepack convert`: PyTorch checkpoints become a bundle."""

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from etils import epath
from tqdm import tqdm

from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest, Role
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.conversion import assets, engine, readers, tables, transformer, vae
from framepack_jax.conversion.readers import ConversionError
from framepack_jax.models import kinds
from framepack_jax.models.packed_dit import context_kernels

# There from the first write until the bundle is whole.
UNFINISHED = "unfinished"
DEFAULT_IMAGE_DIM = 1152
# What one network makes has the width that the transformer reads.
WIDTHS = {
    "text_encoder": ("width", "text_dim"),
    "text_encoder_2": ("width", "pooled_dim"),
    "image_encoder": ("width", "image_dim"),
    "vae": ("latent_channels", "in_channels"),
}


@dataclasses.dataclass(frozen=True)
class Convert:
    """Make a bundle of PyTorch checkpoints.

    Networks come from a diffusers pipeline folder, from single files or folders, or stay in
    another bundle that the new one points to. All of them are checked before the first byte is
    written.
    """

    output: str
    """Folder of the new bundle."""
    pipeline: Path | None = None
    """A diffusers pipeline folder (with model_index.json); networks named below replace its own."""
    transformer: Path | None = None
    """FramePack or HunyuanVideo transformer: a file (.safetensors, .pt) or a folder with one, whole
    or sharded; in diffusers' or Tencent's naming."""
    vae: Path | None = None
    """HunyuanVideo VAE, file or folder; diffusers' or Tencent's."""
    text_encoder: Path | None = None
    """Llama, bare or inside LLaVA, file or folder."""
    text_encoder_2: Path | None = None
    """CLIP-L text model, file or folder."""
    image_encoder: Path | None = None
    """SigLIP vision model, file or folder."""
    tokenizer: Path | None = None
    """Folder of Llama's tokenizer; default: with the text encoder, or `tokenizer` next to it."""
    tokenizer_2: Path | None = None
    """Folder of CLIP's tokenizer; default: with text encoder 2, or `tokenizer_2` next to it."""
    image_processor: Path | None = None
    """Folder with preprocessor_config.json; default: with the image encoder, or
    `feature_extractor` next to it."""
    encoders_from: str | None = None
    """A bundle whose networks serve for all that are not given; they are pointed to, not copied."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type in which all weights are stored; default: as they come."""
    schedule: str = packing.RELEASED_INVERTED
    """Packing schedule that the transformer is made for (FramePack-F1: f1k1_x_f16k4f2k2f1k1_g9)."""
    from_base: bool = False
    """Begin a FramePack model from a base HunyuanVideo transformer: context embeddings for the
    kernels of --schedule from its patch embedding, and a new image projection."""
    image_dim: int | None = None
    """Width of the image tokens, with --from-base; default: that of the image encoder, or 1152."""
    rope_axes: str | None = None
    """RoPE widths of time, height and width, as 16,56,56, where the checkpoint does not tell."""
    prompt_template: str | None = None
    """Text around the prompt for Llama, with {} in its place; default: HunyuanVideo's."""
    overwrite: bool = False
    """Replace the bundle at --output."""


def main(args: list[str] | None = None, prog: str = "convert_weights.py") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = tyro.cli(Convert, prog=prog, args=args)
    began = time.monotonic()
    try:
        manifest = convert(flags)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(summary(flags.output, manifest))
    print(f"{time.monotonic() - began:.1f} s in all")


def convert(flags: Convert) -> Manifest:
    """Write the bundle of `flags`; returns its manifest. Raises ConversionError, BundleError,
    ScheduleError, before anything is written where the input does not fit."""
    output = epath.Path(flags.output)
    paths = _paths(flags)
    shared = bundle.read_manifest(flags.encoders_from) if flags.encoders_from else None
    _check_output(flags, output, paths, shared)
    plans = _plans(flags, paths, shared)
    files = {
        name: assets.find(role, paths.get(role), getattr(flags, name))
        for role, name in assets.FOLDERS.items()
        if role in plans or getattr(flags, name)
    }
    manifest = _manifest(flags, plans, shared)

    _clear(output)
    roles = dict(manifest.roles)
    for name, plan in plans.items():
        written = bundle.write_params(output / name, _progress(name, plan, flags.dtype))
        source = {**roles[name].source, **written._asdict()}
        roles[name] = dataclasses.replace(roles[name], source=source)
    if shared:
        names = assets.MARKERS.keys() - files.keys()
        kept = {name: epath.Path(flags.encoders_from) / name for name in names}
        files |= {name: folder for name, folder in kept.items() if folder.exists()}
    for name, folder in files.items():
        assets.copy(name, folder, output)
    bundle.write_manifest(output, dataclasses.replace(manifest, roles=roles))
    (output / UNFINISHED).unlink()
    return bundle.read_manifest(output)


def summary(output: epath.PathLike, manifest: Manifest) -> str:
    """What was written, and what a person must know about it."""
    lines = [f"{output}: schedule {manifest.schedule}, order {manifest.order}"]
    for name, role in manifest.roles.items():
        _, cfg = bundle.role_config(manifest, name)
        count = kinds.parameter_count(role.kind, cfg) / 1e6
        size = f"{role.source['bytes'] / 1e6:,.1f} MB" if "bytes" in role.source else ""
        where = (
            f"stays in {role.path}" if role.path != name else f"{size} from {role.source['name']}"
        )
        lines.append(f"  {name:15} {role.kind:19} {count:10,.1f} M parameters  {where}")
    if absent := [name for name in bundle.ROLES if name not in manifest.roles]:
        lines.append(
            f"still without {', '.join(absent)}: to sample, convert with these too, or with"
            " --encoders-from a bundle that has them"
        )
    cfg = manifest.roles["transformer"].config if "transformer" in manifest.roles else None
    if cfg and not cfg["context_kernels"]:
        lines.append(
            "note: the transformer is no FramePack model (it embeds no context); --from-base"
            " begins one from it"
        )
    return "\n".join(lines)


def _paths(flags: Convert) -> dict[str, Path]:
    """Where each role comes from: its own flag, else the pipeline."""
    paths = {}
    if flags.pipeline:
        index = flags.pipeline / "model_index.json"
        if not index.exists():
            raise ConversionError(
                f"{flags.pipeline} is no diffusers pipeline (it has no {index.name}); give single"
                " networks with --transformer, --vae and so on"
            )
        held = readers.read_json(index)
        paths = {r: flags.pipeline / r for r in bundle.ROLES if any(held.get(r) or ())}
    paths |= {role: path for role in bundle.ROLES if (path := getattr(flags, role))}
    if not paths:
        raise ConversionError(
            "nothing to convert: give --pipeline, or --transformer, --vae, --text-encoder,"
            " --text-encoder-2 or --image-encoder"
        )
    return {role: paths[role] for role in bundle.ROLES if role in paths}


def _check_output(
    flags: Convert, output: epath.Path, paths: dict[str, Path], shared: Manifest | None
) -> None:
    """Never write over anything but a bundle, nor over what is read."""
    finished = (output / bundle.MANIFEST).exists()
    if finished and not flags.overwrite:
        raise ConversionError(
            f"{output} holds a bundle; choose another --output, or replace it with --overwrite"
        )
    ours = finished or not output.exists() or (output / UNFINISHED).exists()
    if not ours and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} is no bundle and not empty; choose another --output")
    read = list(paths.values())
    if shared:
        read += [Path(flags.encoders_from) / role.path for role in shared.roles.values()]
    for path in read:
        if path.resolve().is_relative_to(Path(flags.output).resolve()):
            raise ConversionError(f"{path} lies in {output}, which would be replaced")


def _clear(output: epath.Path) -> None:
    """Take away an old bundle, its manifest first."""
    output.mkdir(parents=True, exist_ok=True)
    (output / UNFINISHED).write_text("convert_weights.py did not finish; run it again\n")
    (output / bundle.MANIFEST).unlink(missing_ok=True)
    for name in (*bundle.ROLES, *assets.MARKERS):
        if (output / name).exists():
            (output / name).rmtree()


def _plans(
    flags: Convert, paths: dict[str, Path], shared: Manifest | None
) -> dict[str, engine.Plan]:
    """Open, recognise and check every network; the transformer last, as it may need the width of
    the image encoder."""
    plans = {}
    for role in sorted(paths, key=lambda role: role == "transformer"):
        source = tables.recognise(readers.open_checkpoint(paths[role]), role)
        if role == "transformer":
            source = _transformer_source(flags, source, plans, shared)
        plans[role] = engine.plan(source)
    return {role: plans[role] for role in paths}


def _transformer_source(
    flags: Convert, source: engine.Source, plans: dict[str, engine.Plan], shared: Manifest | None
) -> engine.Source:
    given = {"rope_axes": _rope_axes(flags.rope_axes)} if flags.rope_axes else {}
    table = source.table
    if flags.from_base:
        width = DEFAULT_IMAGE_DIM
        if "image_encoder" in plans:
            width = plans["image_encoder"].cfg.width
        elif shared and "image_encoder" in shared.roles:
            width = bundle.role_config(shared, "image_encoder")[1].width
        kernels = context_kernels(flags.schedule)
        table = transformer.from_base(table, kernels, flags.image_dim or width)
    return dataclasses.replace(source, table=table, given=given)


def _rope_axes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConversionError(f"--rope-axes {text}: expected three numbers, as 16,56,56") from error


def _manifest(flags: Convert, plans: dict[str, engine.Plan], shared: Manifest | None) -> Manifest:
    """The manifest of the bundle to be. Raises ConversionError where its parts do not fit."""
    roles = {name: _role(name, plan) for name, plan in plans.items()}
    for name, role in (shared.roles if shared else {}).items():
        path = _reference(epath.Path(flags.encoders_from) / role.path, flags.output)
        roles.setdefault(name, dataclasses.replace(role, path=path))
    roles = {name: roles[name] for name in bundle.ROLES if name in roles}
    mean, std = (shared.latent_mean, shared.latent_std) if shared else _statistics(None, roles)
    if "vae" in plans:
        mean, std = _statistics(plans["vae"].source.checkpoint.config(), roles)
    template = flags.prompt_template or (shared.prompt_template if shared else PROMPT_TEMPLATE)
    if template.count("{}") != 1:
        raise ConversionError(f"--prompt-template {template!r}: expected one {{}} for the prompt")
    order = packing.default_order(flags.schedule)
    manifest = Manifest(roles, mean, std, template, flags.schedule, order)
    _check_parts(manifest)
    return manifest


def _role(name: str, plan: engine.Plan) -> Role:
    source = {**plan.source.checkpoint.source(), "naming": plan.source.table.what}
    return Role(plan.source.table.kind, dataclasses.asdict(plan.cfg), name, source)


def _reference(path: epath.Path, output: str) -> str:
    """A path as seen from the new bundle."""
    remote = "://" in f"{path}{output}"
    return (
        str(path) if remote else os.path.relpath(os.path.realpath(path), os.path.realpath(output))
    )


def _statistics(fields: dict[str, Any] | None, roles: dict[str, Role]) -> tuple[Any, Any]:
    channels = [
        roles[name].config[field]
        for name, field in (("vae", "latent_channels"), ("transformer", "in_channels"))
        if name in roles
    ]
    return vae.latent_statistics(fields, channels[0] if channels else 0)


def _check_parts(manifest: Manifest) -> None:
    """Networks that do not fit each other, or the schedule, are told now and not when sampling."""
    if "transformer" not in manifest.roles:
        return
    reader = manifest.roles["transformer"].config
    for name, (made, read) in WIDTHS.items():
        if name not in manifest.roles or reader[read] is None:
            continue
        width = manifest.roles[name].config[made]
        if width != reader[read]:
            raise ConversionError(
                f"{name} has {made} {width}, but the transformer has {read} {reader[read]}: they"
                " do not belong together"
            )
    wanted = set(context_kernels(manifest.schedule))
    if reader["context_kernels"] and (absent := sorted(wanted - set(reader["context_kernels"]))):
        raise ConversionError(
            f"schedule {manifest.schedule} needs kernels {', '.join(absent)}; the transformer has"
            f" {', '.join(reader['context_kernels'])}"
        )


def _progress(name: str, plan: engine.Plan, dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a plan, behind a bar of their bytes."""
    leaves: Iterable[tuple[str, np.ndarray]] = plan.leaves(dtype)
    with tqdm(total=plan.nbytes(dtype), desc=name, unit="B", unit_scale=True) as bar:
        for path, array in leaves:
            yield path, array
            bar.update(array.nbytes)
