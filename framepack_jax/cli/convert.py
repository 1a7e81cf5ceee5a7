"""`framepack convert`: PyTorch checkpoints become a bundle, and bundles become checkpoints."""

import ctypes
import dataclasses
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest, Role
from framepack_jax.cli.export import byte_bar, compare, export_lora, export_role
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.conversion import (
    engine,
    hub,
    inspect,
    tables,
    tokenizers,
    transformer,
    vae,
    verify,
    weight_files,
)
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import quantization, registry
from framepack_jax.models.hunyuan.config import context_kernels
from framepack_jax.models.lora import file_of
from framepack_jax.utils.flags import parse
from framepack_jax.utils.messages import shorten

Dtype = Literal[
    "float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "fp32", "bf16", "fp16", "fp8"
]  # fmt: skip
SHORT_DTYPES = {short: name for name, short in inspect.DTYPE_NAMES.items()}
# The flags that each thing to do reads; --output reads all that are not of another.
READ = {
    "inspect": set(),
    "verify": {"prefix"},
    "export": {"bundle", "role", "names", "lora", "dtype"},
}
DEFAULT_IMAGE_DIM = 1152
# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# What one network makes has the width that the transformer reads.
WIDTHS = {
    "text_encoder": ("width", "text_dim"),
    "text_encoder_2": ("width", "pooled_dim"),
    "image_encoder": ("width", "image_dim"),
    "vae": ("latent_channels", "in_channels"),
}


@dataclasses.dataclass(frozen=True)
class Convert:
    """Make a bundle of PyTorch checkpoints; or --verify one, or --export its networks.

    Networks come from a diffusers pipeline folder, from single files or folders, or stay in
    another bundle that the new one points to. All of them are checked before the first byte is
    written. A path may also name a repository of the Hugging Face hub, as owner/name or
    owner/name/folder; what is fetched stays in the hub's cache. A bundle is a folder, or one of
    this package by its name (tiny, random).
    """

    output: str | None = None
    """Folder of the new bundle."""
    framepack: Literal["i2v", "f1"] | None = None
    """Fetch a released FramePack model from the hub, all that it needs and its schedule; with
    --encoders-from a bundle of the other one, its transformer alone. What is named below replaces
    its part."""
    pipeline: Path | None = None
    """A diffusers pipeline folder (with model_index.json), or a single file with several networks,
    as ComfyUI's checkpoints are; networks named below replace its own."""
    transformer: Path | None = None
    """FramePack or HunyuanVideo transformer: a file (.safetensors, .pt) or a folder with one, whole
    or sharded; in diffusers', Tencent's or ComfyUI's naming, fp8 weights too."""
    vae: Path | None = None
    """HunyuanVideo VAE, file or folder; in diffusers', Tencent's or ComfyUI's naming."""
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
    prefix: str | None = None
    """Prefix of the tensors to take if a file holds several sets of weights of one network, such as
    plain and averaged ones (EMA); all other prefixes are found and taken off."""
    encoders_from: str | None = None
    """A bundle whose networks serve for all that are not given; they are pointed to, not copied."""
    dtype: Dtype | None = None
    """Type in which all weights are stored; default: as they come. int8 and float8_e4m3fn (fp8)
    quantize the kernels in the blocks of transformer and encoders, by output channel, and keep the
    rest as it comes."""
    schedule: str | None = None
    """Packing schedule that the transformer is made for (FramePack-F1: f1k1_x_f16k4f2k2f1k1_g9);
    default: that of the released model, or of the bundle that the transformer stays in; else
    f1k1_x_g9_f1k1f2k2f16k4_td."""
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
    verify: tuple[Path, str] | None = None
    """SOURCE BUNDLE: compare the networks that a pipeline folder or checkpoint and a bundle both
    have, tensor by tensor, bit for bit; exit code 1 where any differs."""
    inspect: str | None = None
    """Say what a checkpoint, LoRA file, pipeline folder or bundle is, without converting it."""
    export: Path | None = None
    """Write a network of --bundle for PyTorch: to a .safetensors file, else to a folder as
    diffusers' and transformers' from_pretrained takes it."""
    bundle: str | None = None
    """The bundle that --export reads."""
    role: Literal["transformer", "vae", "text_encoder_2", "image_encoder"] = "transformer"
    """The network that --export writes."""
    names: str | None = None
    """Tensor names of an exported file: diffusers, original, which ComfyUI takes too, or comfyui,
    those that it goes by itself; default: original, but for FramePack models, which have names in
    diffusers' naming only. Of a LoRA: diffusers; original, which all programs read; kohya, as
    musubi-tuner writes it, or kohya-tencent; comfyui."""
    lora: Path | None = None
    """A LoRA file, or a training run of one, that --export writes again, in other --names, for the
    transformer of --bundle or else the released one."""


