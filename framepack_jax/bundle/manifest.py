"""`bundle.json`: networks of a bundle, their paths, and the settings of their training."""

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any, TypeVar

from etils import epath

from framepack_jax import packing
from framepack_jax.bundle.pulled import REPOSITORY
from framepack_jax.bundle.sampling import Sampling
from framepack_jax.models import lora, registry
from framepack_jax.models.network_spec import DenoiserSpec, NetworkSpec, TextEncoderSpec, VaeSpec
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS, Size
from framepack_jax.packing.buckets import BUCKETS_480P
from framepack_jax.utils import fields
from framepack_jax.utils.files import atomic_write_text
from framepack_jax.utils.messages import first_line
from framepack_jax.utils.paths import is_remote

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

FORMAT = 1
MANIFEST = "bundle.json"
# A file that exists from the first write until the bundle is complete.
UNFINISHED = "unfinished"
ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder")
ROLES = ("transformer", "vae", *ENCODERS)


class BundleError(ValueError):
    """A bundle that is missing, unfinished, of another format or without a needed part."""


@dataclasses.dataclass(frozen=True)
class Role:
    """One network of a bundle: its kind (a key of `registry.NETWORKS`), its config, its folder, and
    its source, with the fields of `Written`."""

    kind: str
    config: dict[str, Any]
    path: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `bundle.json`.

    `latent_mean` and `latent_std` hold one number a latent channel: the transformer sees
    (latent - mean) / std. `prompt_template` has one `{}` for the prompt, of which the transformer
    reads `text_tokens` tokens, its end included. `schedule` is the packing schedule that the
    transformer was trained for, `buckets` the sizes, (height, width) in pixels. `sampling` says
    how videos are sampled.
    """

    roles: dict[str, Role]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    prompt_template: str
    schedule: packing.Schedule
    buckets: tuple[tuple[Size, Size], ...] = BUCKETS_480P
    text_tokens: Size = MAX_PROMPT_TOKENS
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("buckets: expected at least one pair of height and width")

    @property
    def chunk(self) -> int:
        """Number of latent frames that are encoded and decoded alone, 0 if clips are as a whole."""
        return self.schedule.window if self.sampling.decode_alone else 0


def write_manifest(root: epath.PathLike, manifest: Manifest) -> None:
    """Finish a bundle: the manifest is there whole, or not at all."""
    document = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    document["sampling"] = dataclasses.asdict(manifest.sampling)
    document["roles"] = {name: dataclasses.asdict(role) for name, role in manifest.roles.items()}
    buckets = {"buckets": document.pop("buckets")}
    schedule = {"schedule": str(manifest.schedule), "order": manifest.schedule.order}
    text = json.dumps({"format": FORMAT, **document, **schedule, **buckets}, indent=1)
    atomic_write_text(epath.Path(root) / MANIFEST, text + "\n")


def read_manifest(root: epath.PathLike) -> Manifest:
    """Read and check `bundle.json`. Raises BundleError."""
    root = epath.Path(root)
    if not (root / MANIFEST).exists():
        raise BundleError(_what_it_is(root))
    try:
        document = json.loads((root / MANIFEST).read_text())
        version = document.pop("format")
        if version != FORMAT:
            raise BundleError(
                f"bundle {root} has format {version}, this version reads format {FORMAT};"
                " convert the weights again"
            )
        roles = {name: fields.load(Role, role) for name, role in document["roles"].items()}
        order = document.pop("order", None)
        schedule = packing.parse(document["schedule"], order)
        manifest = fields.load(Manifest, document | {"roles": roles, "schedule": schedule})
        if order is None:
            raise fields.FieldError("order is missing")
        return manifest
    except BundleError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"bundle {root}: {MANIFEST} is damaged ({error}); convert again"
        ) from error


def _what_it_is(root: epath.Path) -> str:
    """Describe a folder that is not a bundle, and what to give in its place."""
    if (root / lora.FILE).exists():
        return (
            f"{root} holds a LoRA ({lora.FILE}) and no bundle; give the bundle that it was trained"
            f" from as --bundle, and beside it --lora {root / lora.FILE} to sample with it, or"
            " --init RUN to train on from its run"
        )
    if (root / "checkpoints").exists():
        return (
            f"{root} is a training run and no bundle; its model is {root / 'bundle'}, for --bundle,"
            f" or {root / 'bundle' / lora.FILE}, for --lora; framepack export-run {root} makes it"
        )
    if REPOSITORY.fullmatch(str(root)) and not root.exists():
        return (
            f"{root} is not a bundle: there is no such folder; make one with framepack convert, or,"
            f" if this is a repository of the Hugging Face hub, download it: framepack pull {root}"
        )
    return (
        f"{root} is not a bundle (it has no {MANIFEST}); make one with framepack convert, and if"
        " a conversion was interrupted, run it again"
    )


def role_config(manifest: Manifest, name: str) -> tuple[NetworkSpec, Any]:
    """Return (spec, config) of the network of a role. Raises BundleError if the role is missing or
    its config makes no network."""
    if name not in manifest.roles:
        raise BundleError(
            f"the bundle has no {name}; make one that has it with: framepack convert"
            f" --{name.replace('_', '-')} FILE_OR_FOLDER --encoders-from THIS_BUNDLE --output NEW"
        )
    role = manifest.roles[name]
    if not isinstance(role.kind, str) or role.kind not in registry.NETWORKS:
        raise BundleError(f"{name} is of kind {role.kind!r}; known are {sorted(registry.NETWORKS)}")
    spec = registry.NETWORKS[role.kind]
    cfg: Any = config_from_json(spec.config, role.config)
    try:
        registry.abstract_leaves(role.kind, cfg)
    except Exception as error:  # many types, by which settings do not fit together
        line = first_line(error)
        raise BundleError(
            f"{name}: its config in {MANIFEST} makes no network ({line}): {role.config}; convert"
            " again"
        ) from error
    return spec, cfg


def denoiser_config(manifest: Manifest) -> tuple[DenoiserSpec, Any]:
    """Return (spec, config) of the transformer. Raises BundleError if it is no denoiser."""
    spec, cfg = role_config(manifest, "transformer")
    if not isinstance(spec, DenoiserSpec):
        raise BundleError(f"transformer is of kind {spec.kind!r}, which predicts no velocity")
    return spec, cfg


def vae_config(manifest: Manifest) -> tuple[VaeSpec, Any]:
    """Return (spec, config) of the VAE. Raises BundleError if it is no autoencoder."""
    spec, cfg = role_config(manifest, "vae")
    if not isinstance(spec, VaeSpec):
        raise BundleError(f"vae is of kind {spec.kind!r}, which is no video autoencoder")
    return spec, cfg


def text_encoder_config(manifest: Manifest) -> tuple[TextEncoderSpec, Any]:
    """Return (spec, config) of the text encoder. Raises BundleError if it encodes no tokens."""
    spec, cfg = role_config(manifest, "text_encoder")
    if not isinstance(spec, TextEncoderSpec):
        raise BundleError(f"text_encoder is of kind {spec.kind!r}, which gives no token states")
    return spec, cfg


def encoder_roles(manifest: Manifest) -> tuple[str, ...]:
    """Return the roles of the encoders that the transformer of a bundle reads; without a
    transformer, of those that the bundle has. Raises BundleError."""
    if "transformer" in manifest.roles:
        spec, cfg = denoiser_config(manifest)
        return spec.encoders(cfg)
    return tuple(name for name in ENCODERS if name in manifest.roles)


def sampling_roles(manifest: Manifest) -> tuple[str, ...]:
    """Return the roles that sampling needs. Raises BundleError if there is no transformer."""
    spec, cfg = denoiser_config(manifest)
    return ("transformer", "vae", *spec.encoders(cfg))


def config_from_json(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Return the config of a network from JSON. Raises BundleError."""
    try:
        return fields.load(config_class, values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise BundleError(f"{config_class.__qualname__}: {error}") from error


def reference(path: epath.PathLike, root: epath.PathLike) -> str:
    """Return the reference of a bundle at `root` to parameters at `path`: a relative path, or a URL
    of an object store."""
    if is_remote(path) or is_remote(root):
        return str(path)
    return os.path.relpath(os.path.realpath(path), os.path.realpath(root))


def referenced(root: epath.PathLike, path: str) -> epath.Path:
    """Return the place of parameters that a bundle at `root` refers to by `path`."""
    return absolute(path if is_remote(path) else epath.Path(root) / path)


def check_reference(root: epath.PathLike, path: epath.Path, role: Role) -> None:
    """Raise BundleError if a network of another bundle changed since it was referenced."""
    if path.parent == absolute(root):
        return
    if not (path.parent / MANIFEST).exists():
        raise BundleError(
            f"bundle {root} points to {path}, in a folder that is not a complete bundle (it has no"
            f" {MANIFEST}); finish its conversion, or convert this one again with --encoders-from"
        )
    there = read_manifest(path.parent).roles.get(path.name)
    if there and there.source.get("sha256") != role.source.get("sha256"):
        raise BundleError(
            f"bundle {root} points to {path}, which has been replaced by other weights since;"
            " convert again with --encoders-from"
        )


def absolute(path: epath.PathLike) -> epath.Path:
    """A path as orbax takes it; those of object stores are absolute already."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))
