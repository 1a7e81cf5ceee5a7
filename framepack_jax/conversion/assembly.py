"""Fit the networks of a bundle, and assemble its manifest."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from framepack_jax import bundle, packing
from framepack_jax.bundle import Manifest, Role
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.conversion import latent_statistics, tables, weight_files
from framepack_jax.conversion.engine import ConversionJob, Source, make_job
from framepack_jax.conversion.pipeline_index import PipelineSettings
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import Checkpoint, ConversionError
from framepack_jax.models import registry
from framepack_jax.models.hunyuan import vae as hunyuan_vae
from framepack_jax.models.hunyuan.config import VaeConfig
from framepack_jax.models.network_spec import LatentStatistics
from framepack_jax.models.packed_video import context_kernels
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS
from framepack_jax.utils.messages import shorten

# Kind of text encoder -> prompt template and text tokens of the released transformers that read it.
PROMPTS = {"llama": (PROMPT_TEMPLATE, MAX_PROMPT_TOKENS), "umt5": ("{}", 512)}
# Role -> (config field of its output width, config field of the transformer's input width).
WIDTHS = {
    "text_encoder": ("width", "text_dim"),
    "text_encoder_2": ("width", "pooled_dim"),
    "image_encoder": ("width", "image_dim"),
    "vae": ("latent_channels", "in_channels"),
}


def find_networks(
    request: BundleRequest, paths: Mapping[str, Path], shared: Manifest | None
) -> dict[str, Source]:
    """Open and recognise every network. Raises ConversionError."""
    networks = {
        role: tables.recognise(weight_files.open_checkpoint(path), role, request.prefix)
        for role, path in paths.items()
    }
    for role, source in networks.items():
        if shared and role in shared.roles and shared.roles[role].kind == source.table.kind:
            like = bundle.role_config(shared, role)[1]
            networks[role] = dataclasses.replace(source, like=like)
    if request.rope_axes and "transformer" in networks:
        given = {"rope_axes": _rope_axes(request.rope_axes)}
        networks["transformer"] = dataclasses.replace(networks["transformer"], overrides=given)
    return networks


def fit_networks(
    request: BundleRequest,
    networks: Mapping[str, Source],
    schedule: packing.Schedule,
    shared: Manifest | None,
) -> dict[str, ConversionJob]:
    """Check every network. Raises ConversionError.

    The transformer comes last, as it may need the width of the image encoder.
    """
    jobs: dict[str, ConversionJob] = {}
    for role in sorted(networks, key=lambda role: role == "transformer"):
        source = networks[role]
        if role == "transformer" and request.from_base:
            width = request.image_dim or _image_width(jobs, shared)
            from_base = tables.FROM_BASE[source.table.kind]
            table = from_base(source.table, context_kernels(schedule), width)
            source = dataclasses.replace(source, table=table)
        jobs[role] = make_job(source)
    tables.check_prefix(request.prefix, [job.source for job in jobs.values()])
    return {role: jobs[role] for role in networks}


def _image_width(jobs: Mapping[str, ConversionJob], shared: Manifest | None) -> int | None:
    """Return the width of the image encoder's tokens, None if there is none."""
    if "image_encoder" in jobs:
        return jobs["image_encoder"].cfg.width
    if shared and "image_encoder" in shared.roles:
        return bundle.role_config(shared, "image_encoder")[1].width
    return None


def _rope_axes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConversionError(
            f"--rope-axes {text}: expected three numbers, such as 16,56,56"
        ) from error


def assemble_manifest(
    request: BundleRequest,
    schedule: packing.Schedule,
    jobs: Mapping[str, ConversionJob],
    shared: Manifest | None,
    origins: Mapping[str, str],
    settings: PipelineSettings,
) -> Manifest:
    """Return the manifest of a new bundle, whose transformer is sampled by `settings`.

    Raises ConversionError if its parts do not fit.
    """
    roles = {name: _role(name, jobs, _origin(name, request, origins)) for name in jobs}
    if shared and request.encoders_from:
        for name, role in shared.roles.items():
            there = bundle.referenced(request.encoders_from, role.path)
            path = bundle.reference(there, request.output)
            roles.setdefault(name, dataclasses.replace(role, path=path))
    roles = {name: roles[name] for name in bundle.ROLES if name in roles}
    mean, std = (shared.latent_mean, shared.latent_std) if shared else _default_statistics(roles)
    if "vae" in jobs:
        mean, std = _statistics(jobs["vae"])
    template, tokens = _prompts(request, roles, shared)
    manifest = Manifest(roles, mean, std, template, schedule, text_tokens=tokens)
    sampled: Manifest | PipelineSettings = settings
    if shared and "transformer" not in jobs:
        sampled = shared
    manifest = dataclasses.replace(manifest, buckets=sampled.buckets, sampling=sampled.sampling)
    _check_widths(manifest)
    _check_kernels(request, manifest)
    return manifest