def main(args: list[str] | None = None, prog: str = "convert_weights.py") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = _spelt_out(parse(Convert, args, prog))
    began = time.monotonic()
    try:
        same = _run(flags)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{time.monotonic() - began:.1f} s in all")
    if not same:
        raise SystemExit(1)


def _spelt_out(flags: Convert) -> Convert:
    """Return the flags with full names of types, the dot that ends a prefix, and folders for
    bundles of this package."""
    prefix = flags.prefix and f"{flags.prefix.removesuffix('.')}."
    bundles = {
        name: str(bundle.resolve(given))
        for name in ("encoders_from", "bundle", "inspect")
        if (given := getattr(flags, name))
    }
    if flags.verify:
        bundles["verify"] = (flags.verify[0], str(bundle.resolve(flags.verify[1])))
    dtype = SHORT_DTYPES.get(flags.dtype, flags.dtype)
    return dataclasses.replace(flags, dtype=dtype, prefix=prefix, **bundles)


def _run(flags: Convert) -> bool:
    """Do what the flags ask and print what came of it; False where --verify found a difference."""
    asked = [name for name in ("output", "verify", "inspect", "export") if getattr(flags, name)]
    if len(asked) != 1:
        raise ConversionError(
            f"{' and '.join(f'--{name}' for name in asked) or 'nothing to do'}: give one of"
            " --output (the folder of a bundle to make), --verify, --inspect and --export"
        )
    _check_read(flags, asked[0])
    if flags.inspect:
        print(inspect.describe(Path(flags.inspect)))
        return True
    if flags.verify:
        results = compare(*flags.verify, flags.prefix)
        print(verify.table(results))
        return not any(result.differing for result in results)
    if flags.export:
        print(_export(flags))
        return True
    manifest = convert(flags)
    print(summary(flags.output, manifest, assumed=_is_assumed(flags, manifest)))
    return True


def _export(flags: Convert) -> str:
    if flags.lora is None:
        return export_role(flags.bundle, flags.role, flags.export, flags.names, flags.dtype)
    if flags.dtype or flags.role != "transformer":
        raise ConversionError(
            "--lora is of the transformer and keeps its types; leave out --dtype and --role"
        )
    return export_lora(Path(file_of(flags.lora)), flags.export, flags.names, flags.bundle)


def _check_read(flags: Convert, asked: str) -> None:
    """Refuse, by name, flags that what is asked for would not look at."""
    fields = dataclasses.fields(flags)
    given = {f.name for f in fields if getattr(flags, f.name) != f.default} - {asked}
    ignored = given - READ[asked] if asked in READ else given & (READ["export"] - {"dtype"})
    if ignored:
        names = ", ".join(map(_flag, sorted(ignored)))
        raise ConversionError(f"--{asked} does not read {names}; leave out one or the other")
    if flags.framepack and flags.pipeline:
        raise ConversionError(
            f"--framepack {flags.framepack} brings all that --pipeline {flags.pipeline} has; give"
            " one of the two, and single networks by their own flags"
        )
    if flags.image_dim is not None and not flags.from_base:
        raise ConversionError(
            f"--image-dim {flags.image_dim} is of the image projection that --from-base makes; a"
            " checkpoint brings its own: leave it out"
        )


def convert(flags: Convert) -> Manifest:
    """Write the bundle of `flags`; returns its manifest. Raises ConversionError, BundleError,
    ScheduleError, before anything is written where the input does not fit."""
    output = epath.Path(flags.output)
    shared = bundle.read_manifest(flags.encoders_from) if flags.encoders_from else None
    _check_output(flags, output)
    flags, origins = _fetched(flags)
    paths = _paths(flags)
    if shared:
        bundle.check_present(flags.encoders_from, [r for r in shared.roles if r not in paths])
    _check_apart(flags, output, paths, shared)
    schedule = _scheduled(flags, origins.get("transformer"), paths, shared)
    plans = _plans(flags, schedule, paths, shared)
    files = _files(flags, paths, plans)
    manifest = _manifest(flags, schedule, plans, shared, origins)
    _check_space(flags, plans)

    _keep_freed_memory()
    _clear(output)
    roles = dict(manifest.roles)
    for name, plan in plans.items():
        written = bundle.write_params(output / name, _progress(name, plan, flags.dtype))
        source = {**roles[name].source, **written._asdict()}
        roles[name] = dataclasses.replace(roles[name], source=source)
    if shared:
        names = tokenizers.MARKERS.keys() - files.keys()
        kept = {name: epath.Path(flags.encoders_from) / name for name in names}
        files |= {name: folder for name, folder in kept.items() if folder.exists()}
    for name, folder in files.items():
        tokenizers.copy(name, folder, output)
    bundle.write_manifest(output, dataclasses.replace(manifest, roles=roles))
    (output / bundle.UNFINISHED).unlink()
    return bundle.read_manifest(output)


