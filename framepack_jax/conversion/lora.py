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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save_file

from framepack_jax.conversion import transformer
from framepack_jax.conversion.engine import DTYPES, Step, Table
from framepack_jax.conversion.lora_layout import (
    Pair,
    kernel_steps,
    module_names,
    pair_of,
    tensors_of,
    to_kernels,
    to_modules,
)
from framepack_jax.conversion.readers import (
    Checkpoint,
    ConversionError,
    open_checkpoint,
    read_json,
)
from framepack_jax.lora import Factors, LoRA
from framepack_jax.models.packed_dit import Config
from framepack_jax.video.files import whole

# Tencent's names and those of ComfyUI are alike in part; the first that has one takes it.
TABLES = {
    "diffusers'": transformer.DIFFUSERS,
    "Tencent's": transformer.TENCENT_FRAMEPACK,
    "ComfyUI's": transformer.COMFYUI_FRAMEPACK,
}
METADATA = "lora_adapter_metadata"
ADAPTER_CONFIG = "adapter_config.json"
SHOWN = 4
# What trainers and wrappers put before a module's name.
PREFIXES = re.compile(
    r"lora_unet_|lora_transformer_|lycoris_|(base_model\.model\.|model\.|module\.|transformer\.|diffusion_model\.)*"
)
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
    """How a file spells a module's factors; `flat` names have underscores for dots."""

    table: Table
    down: str
    up: str
    alpha: str | None
    flat: bool


PEFT_KEYS = ("{}.lora_A.weight", "{}.lora_B.weight")
KOHYA_KEYS = ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha")
NAMINGS = {
    # What `pipe.load_lora_weights` reads; alpha stands in the metadata, as PEFT writes it.
    "diffusers": Naming(
        transformer.DIFFUSERS, *(f"transformer.{key}" for key in PEFT_KEYS), None, flat=False
    ),
    # As musubi-tuner writes a LoRA of FramePack,
    "kohya": Naming(transformer.DIFFUSERS, *(f"lora_unet_{key}" for key in KOHYA_KEYS), flat=True),
    # and one of HunyuanVideo.
    "kohya-tencent": Naming(
        transformer.TENCENT_FRAMEPACK, *(f"lora_unet_{key}" for key in KOHYA_KEYS), flat=True
    ),
    # ComfyUI looks its modules up in both spellings of factors; this one keeps alpha apart.
    "comfyui": Naming(
        transformer.COMFYUI_FRAMEPACK, *(f"diffusion_model.{key}" for key in KOHYA_KEYS), flat=False
    ),
}
Alphas = Callable[[str, int], float]
# Trainers have alphas about as large as the rank; float32 ends at 3e38.
MOST_ALPHA = 1e9


class Place(NamedTuple):
    """A module of the network: whose name it is, the name with dots, and the row it belongs to."""

    naming: str
    name: str
    step: Step


@dataclasses.dataclass(frozen=True)
class Read:
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
        return f"{said}; no place for {_some(self.unmatched)}" if self.unmatched else said


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


