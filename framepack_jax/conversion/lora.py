"""LoRA files in and out: kohya's and musubi-tuner's, diffusers' and PEFT's, with the transformer's
modules named as diffusers, Tencent or ComfyUI name them.

Sources: the key names of kohya-ss/sd-scripts (`networks/lora.py`) and kohya-ss/musubi-tuner, of
PEFT's saved adapters, of diffusers' `save_lora_adapter`, and those that ComfyUI (`comfy/lora.py`)
looks up.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from framepack_jax.conversion import transformer
from framepack_jax.conversion.engine import DTYPES, Step, Table
from framepack_jax.conversion.export import Tensor, stream_safetensors
from framepack_jax.conversion.lora_fusion import (
    Pair,
    folded,
    kernel_steps,
    module_names,
    padded,
    pair_of,
    tensors_of,
    to_kernels,
    to_modules,
    trimmed,
)
from framepack_jax.conversion.weight_files import (
    Checkpoint,
    ConversionError,
    open_checkpoint,
    read_json,
)
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.lora import Factors, LoRA
from framepack_jax.utils.files import atomic_write
from framepack_jax.utils.messages import shorten

# Tencent's names and those of ComfyUI are alike in part; the first that has one takes it.
TABLES = {
    "diffusers'": transformer.DIFFUSERS,
    "Tencent's": transformer.TENCENT_FRAMEPACK,
    "ComfyUI's": transformer.COMFYUI_FRAMEPACK,
}
METADATA = "lora_adapter_metadata"
ADAPTER_CONFIG = "adapter_config.json"
# What trainers and wrappers put before a module's name, dots written as underscores.
PREFIX = re.compile(
    r"(lora_unet|lora_transformer|lycoris|base_model_model|model|module|transformer|diffusion_model)_"
)
# A LoRA of which more than this share has no place in the network is warned of.
LARGE_SHARE = 0.1
TENSOR = re.compile(
    r"(?P<module>.+)\.(lora[._](?P<side>A|B|down|up)(\.[\w-]+)?\.weight|(?P<alpha>alpha))"
)
SIDES = {"A": "down", "B": "up"}
UNSUPPORTED = {
    r".*\.(dora_scale|lora_magnitude_vector.*)": "a DoRA",
    r".*\.hada_\w+": "a LoHa",
    r".*\.lokr_\w+": "a LoKr",
    r".*\.b?oft_\w+": "an OFT",
    r".*\.lora_mid\.weight": "a LoCon with Tucker factors",
    r".*\.lora_\w+(\.[\w-]+)?\.bias": "a LoRA with biases",
    r".*\.(diff|diff_b|set_weight)": "a file of full differences",
}
# Fields of a PEFT config that make more of an adapter than scale * up @ down.
PLAIN = {"peft_type": "LORA", "use_dora": False, "lora_bias": False, "bias": "none"}
# Initial values that PEFT takes out of the base weights, which are then not those of the release.
CHANGED_BASE = ("pissa", "olora", "corda")


class Naming(NamedTuple):
    """How a file spells a module's factors. Without `alpha` the scale is multiplied into `up`;
    `flat` names have underscores for dots; `one_rank` files have the same rank everywhere."""

    table: Table
    down: str
    up: str
    alpha: str | None = None
    flat: bool = False
    one_rank: bool = False

    @classmethod
    def peft(cls, table: Table, prefix: str, *, one_rank: bool = False) -> "Naming":
        """Names of PEFT: the scale is part of `up`."""
        down, up = f"{prefix}{{}}.lora_A.weight", f"{prefix}{{}}.lora_B.weight"
        return cls(table, down, up, one_rank=one_rank)

    @classmethod
    def kohya(cls, table: Table, prefix: str, *, flat: bool = False) -> "Naming":
        """Names of kohya-ss/sd-scripts: alpha is a tensor."""
        down, up = f"{prefix}{{}}.lora_down.weight", f"{prefix}{{}}.lora_up.weight"
        return cls(table, down, up, f"{prefix}{{}}.alpha", flat)


NAMINGS = {
    # Read by `pipe.load_lora_weights` and `load_lora_adapter`; ranks stand in the metadata too.
    "diffusers": Naming.peft(transformer.DIFFUSERS, "transformer."),
    # As diffusion-pipe writes them: every program reads these (docs/other-programs.md). Without
    # metadata, readers take alpha from one module for all, so that all have one rank.
    "original": Naming.peft(transformer.TENCENT_FRAMEPACK, "diffusion_model.", one_rank=True),
    # As musubi-tuner writes a LoRA of FramePack,
    "kohya": Naming.kohya(transformer.DIFFUSERS, "lora_unet_", flat=True),
    # and one of HunyuanVideo.
    "kohya-tencent": Naming.kohya(transformer.TENCENT_FRAMEPACK, "lora_unet_", flat=True),
    # ComfyUI looks its modules up in both spellings of factors; this one keeps alpha apart.
    "comfyui": Naming.kohya(transformer.COMFYUI_FRAMEPACK, "diffusion_model."),
}
Alphas = Callable[[str, int], float]
# Trainers have alphas about as large as the rank; float32 ends at 3e38.
MAX_ALPHA = 1e9


class Place(NamedTuple):
    """A module of the network: whose name it is, the name with dots, and the row it belongs to."""

    naming: str
    name: str
    step: Step


@dataclasses.dataclass(frozen=True)
class LoadedLora:
    """A LoRA file that was read: `lora`, how many of the file's `modules` are in it (`applied`),
    the names of those that are not, {rank: number of modules}, and whose naming it is in."""

    lora: LoRA
    applied: int
    modules: int
    unmatched: tuple[str, ...]
    ranks: dict[int, int]
    naming: str

    def summary(self) -> str:
        """One line for the screen."""
        ranks = ", ".join(map(str, sorted(self.ranks)))
        said = f"{self.applied} of {self.modules} modules apply, rank {ranks}, {self.naming} names"
        return f"{said}; no place for {shorten(self.unmatched)}" if self.unmatched else said

    def warning(self) -> str | None:
        """Say that a large share of the file does not apply; None if it does."""
        if len(self.unmatched) <= LARGE_SHARE * self.modules:
            return None
        return (
            f"{len(self.unmatched) / self.modules:.0%} of the LoRA does not apply:"
            f" {len(self.unmatched)} of its {self.modules} modules are not in this transformer, as"
            f" {shorten(self.unmatched)}; expected is a LoRA of FramePack's or HunyuanVideo's"
            " transformer alone"
        )


def is_lora(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds adapters, of the supported kind or not."""
    matches = map(TENSOR.fullmatch, checkpoint.names())
    return any(m and m["side"] for m in matches) or _unsupported(checkpoint) is not None