def _origin(name: str, request: BundleRequest, origins: Mapping[str, str]) -> str | None:
    """Return the name on the hub of a role's checkpoint, None if it comes from elsewhere."""
    if "pipeline" in origins and getattr(request, name) is None:
        return f"{origins['pipeline']}/{name}"
    return origins.get(name)


def _role(name: str, jobs: Mapping[str, ConversionJob], origin: str | None) -> Role:
    job = jobs[name]
    source = {**job.source.checkpoint.source(), "naming": job.source.table.description}
    more = {
        "prefix": job.source.prefix,
        "left_out": shorten(job.source.left_out()),
        "also_holds": _not_taken(job.source.checkpoint, jobs),
    }
    source |= {field: value for field, value in more.items() if value}
    # A folder in the hub's cache has the name of its commit.
    source["name"] = origin or source["name"]
    return Role(job.source.table.kind, dataclasses.asdict(job.cfg), name, source)


def _not_taken(checkpoint: Checkpoint, jobs: Mapping[str, ConversionJob]) -> list[str]:
    """Return the roles of a checkpoint's networks that the bundle takes from elsewhere."""
    taken = {role for role, job in jobs.items() if job.source.checkpoint.path == checkpoint.path}
    return [role for role in tables.networks(checkpoint) if role not in taken]


def _prompts(
    request: BundleRequest, roles: Mapping[str, Role], shared: Manifest | None
) -> tuple[str, int]:
    """Return the prompt template and the text tokens: of the request, of the `shared` bundle if it
    has a text encoder of the same kind, or of the released models. Raises ConversionError."""

    def kind(roles: Mapping[str, Role]) -> str:
        return roles["text_encoder"].kind if "text_encoder" in roles else "llama"

    template, tokens = PROMPTS[kind(roles)]
    if shared and kind(shared.roles) == kind(roles):
        template, tokens = shared.prompt_template, shared.text_tokens
    template = request.prompt_template or template
    tokens = tokens if request.text_tokens is None else request.text_tokens
    if template.count("{}") != 1:
        raise ConversionError(f"--prompt-template {template!r}: expected one {{}} for the prompt")
    if tokens < 1:
        raise ConversionError(f"--text-tokens {tokens}: expected 1 or more")
    return template, tokens


def _statistics(job: ConversionJob) -> LatentStatistics:
    """Return mean and standard deviation of each latent channel of a VAE."""
    spec = registry.NETWORKS[job.source.table.kind]
    assert isinstance(spec, registry.VaeSpec)
    return latent_statistics.read(job.source.config_json(), spec, job.cfg)


def _default_statistics(roles: Mapping[str, Role]) -> LatentStatistics:
    """Return the statistics of a bundle without a VAE: those of HunyuanVideo's."""
    transformer = roles.get("transformer")
    channels = transformer.config["in_channels"] if transformer else 0
    return hunyuan_vae.latent_statistics(VaeConfig(latent_channels=channels))


def _check_widths(manifest: Manifest) -> None:
    """Raise ConversionError if a network has another width than the transformer reads."""
    if "transformer" not in manifest.roles:
        return
    reader = manifest.roles["transformer"].config
    for name, (made, read) in WIDTHS.items():
        if name not in manifest.roles or reader.get(read) is None:
            continue
        width = manifest.roles[name].config[made]
        if width != reader[read]:
            raise ConversionError(
                f"{name} has {made} {width}, but the transformer has {read} {reader[read]}: they"
                " do not belong together"
            )


def _check_kernels(request: BundleRequest, manifest: Manifest) -> None:
    """Raise ConversionError if the transformer lacks a context kernel of the schedule.

    A base model, which has none, may have a schedule that nobody asked for.
    """
    if "transformer" not in manifest.roles:
        return
    kernels = manifest.roles["transformer"].config["context_kernels"]
    wanted = set(context_kernels(manifest.schedule))
    absent = sorted(wanted - set(kernels))
    if absent and kernels:
        raise ConversionError(
            f"schedule {manifest.schedule} needs kernels {', '.join(absent)}; the transformer has"
            f" {', '.join(kernels)}"
        )
    if absent and request.schedule:
        raise ConversionError(
            f"--schedule {request.schedule} has context, and the transformer is a base model that"
            " embeds none; make a packed model of it with --from-base, or give a schedule without"
            " context, such as g21"
        )