def read(path: Path, cfg: Config) -> Read:
    """The LoRA of a safetensors or PyTorch file, or of PEFT's folder, for a network of that config.

    Modules that the network does not have (a text encoder's, for one) are reported in the result.
    Raises ConversionError where the file is damaged, is no LoRA, is an adapter of another kind, is
    of another network altogether, or does not fit: all that does not is named together.
    """
    checkpoint = open_checkpoint(path)
    modules = _modules(checkpoint)
    places = _places(cfg)
    matched = {module: places.get(PREFIXES.sub("", module, count=1)) for module in modules}
    unmatched = tuple(module for module, place in matched.items() if place is None)
    if len(unmatched) == len(modules):
        examples = [p.name for p in places.values() if "double/00/img_qkv/kernel" in p.step.targets]
        raise ConversionError(
            f"{path}: none of its {len(modules)} modules is one of this network; it names"
            f" {_some(modules)}; expected are {' or '.join(dict.fromkeys(examples))} and so on,"
            " with dots or underscores, behind a prefix or not"
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
    return Read(lora, len(pairs), len(modules), unmatched, dict(ranks), " and ".join(namings))


def write(path: Path, lora: Mapping[str, Factors], cfg: Config, naming: str = "diffusers") -> None:
    """Write a LoRA of a network of that config as safetensors, under one of NAMINGS, whole or not
    at all.

    What was read from a file comes out with the bits that were read, where that file had the same
    fused matrices. Raises ConversionError for an unknown naming, another suffix, and kernels that
    the network does not have.
    """
    path = Path(path)
    if naming not in NAMINGS:
        raise ConversionError(f"LoRA naming {naming!r} is unknown; expected {', '.join(NAMINGS)}")
    if path.suffix != ".safetensors":
        raise ConversionError(f"{path}: a LoRA is written as .safetensors; name it so")
    spelling = NAMINGS[naming]
    steps = kernel_steps(spelling.table, cfg)
    known = {kernel for step in steps for kernel in step.targets}
    if absent := sorted(lora.keys() - known):
        raise ConversionError(
            f"{path}: {len(absent)} of {len(lora)} kernels of the LoRA are not of this network:"
            f" {_some(absent)}"
        )
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, tuple[int, float]] = {}
    for step in steps:
        for name, pair in to_modules(step, lora):
            spelt = _flat(name) if spelling.flat else name
            pair = _of_one_scale(pair)
            rank, alpha = len(pair.down), len(pair.down) * float(pair.scale[0])
            alphas[name] = rank, alpha
            down, up = tensors_of(step, pair)
            tensors[spelling.down.format(spelt)] = down
            tensors[spelling.up.format(spelt)] = up
            if spelling.alpha:
                tensors[spelling.alpha.format(spelt)] = np.array(alpha, np.float32)
    metadata = {"format": "pt"} | ({} if spelling.alpha else {METADATA: _peft_metadata(alphas)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, partial, metadata)


def _places(cfg: Config) -> dict[str, Place]:
    """Every module by its names, with dots and with underscores."""
    places: dict[str, Place] = {}
    for naming, table in TABLES.items():
        for step in kernel_steps(table, cfg):
            for name in module_names(step):
                for spelt in (name, _flat(name)):
                    places.setdefault(spelt, Place(naming, name, step))
    return places


def _of_one_scale(pair: Pair) -> Pair:
    """A module has a single alpha: scales that differ go into `up`."""
    if (pair.scale == pair.scale[0]).all():
        return pair
    up = pair.up.astype(np.float32) * pair.scale.astype(np.float32)
    return Pair(pair.down.astype(np.float32), up, np.ones_like(pair.scale))


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
            f"{checkpoint.path} is no LoRA: it holds {_some(checkpoint.names())}; expected names as"
            " lora_unet_MODULE.lora_down.weight (kohya) or MODULE.lora_A.weight (PEFT, diffusers)"
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
        raise ConversionError(f"it has {_some(tensors.values())} but no {absent.pop()} factor")
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
        if not abs(value := float(alpha.reshape(()))) < MOST_ALPHA:
            raise ConversionError(f"alpha is {value:g}, expected less than {MOST_ALPHA:g}")
        scale = value / rank
    factors = checkpoint.read(tensors["down"]), checkpoint.read(tensors["up"])
    return pair_of(place.step, *factors, np.full(rank, scale))


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
        if not isinstance(alpha, int | float) or not abs(alpha) < MOST_ALPHA:
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
    file = checkpoint.files[0]
    try:
        header = safetensors.safe_open(file, "np").metadata() or {}
    except (OSError, safetensors.SafetensorError):
        header = {}
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


def _config_beside(checkpoint: Checkpoint) -> Path | None:
    """PEFT's settings in a file of their own."""
    file = checkpoint.files[0]
    beside = file.parent / ADAPTER_CONFIG
    belongs = checkpoint.path.is_dir() or file.stem == "adapter_model"
    return beside if belongs and beside.exists() else None


def _peft_metadata(alphas: Mapping[str, tuple[int, float]]) -> str:
    """What diffusers makes its LoraConfig of, from {module: (rank, alpha)}."""
    rank, alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    fields = {
        "r": rank,
        "lora_alpha": alpha,
        # Anchored: PEFT also matches the ends of longer names.
        "rank_pattern": {f"^{name}": r for name, (r, _) in alphas.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, (_, a) in alphas.items() if a != alpha},
        "target_modules": list(alphas),
    }
    return json.dumps({f"transformer.{name}": value for name, value in fields.items()})


def _raise_together(path: Path, problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise ConversionError(f"{path} does not fit the network:\n  {listed}{more}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