def summary(output: epath.PathLike, manifest: Manifest, *, assumed: bool = False) -> str:
    """What was written, and what a person must know about it; `assumed` where nothing told which
    schedule the transformer is made for."""
    said = " (schedule assumed; give --schedule if it is made for another)" if assumed else ""
    lines = [f"{output}: schedule {manifest.schedule}, order {manifest.schedule.order}{said}"]
    for name, role in manifest.roles.items():
        _, cfg = bundle.role_config(manifest, name)
        count = registry.parameter_count(role.kind, cfg) / 1e6
        lines.append(
            f"  {name:15} {role.kind:19} {count:10,.1f} M parameters  {_where(name, role)}"
        )
    if absent := [name for name in bundle.ROLES if name not in manifest.roles]:
        lines.append(
            f"still without {', '.join(absent)}: to sample, convert with"
            f" {', '.join(map(_flag, absent))} too, or with --encoders-from a bundle that has them"
        )
    for name, role in manifest.roles.items():
        if role.path == name and (also := role.source.get("also_holds")):
            lines.append(
                f"note: {role.source['name']} also holds {', '.join(also)}; to take all of it, give"
                " it as --pipeline"
            )
    cfg = manifest.roles["transformer"].config if "transformer" in manifest.roles else None
    if cfg and not cfg["context_kernels"]:
        lines.append(
            "note: the transformer is no FramePack model (it embeds no context); --from-base"
            " begins one from it"
        )
    return "\n".join(lines)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _where(name: str, role: Role) -> str:
    """What a network was made of, or the bundle that it stays in."""
    if role.path != name:
        return f"stays in {role.path}"
    source = role.source
    how = [source["naming"], source["format"]]
    if prefix := source.get("prefix"):
        how.append(f"prefix {prefix} taken off")
    if unknown := source.get("left_out"):
        how.append(f"{unknown} left out")
    return f"{source['bytes'] / 1e6:,.1f} MB from {source['name']} ({'; '.join(how)})"


def _fetched(flags: Convert) -> tuple[Convert, dict[str, str]]:
    """The flags with paths here for what they take from the hub, and the parts that come from there
    with the names that they have there. Raises ConversionError."""
    names = ("pipeline", *bundle.ROLES, *tokenizers.MARKERS)
    given = {name: hub.split(str(path)) for name in names if (path := getattr(flags, name))}
    if flags.framepack:
        released = hub.FRAMEPACK[flags.framepack]
        fetched = ["transformer"] if flags.encoders_from else list(released)
        given = {name: released[name] for name in fetched} | given
    remote = {name: there for name, there in given.items() if there}
    if len(remote) > 1:
        output = None if "://" in flags.output else Path(flags.output)
        hub.check_space(remote, output, 0.5 if flags.dtype in quantization.QUANTIZED else 1.0)
    paths = {n: hub.fetch(*there, pipeline=n == "pipeline") for n, there in remote.items()}
    origins = {name: "/".join(filter(None, there)) for name, there in remote.items()}
    return dataclasses.replace(flags, **paths), origins


def _scheduled(
    flags: Convert, origin: str | None, paths: dict[str, Path], shared: Manifest | None
) -> packing.Schedule:
    """Return the schedule that the transformer is made for: that of --schedule, else of the bundle
    that it stays in, else of the released model, by --framepack or by its name on the hub."""
    stays = shared and "transformer" in shared.roles and "transformer" not in paths
    if stays and flags.schedule in (None, str(shared.schedule)):
        return shared.schedule
    released = _released(flags.framepack, origin) or packing.RELEASED_INVERTED
    return packing.parse(flags.schedule or released)


def _released(framepack: str | None, origin: str | None) -> str | None:
    """The schedule of a released transformer, None for others."""
    named = {parts["transformer"][0]: model for model, parts in hub.FRAMEPACK.items()}
    return hub.SCHEDULES.get(framepack or named.get(origin))


