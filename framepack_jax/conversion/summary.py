"""Describe a bundle that was made: its networks, their sources, and what it still lacks."""

from collections.abc import Sequence

from etils import epath

from framepack_jax import bundle
from framepack_jax.bundle import Manifest, Role
from framepack_jax.models import registry


def summarize(output: epath.PathLike, manifest: Manifest, *, is_schedule_assumed: bool) -> str:
    """Return a line for each network, and notes on what a user must know."""
    assumed = " (schedule assumed; give --schedule if it is made for another)"
    lines = [
        f"{output}: schedule {manifest.schedule}, order {manifest.schedule.order}"
        f"{assumed if is_schedule_assumed else ''}"
    ]
    for name, role in manifest.roles.items():
        _, cfg = bundle.role_config(manifest, name)
        count = registry.parameter_count(role.kind, cfg) / 1e6
        lines.append(
            f"  {name:15} {role.kind:19} {count:10,.1f} M parameters  {_origin(name, role)}"
        )
    return "\n".join([*lines, *_notes(manifest)])


def _notes(manifest: Manifest) -> list[str]:
    notes = []
    known = "transformer" in manifest.roles
    needed: Sequence[str] = bundle.sampling_roles(manifest) if known else bundle.ROLES
    if absent := [name for name in needed if name not in manifest.roles]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in absent)
        notes.append(
            f"still without {', '.join(absent)}: to sample, convert with {flags} too, or with"
            " --encoders-from a bundle that has them"
        )
    for name, role in manifest.roles.items():
        if role.path == name and (also := role.source.get("also_holds")):
            notes.append(
                f"note: {role.source['name']} also holds {', '.join(also)}; to convert all of them,"
                " give it as --pipeline"
            )
    transformer = manifest.roles.get("transformer")
    if transformer and not transformer.config["context_kernels"]:
        notes.append(
            "note: the transformer is a base model, which embeds no context; start a packed model"
            " from it with --from-base"
        )
    return notes


def _origin(name: str, role: Role) -> str:
    """Return the source of a network, or the bundle that keeps it."""
    if role.path != name:
        return f"stays in {role.path}"
    source = role.source
    details = [source["naming"], source["format"]]
    if prefix := source.get("prefix"):
        details.append(f"prefix {prefix} removed")
    if unknown := source.get("left_out"):
        details.append(f"{unknown} left out")
    return f"{source['bytes'] / 1e6:,.1f} MB from {source['name']} ({'; '.join(details)})"