def files_of(path: Path) -> list[Path]:
    """The files that `read` may open: those of weights, and of PEFT's settings. Raises
    ConversionError where the weights cannot be opened."""
    checkpoint = open_checkpoint(path)
    beside = _config_beside(checkpoint)
    return [*checkpoint.files, *([beside] if beside else [])]


def read(path: Path, cfg: TransformerConfig) -> LoadedLora:
    """The LoRA of a safetensors or PyTorch file, or of PEFT's folder, for a network of that config.

    Modules that the network does not have (a text encoder's, for one) are reported in the result.
    Raises ConversionError where the file is damaged, is no LoRA, is an adapter of another kind, is
    of another network altogether, or does not fit: all that does not is named together.
    """
    checkpoint = open_checkpoint(path)
    modules = _modules(checkpoint)
    places = _places(cfg)
    matched = _placed(path, modules, places)
    unmatched = tuple(module for module, place in matched.items() if place is None)
    if len(unmatched) == len(modules):
        examples = [p.name for p in places.values() if "double/00/img_qkv/kernel" in p.step.targets]
        raise ConversionError(
            f"{path}: none of its {len(modules)} modules is one of this network; it names"
            f" {shorten(modules)}; expected are {' or '.join(dict.fromkeys(examples))} and so on,"
            " with dots or underscores, all behind one prefix or none"
        )
    alphas, pairs, problems = _alphas(checkpoint), {}, []
    for module, place in matched.items():
        if place is None:
            continue
        try:
            if place.name in pairs:
                raise ConversionError(f"{place.name} is there twice")
            pairs[place.name] = _pair(checkpoint, modules[module], place, alphas)
        except ConversionError as error:
            problems.append(f"{module}: {error}")
    lora: LoRA = {}
    steps = {id(place.step): place.step for place in places.values()}
    for step in steps.values():
        for kernel, factors in to_kernels(step, pairs):
            if kernel in lora:
                problems.append(f"{kernel} is changed under two names")
            lora[kernel] = factors
    _raise_together(path, problems)
    namings = collections.Counter(place.naming for place in matched.values() if place)
    ranks = collections.Counter(len(pair.down) for pair in pairs.values())
    return LoadedLora(lora, len(pairs), len(modules), unmatched, dict(ranks), " and ".join(namings))