def _is_assumed(flags: Convert, manifest: Manifest) -> bool:
    """Whether the schedule is the default for want of anything that tells it."""
    role = manifest.roles.get("transformer")
    if role is None or role.path != "transformer" or flags.schedule or flags.from_base:
        return False
    return _released(flags.framepack, role.source["name"]) is None


def _files(flags: Convert, paths: dict[str, Path], plans: Iterable[str]) -> dict[str, Path]:
    """Return the folders of the tokenizers and the image processor that the bundle takes, by name.
    Raises one ConversionError for all that are missing."""
    files, problems = {}, []
    for role, name in tokenizers.FOLDERS.items():
        given = getattr(flags, name)
        if role not in plans and not given:
            continue
        try:
            files[name] = tokenizers.find(role, paths.get(role), given)
        except ConversionError as error:
            released = "/".join(filter(None, hub.SHARED[name]))
            problems.append(f"{error}; that of the released models is {released}")
    if problems:
        raise ConversionError("\n".join(problems))
    return files


def _paths(flags: Convert) -> dict[str, Path]:
    """Where each role comes from: its own flag, else the pipeline."""
    paths = _pipeline_paths(flags.pipeline) if flags.pipeline else {}
    paths |= {role: path for role in bundle.ROLES if (path := getattr(flags, role))}
    if not paths:
        raise ConversionError(
            "nothing to convert: give --framepack, --pipeline, --transformer, --vae,"
            " --text-encoder, --text-encoder-2 or --image-encoder"
        )
    return {role: paths[role] for role in bundle.ROLES if role in paths}


def _pipeline_paths(pipeline: Path) -> dict[str, Path]:
    """Return where each role of a pipeline is: a folder of it, or the file that holds them all."""
    if not pipeline.is_dir():
        if held := tables.networks(weight_files.open_checkpoint(pipeline)):
            return dict.fromkeys(held, pipeline)
        raise ConversionError(
            f"{pipeline} holds no network that is known by its tensors; see what it is with"
            f" --inspect {pipeline}"
        )
    index = pipeline / "model_index.json"
    if not index.exists():
        raise ConversionError(
            f"{pipeline} is no diffusers pipeline (it has no {index.name}); give single networks"
            " with --transformer, --vae and so on"
        )
    held = weight_files.read_json(index)
    return {role: pipeline / role for role in bundle.ROLES if any(held.get(role) or ())}


def _keep_freed_memory() -> None:
    """Let the C library keep large buffers that are freed, for the next, in whichever thread: pages
    that come new from the system cost more than what is done with them."""
    try:
        allocator = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library than glibc
    allocator(M_MMAP_MAX, 0)
    allocator(M_ARENA_MAX, 1)
    allocator(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _check_output(flags: Convert, output: epath.Path) -> None:
    """Never write over anything but a bundle."""
    stopped = (output / bundle.UNFINISHED).exists()
    finished = (output / bundle.MANIFEST).exists() and not stopped
    if finished and not flags.overwrite:
        raise ConversionError(
            f"{output} holds a bundle; choose another --output, or replace it with --overwrite"
        )
    ours = finished or stopped or not output.exists()
    if not ours and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} is no bundle and not empty; choose another --output")


def _check_apart(
    flags: Convert, output: epath.Path, paths: dict[str, Path], shared: Manifest | None
) -> None:
    """Nor over what is read."""
    read = list(paths.values())
    if shared:
        read += [Path(flags.encoders_from) / role.path for role in shared.roles.values()]
    for path in read:
        if path.resolve().is_relative_to(Path(flags.output).resolve()):
            raise ConversionError(f"{path} lies in {output}, which would be replaced")


def _check_space(flags: Convert, plans: dict[str, engine.ConversionJob]) -> None:
    """Raise ConversionError where the disk is too small; an object store has no end."""
    if "://" in flags.output:
        return
    output = Path(flags.output)
    # What an earlier bundle there takes is given back before the first byte is written.
    old = [file for part in _parts(output) for file in Path(part).rglob("*") if file.is_file()]
    needed = sum(plan.nbytes(flags.dtype) for plan in plans.values())
    engine.check_space(output, needed, sum(file.stat().st_size for file in old))


def _clear(output: epath.Path) -> None:
    """Take away an old bundle, its manifest first."""
    output.mkdir(parents=True, exist_ok=True)
    (output / bundle.UNFINISHED).write_text("convert_weights.py did not finish; run it again\n")
    (output / bundle.MANIFEST).unlink(missing_ok=True)
    for part in _parts(output):
        part.rmtree()


