"""Write a model card: YAML front matter and a README, of what the files record."""

from huggingface_hub import ModelCardData

from framepack_jax import bundle
from framepack_jax.publishing.artifact import Artifact, command
from framepack_jax.publishing.facts import Facts
from framepack_jax.publishing.licences import Licence, licence_of
from framepack_jax.utils.versions import version

UNKNOWN = "unknown"
LIBRARY = "framepack-jax"
TITLES = {"bundle": "bundle", "LoRA": "LoRA", "network": "network for diffusers or transformers"}


def card(artifact: Artifact, facts: Facts, repo_id: str) -> str:
    """Return the text of README.md."""
    role = facts.networks[0].role if facts.networks else "transformer"
    licence = licence_of(facts.base, role)
    lines = [
        f"---\n{_front_matter(artifact, facts, licence)}\n---",
        f"# {repo_id.partition('/')[2]}",
        f"A {TITLES[artifact.kind]} of framepack-jax {version(LIBRARY)}. This page was made of what"
        " the files record; edit it as you like.",
        _table(facts, licence),
    ]
    if facts.networks:
        head = ["| network | kind | source | licence |", "|---|---|---|---|"]
        rows = [
            f"| {n.role} | {n.kind} | {n.source or UNKNOWN} |"
            f" {licence_of(n.base, n.role) or UNKNOWN} |"
            for n in facts.networks
        ]
        lines.append("\n".join([*head, *rows]))
    if facts.description:
        lines.append(f"```\n{facts.description}\n```")
    if licence is None:
        lines.append(
            "The licence of the base is unknown to the program that wrote this page. Set `license`"
            " above."
        )
    name = repo_id.partition("/")[2]
    pull, place = f"framepack pull {repo_id}", repo_id
    if artifact.kind != "bundle":
        pull, place = f"{pull} --output {name}", name
    lines.append(f"## Use\n\n```\n{pull}\n{command(artifact, place)}\n```")
    return "\n\n".join(lines) + "\n"


def _front_matter(artifact: Artifact, facts: Facts, licence: Licence | None) -> str:
    """Return the metadata that the hub reads."""
    base = "/".join(facts.base.split("/")[:2]) if facts.base else ""
    is_on_hub = licence is not None and bundle.REPOSITORY.fullmatch(base) is not None
    video = artifact.kind != "network" or artifact.role == "transformer"
    return ModelCardData(
        license=licence.identifier if licence else UNKNOWN,
        license_name=licence.name if licence else None,
        license_link=licence.address if licence else None,
        base_model=base if is_on_hub else None,
        base_model_relation="adapter" if is_on_hub and artifact.kind == "LoRA" else None,
        library_name=LIBRARY,
        pipeline_tag="image-to-video" if video else None,
        tags=[tag for tag in ("framepack", "video", "lora" * (artifact.kind == "LoRA")) if tag],
    ).to_yaml()


def _table(facts: Facts, licence: Licence | None) -> str:
    """Return what is recorded, one row for each fact."""
    clips = "" if facts.clips is None else f", {facts.clips:,} clips"
    rows = {
        "base model": facts.base or UNKNOWN,
        "licence of the base": str(licence or UNKNOWN),
        "packing schedule": f"`{facts.schedule}`" if facts.schedule else UNKNOWN,
        "sampling order": facts.order or UNKNOWN,
        "training steps": UNKNOWN if facts.steps is None else f"{facts.steps:,}",
        "dataset": f"fingerprint `{facts.dataset}`{clips}" if facts.dataset else UNKNOWN,
    }
    if facts.rank:
        rows["rank"] = facts.rank
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