def about(path: Path) -> dict[str, str]:
    """The header of a safetensors file but for what `write` says itself, and hashes of the file's
    tensors; {} for other formats."""
    header = _header(open_checkpoint(path))
    said = re.compile(rf"format|{METADATA}|ss_network_(dim|alpha)|sshs_.*|modelspec\.hash_sha256")
    return {key: value for key, value in header.items() if not said.fullmatch(key)}


def write(
    path: Path,
    lora: Mapping[str, Factors],
    cfg: TransformerConfig,
    naming: str = "diffusers",
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA of a network of that config as safetensors, under one of NAMINGS, whole or not
    at all; `about` goes into the header, with the rank and alpha of what is written.

    A naming with alpha keeps the bits of the factors, if the file that they were read from had the
    same fused matrices. One without alpha has the scale multiplied into `lora_B`. Raises
    ConversionError for an unknown naming, another suffix, and kernels that the network does not
    have.
    """
    path = Path(path)
    if naming not in NAMINGS:
        raise ConversionError(f"LoRA naming {naming!r} is unknown; expected {', '.join(NAMINGS)}")
    if path.suffix != ".safetensors":
        raise ConversionError(f"{path}: a LoRA is written as .safetensors; name it so")
    spelling = NAMINGS[naming]
    pairs = _to_pairs(path, lora, cfg, spelling)
    arrays: dict[str, np.ndarray] = {}
    for name, (step, pair) in pairs.items():
        spelt = _flat(name) if spelling.flat else name
        down, up = tensors_of(step, pair)
        arrays |= {spelling.down.format(spelt): down, spelling.up.format(spelt): up}
        if spelling.alpha:
            arrays[spelling.alpha.format(spelt)] = np.array(_alpha(pair), np.float32)
    metadata = {**(about or {}), **_rank_and_alpha([pair for _, pair in pairs.values()])}
    if naming == "diffusers":
        metadata[METADATA] = _peft_metadata({n: len(pair.down) for n, (_, pair) in pairs.items()})
    tensors = [Tensor(name, x.shape, str(x.dtype)) for name, x in arrays.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:
        values = (np.asarray(x, order="C") for x in arrays.values())
        stream_safetensors(file, tensors, values, metadata=metadata)


def _alpha(pair: Pair) -> float:
    """Return the alpha of a module whose ranks have one scale."""
    return len(pair.down) * float(pair.scale[0])


def _rank_and_alpha(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return the rank and alpha of all modules, under the keys of kohya-ss/sd-scripts; "Dynamic" if
    modules differ, as its `resize_lora.py` writes it. Factors with a folded scale have alpha =
    rank."""
    ranks = {str(len(pair.down)) for pair in pairs}
    alphas = {f"{_alpha(pair):g}" for pair in pairs}
    fields = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    return {k: values.pop() if len(values) == 1 else "Dynamic" for k, values in fields.items()}


def _to_pairs(
    path: Path, lora: Mapping[str, Factors], cfg: TransformerConfig, spelling: Naming
) -> dict[str, tuple[Step, Pair]]:
    """{module: (its row, its factors as the file is to have them)}."""
    steps = kernel_steps(spelling.table, cfg)
    known = {kernel for step in steps for kernel in step.targets}
    if absent := sorted(lora.keys() - known):
        raise ConversionError(
            f"{path}: {len(absent)} of {len(lora)} kernels of the LoRA are not of this network:"
            f" {shorten(absent)}"
        )
    pairs = {name: (step, pair) for step in steps for name, pair in to_modules(step, lora)}
    for name, (step, pair) in pairs.items():
        if spelling.alpha is None or (pair.scale != pair.scale[0]).any():
            pairs[name] = step, folded(pair)
    if spelling.one_rank:
        rank = max((len(pair.down) for _, pair in pairs.values()), default=0)
        return {name: (step, padded(pair, rank)) for name, (step, pair) in pairs.items()}
    return pairs


def _places(cfg: TransformerConfig) -> dict[str, Place]:
    """Every module by its names, with underscores for dots."""
    places: dict[str, Place] = {}
    for naming, table in TABLES.items():
        for step in kernel_steps(table, cfg):
            for name in module_names(step):
                places.setdefault(_flat(name), Place(naming, name, step))
    return places


def _placed(
    path: Path, modules: Collection[str], places: Mapping[str, Place]
) -> dict[str, Place | None]:
    """Return the place of each module: behind the known prefixes or, if no module has a place so,
    behind one prefix of the whole file."""
    placed = {module: _place(module, places) for module in modules}
    if any(placed.values()):
        return placed
    prefix = _common_prefix(path, modules, places)
    return {module: places.get(_flat(module.removeprefix(prefix))) for module in modules}


def _common_prefix(path: Path, modules: Collection[str], places: Mapping[str, Place]) -> str:
    """Return the prefix that gives a place to the largest number of modules, "" if none does.

    More than half of the modules behind it must have a place: a text encoder or another network
    may have a few modules whose names end as those of the network do. Raises ConversionError if
    two prefixes give a place to as many, such as those of plain and averaged weights.
    """
    before = (_before_place(module, places) for module in modules)
    placed = collections.Counter(prefix for prefix in before if prefix)
    found = [
        (count, prefix)
        for prefix, count in placed.most_common()
        if 2 * count > sum(module.startswith(prefix) for module in modules)
    ]
    if len(found) > 1 and found[0][0] == found[1][0]:
        raise ConversionError(
            f"{path}: {found[0][0]} modules of this network are behind {found[0][1]!r} and as many"
            f" behind {found[1][1]!r}; expected a single adapter of FramePack's or HunyuanVideo's"
            " transformer, behind one prefix"
        )
    return found[0][1] if found else ""


def _before_place(module: str, places: Mapping[str, Place]) -> str | None:
    """Return what stands before the longest end of a module's name that has a place; None if no
    end has."""
    ends = (match.end() for match in re.finditer(r"[._]", module))
    return next((module[:end] for end in ends if _flat(module[end:]) in places), None)


def _place(module: str, places: Mapping[str, Place]) -> Place | None:
    """The place of a module as a file names it: with dots, with underscores, or with dots where
    the network has underscores, and behind any number of prefixes."""
    name = _flat(module)
    # A prefix may be the beginning of a name too: transformer_ of transformer_blocks.
    while name not in places and (prefix := PREFIX.match(name)):
        name = name[prefix.end() :]
    return places.get(name)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """{module as the file names it: {"down", "up", "alpha": tensor name}}."""
    if found := _unsupported(checkpoint):
        kind, name = found
        raise ConversionError(
            f"{checkpoint.path} is {kind} ({name}), which is not supported; expected a plain LoRA:"
            " convert it, or train without that option"
        )
    modules: dict[str, dict[str, str]] = {}
    for name in checkpoint.names():
        if match := TENSOR.fullmatch(name):
            kind = "alpha" if match["alpha"] else SIDES.get(match["side"], match["side"])
            before = modules.setdefault(match["module"], {}).setdefault(kind, name)
            if before != name:
                raise ConversionError(
                    f"{checkpoint.path}: {before} and {name} are the same factor of one module;"
                    " expected a file with a single adapter"
                )
    if not any(tensors.keys() - {"alpha"} for tensors in modules.values()):
        raise ConversionError(
            f"{checkpoint.path} is no LoRA: it holds {shorten(checkpoint.names())}; expected names"
            " as lora_unet_MODULE.lora_down.weight (kohya), MODULE.lora_A.weight (PEFT, diffusers)"
        )
    return modules


def _unsupported(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(what it is, a tensor that tells) where a file holds adapters other than plain LoRA."""
    for name in checkpoint.names():
        for pattern, kind in UNSUPPORTED.items():
            if re.fullmatch(pattern, name):
                return kind, name
    return None


def _pair(checkpoint: Checkpoint, tensors: Mapping[str, str], place: Place, alphas: Alphas) -> Pair:
    """The factors of a module. Raises ConversionError where they do not fit it."""
    if absent := {"down", "up"} - tensors.keys():
        raise ConversionError(f"it has {shorten(tensors.values())} but no {absent.pop()} factor")
    outputs, *inputs = place.step.source_shapes()[0]
    down, up = (_trimmed(checkpoint.shape(tensors[side])) for side in ("down", "up"))
    rank = down[0] if down else 0
    if rank < 1 or down != _trimmed((rank, *inputs)) or up != _trimmed((outputs, rank)):
        raise ConversionError(
            f"its factors are {down} and {up}, expected (rank, {', '.join(map(str, inputs))}) and"
            f" ({outputs}, rank)"
        )
    for side in ("down", "up"):
        if (dtype := checkpoint.dtype(tensors[side])) not in DTYPES:
            raise ConversionError(f"{tensors[side]} is {dtype}, expected {', '.join(DTYPES)}")
    scale = alphas(place.name, rank)
    if "alpha" in tensors:
        alpha = checkpoint.read(tensors["alpha"])
        if alpha.size != 1:
            raise ConversionError(f"alpha has shape {alpha.shape}, expected a single number")
        if not abs(value := float(alpha.reshape(()))) < MAX_ALPHA:
            raise ConversionError(f"alpha is {value:g}, expected less than {MAX_ALPHA:g}")
        scale = value / rank
    factors = checkpoint.read(tensors["down"]), checkpoint.read(tensors["up"])
    return trimmed(pair_of(place.step, *factors, np.full(rank, scale)))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones behind a matrix's two dimensions, which 1 x 1 convolutions have."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _alphas(checkpoint: Checkpoint) -> Alphas:
    """(module, rank) -> scale of a module that has no alpha of its own: by PEFT's config where
    there is one, otherwise 1, as diffusers, ComfyUI and kohya's scripts take it."""
    fields = _peft_config(checkpoint)
    patterns = _checked_alphas(checkpoint, fields)
    root = bool(fields.get("use_rslora"))

    def scale(module: str, rank: int) -> float:
        alpha = fields.get("lora_alpha")
        for key, value in patterns.items():
            name = key.strip("^$").replace("\\.", ".")
            if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
                alpha = value
                break
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)

    return scale


def _checked_alphas(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> dict[str, float]:
    """`alpha_pattern` of PEFT's settings. Raises ConversionError where they say more than a scale,
    or say it otherwise than by numbers and names of modules."""
    for name, plain in PLAIN.items():
        if fields.get(name, plain) != plain:
            raise ConversionError(
                f"{checkpoint.path}: its PEFT config has {name} = {fields[name]!r}, which is not"
                f" supported; expected {plain!r}"
            )
    if str(fields.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        raise ConversionError(
            f"{checkpoint.path}: init_lora_weights = {fields['init_lora_weights']!r} changes the"
            " base weights; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    patterns = fields.get("alpha_pattern") or {}
    numbers = patterns.values() if isinstance(patterns, dict) else [None]
    for alpha in (fields.get("lora_alpha", 1), *numbers):
        if not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
            raise ConversionError(
                f"{checkpoint.path}: its PEFT config has {str(alpha)[:40]} for an alpha; expected"
                " lora_alpha to be a number and alpha_pattern {module: number}"
            )
    if special := [key for key in patterns if re.search(r"[*+?|()\[\]{}]", key)]:
        raise ConversionError(
            f"{checkpoint.path}: alpha_pattern {special[0]!r} is a regular expression; only names"
            " of modules are supported"
        )
    return patterns


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """PEFT's settings, from the header of the file or beside it; {} where there are none."""
    file, header = checkpoint.files[0], _header(checkpoint)
    if METADATA in header:
        try:
            fields = json.loads(header[METADATA])
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{file}: its {METADATA} is no JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ConversionError(f"{file}: its {METADATA} is no JSON object")
        # A pipeline's file has its settings by component.
        prefix = "transformer."
        own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
        return own or fields
    beside = _config_beside(checkpoint)
    return read_json(beside) if beside else {}


def _header(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of a safetensors file; {} for other formats."""
    try:
        return safetensors.safe_open(checkpoint.files[0], "np").metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def _config_beside(checkpoint: Checkpoint) -> Path | None:
    """PEFT's settings in a file of their own."""
    file = checkpoint.files[0]
    beside = file.parent / ADAPTER_CONFIG
    belongs = checkpoint.path.is_dir() or file.stem == "adapter_model"
    return beside if belongs and beside.exists() else None


def _peft_metadata(ranks: Mapping[str, int]) -> str:
    """What diffusers makes its LoraConfig of, from {module: rank}; alpha is the rank everywhere."""
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    # Anchored: PEFT also matches the ends of longer names.
    others = {f"^{name}": r for name, r in ranks.items() if r != rank}
    fields = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }
    return json.dumps({f"transformer.{name}": value for name, value in fields.items()})


def _raise_together(path: Path, problems: list[str]) -> None:
    if problems:
        listed = shorten(problems, separator="\n  ")
        raise ConversionError(f"{path} does not fit the network:\n  {listed}")