def _parts(output: epath.Path) -> list[epath.Path]:
    """The folders of a bundle, and those that a stopped run left (`role.partial_save` and what
    orbax puts behind it)."""
    if not output.exists():
        return []
    names = "|".join((*bundle.ROLES, *tokenizers.MARKERS))
    pattern = re.compile(rf"({names})(\.partial_save.*)?")
    return [part for part in output.iterdir() if pattern.fullmatch(part.name)]


def _plans(
    flags: Convert,
    schedule: packing.Schedule,
    paths: dict[str, Path],
    shared: Manifest | None,
) -> dict[str, engine.ConversionJob]:
    """Open, recognise and check every network; the transformer last, as it may need the width of
    the image encoder."""
    plans = {}
    for role in sorted(paths, key=lambda role: role == "transformer"):
        source = tables.recognise(weight_files.open_checkpoint(paths[role]), role, flags.prefix)
        if shared and role in shared.roles:
            source = dataclasses.replace(source, like=bundle.role_config(shared, role)[1])
        if role == "transformer":
            source = _transformer_source(flags, schedule, source, plans, shared)
        plans[role] = engine.plan(source)
    tables.check_prefix(flags.prefix, [plan.source for plan in plans.values()])
    return {role: plans[role] for role in paths}


def _transformer_source(
    flags: Convert,
    schedule: packing.Schedule,
    source: engine.Source,
    plans: dict[str, engine.ConversionJob],
    shared: Manifest | None,
) -> engine.Source:
    given = {"rope_axes": _rope_axes(flags.rope_axes)} if flags.rope_axes else {}
    table = source.table
    if flags.from_base:
        width = DEFAULT_IMAGE_DIM
        if "image_encoder" in plans:
            width = plans["image_encoder"].cfg.width
        elif shared and "image_encoder" in shared.roles:
            width = bundle.role_config(shared, "image_encoder")[1].width
        kernels = context_kernels(schedule)
        table = transformer.from_base(table, kernels, flags.image_dim or width)
    return dataclasses.replace(source, table=table, given=given)


def _rope_axes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConversionError(f"--rope-axes {text}: expected three numbers, as 16,56,56") from error


def _manifest(
    flags: Convert,
    schedule: packing.Schedule,
    plans: dict[str, engine.ConversionJob],
    shared: Manifest | None,
    origins: dict[str, str],
) -> Manifest:
    """The manifest of the bundle to be. Raises ConversionError where its parts do not fit."""
    roles = {name: _role(name, plans, origins.get(name)) for name in plans}
    for name, role in (shared.roles if shared else {}).items():
        path = bundle.reference(epath.Path(flags.encoders_from) / role.path, flags.output)
        roles.setdefault(name, dataclasses.replace(role, path=path))
    roles = {name: roles[name] for name in bundle.ROLES if name in roles}
    mean, std = (shared.latent_mean, shared.latent_std) if shared else _statistics(None, roles)
    if "vae" in plans:
        mean, std = _statistics(plans["vae"].source.config_json(), roles)
    template = flags.prompt_template or (shared.prompt_template if shared else PROMPT_TEMPLATE)
    if template.count("{}") != 1:
        raise ConversionError(f"--prompt-template {template!r}: expected one {{}} for the prompt")
    manifest = Manifest(roles, mean, std, template, schedule)
    if shared and "transformer" not in plans:
        manifest = dataclasses.replace(manifest, buckets=shared.buckets)
    _check_parts(manifest)
    return manifest


def _role(name: str, plans: dict[str, engine.ConversionJob], origin: str | None) -> Role:
    plan = plans[name]
    source = {**plan.source.checkpoint.source(), "naming": plan.source.table.what}
    more = {
        "prefix": plan.source.prefix,
        "left_out": shorten(plan.source.left_out()),
        "also_holds": _not_taken(plan.source.checkpoint, plans),
    }
    source |= {field: value for field, value in more.items() if value}
    # A folder in the hub's cache is named by its commit.
    source["name"] = origin or source["name"]
    return Role(plan.source.table.kind, dataclasses.asdict(plan.cfg), name, source)


def _not_taken(
    checkpoint: weight_files.Checkpoint, plans: dict[str, engine.ConversionJob]
) -> list[str]:
    """Return the roles of the networks in a checkpoint that are not taken from it."""
    taken = {role for role, plan in plans.items() if plan.source.checkpoint.path == checkpoint.path}
    return [role for role in tables.networks(checkpoint) if role not in taken]


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


def _progress(
    name: str, plan: engine.ConversionJob, dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a plan, behind a bar of their bytes."""
    with byte_bar(name, plan.nbytes(dtype)) as bar:
        for path, array in plan.leaves(dtype):
            yield path, array
            bar.update(array.nbytes)
